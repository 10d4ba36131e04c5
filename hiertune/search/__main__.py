"""`python -m hiertune.search space.yaml` is `hiertune search space.yaml`."""

import sys

from hiertune.cli import main

if __name__ == "__main__":
    main(["search", *sys.argv[1:]])
