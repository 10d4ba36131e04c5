"""`hiertune doctor`: what usually breaks, looked at before it does.

Every check is a function from a `Case` to findings; this list is the one place to add one. The checks only
read, but for a file without a name that is written and gone again (`writable`). None imports Ray or torch in
this process: what needs them is a probe.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from hiertune.doctor import files, machine, services
from hiertune.doctor.finding import Case, Check, Finding, run_checks
from hiertune.doctor.show import as_json, print_findings
from hiertune.errors import InputError

__all__ = ["CHECKS", "Case", "Check", "Finding", "as_json", "diagnose", "print_findings"]

CHECKS = (
    Check("python", machine.check_python),
    Check("packages", machine.check_packages),
    Check("ray extras", machine.check_ray_extras),
    Check("vision", machine.check_vision),
    Check("processors", machine.check_processors),
    Check("memory", machine.check_memory),
    Check("shared memory", machine.check_shared_memory),
    Check("temporary", machine.check_temporary),
    Check("limits", machine.check_limits),
    Check("threads", machine.check_threads),
    Check("ray token", services.check_token),
    Check("ray", services.check_ray, 90.0),
    Check("interface", services.check_gloo_interface),
    Check("gloo", services.check_gloo, 60.0),
    Check("runs folder", files.check_runs),
    Check("storage", services.check_storage, 15.0),
    Check("ledger", services.check_ledger, 15.0),
    Check("mlflow", services.check_mlflow, 15.0),
    Check("leftovers", files.check_leftovers),
    Check("data files", files.check_data_files),
    Check("space", files.check_space, 90.0),
)


def diagnose(space: Path | None, runs: Path, *, start_ray: bool = False) -> list[Finding]:
    """Findings of all checks. Without a space it is the installation that is examined, with one all that
    its search needs. A space that can't be read is a finding."""
    config = None
    if space is not None:
        from hiertune.space import load_space

        with contextlib.suppress(InputError):  # the check of the space says so, with all the rest
            config = load_space(space).config
    return run_checks(CHECKS, Case(runs, space, config, start_ray))
