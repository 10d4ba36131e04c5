"""The numerical parts against plain torch: heads, losses, GradNorm. `kernels.py [--quick] [--only PART]`.

Prints a table, and as its last line one JSON object: {"figures": {...}, "targets": {...}}.
"""

from __future__ import annotations

import argparse

import _gradnorm
import _heads
import _losses
import torch
from _bench import show

PARTS = {"heads": _heads.run, "losses": _losses.run, "gradnorm": _gradnorm.run}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds: a look, not a result")
    parser.add_argument("--only", choices=PARTS, help="one part")
    options = parser.parse_args()
    torch.set_num_threads(1)
    parts = [options.only] if options.only else PARTS
    show("kernels, one thread", [figure for part in parts for figure in PARTS[part](options.quick)])


if __name__ == "__main__":
    main()
