"""`python -m hiertune` is `hiertune`."""

from hiertune.cli import main

if __name__ == "__main__":
    main()
