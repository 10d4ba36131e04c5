"""`python -m hiertune.tracking deliver SPOOL`: the delivery process."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

PATIENCE = 120.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m hiertune.tracking")
    parser.add_argument("command", choices=["deliver"])
    parser.add_argument("spool", type=Path)
    parser.add_argument("--parent", type=int, required=True, help="process that started this one")
    parser.add_argument("--drain", action="store_true", help="end once everything is delivered")
    parser.add_argument("--patience", type=float, default=PATIENCE, help="seconds without success")
    options = parser.parse_args()
    if os.name == "posix":
        os.nice(15)  # as Ray's workers, not before them
    from hiertune.tracking.courier import deliver  # takes seconds: it imports mlflow

    deliver(options.spool.resolve().parent, options.parent, options.drain, options.patience)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a search may be waiting, and taking all these modules down takes time


if __name__ == "__main__":
    main()
