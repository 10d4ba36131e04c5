"""`python -m hiertune.doctor PROBE ARGUMENTS`: one probe, in a process of its own."""

import json
import sys

from hiertune.doctor.finding import tell
from hiertune.doctor.probes import PROBES

if __name__ == "__main__":
    tell(PROBES[sys.argv[1]](**json.loads(sys.argv[2])))
