"""The files of scripts/cluster/ are what Ray, KubeRay, Slurm and the shell take them for."""

import importlib.machinery
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from unittest import mock

import pytest
import yaml
from click.testing import CliRunner
from packaging.requirements import Requirement

from hiertune.errors import InputError
from hiertune.search.plan import plan_search
from hiertune.search.results import resume_command
from hiertune.search.stop import write_command
from hiertune.space import load_space

FOLDER = Path(__file__).parents[2] / "scripts" / "cluster"


@pytest.fixture(scope="module")
def submit():
    loader = importlib.machinery.SourceFileLoader("hiertune_submit", str(FOLDER / "submit"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


def write_space(folder, data):
    path = folder / "space.yaml"
    path.write_text(f"name: small\ndata: {{path: {data}}}\n")
    return load_space(path)


def test_what_travels_is_hiertune_the_space_and_small_data(submit, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    (here / "data").mkdir(parents=True)
    (here / "data" / "small.h5").write_bytes(b"rows")
    (here / "runs").mkdir()
    there.mkdir()
    submit.pack(write_space(here, "data/small.h5"), there)
    found = {path.relative_to(there).as_posix() for path in there.rglob("*") if path.is_file()}
    assert {name for name in found if not name.startswith("hiertune/")} == {"space.yaml", "data/small.h5"}
    assert {"hiertune/cli.py", "hiertune/py.typed"} <= found
    assert not any("__pycache__" in name for name in found)
    assert sum((there / name).stat().st_size for name in found) < 20_000_000


@pytest.mark.parametrize("data", ["../data.h5", "large.h5", "missing.h5"])
def test_data_that_does_not_travel_must_be_where_every_node_sees_it(submit, tmp_path, data):
    (tmp_path / "here").mkdir()
    (tmp_path / "data.h5").touch()
    space = write_space(tmp_path / "here", data)
    with (tmp_path / "here" / "large.h5").open("wb") as file:
        file.truncate(submit.LARGEST_FILE + 1)
    (refused,) = submit.left_files(space)
    assert str(refused) == (
        f"{space.file}:2: data.path: {data!r} does not travel with the job\n"
        "  allowed: an absolute path that every node sees, or a file of up to 10 MB beside the space file"
    )


@pytest.fixture
def without_addresses(monkeypatch):
    for name in ("HIERTUNE_STORAGE", "HIERTUNE_LEDGER", "MLFLOW_TRACKING_URI", "PYTHONPATH"):
        monkeypatch.delenv(name, raising=False)


def run_submit(space, *options, **environment):
    """The command as it is typed, but for `ray`: what would be submitted is printed."""
    bin = space.parent / "bin"
    bin.mkdir(exist_ok=True)
    (bin / "ray").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (bin / "ray").chmod(0o755)
    (bin / "python3").unlink(missing_ok=True)
    (bin / "python3").symlink_to(sys.executable)
    return subprocess.run(
        [bin / "python3", FOLDER / "submit", space, "--runs", "/shared/runs", *options],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment,
    )


def test_settings_in_the_jobs_own_folder_are_refused_before_anything_is_sent(tmp_path, without_addresses):
    space = tmp_path / "space.yaml"
    space.write_text(
        "name: small\nstorage: ./kept\nledger: sqlite:///x.db\ndata: {path: gone.h5}\n"
        "tracking: {uri: 'sqlite:///mlflow.db'}\n"
    )
    done = run_submit(space)
    assert (done.returncode, done.stdout) == (2, "")
    lost = "would be in the job's temporary folder, and lost with it"
    seen = "allowed: an absolute path that the cluster sees"
    assert done.stderr.splitlines() == [
        f"error: {space}:2: storage: './kept' {lost}",
        f"  {seen}; s3://BUCKET/FOLDER or the like",
        f"{space}:3: ledger: 'sqlite:///x.db' {lost}; {seen}; sqlite:////FOLDER/FILE with four slashes, "
        "a server",
        f"{space}:5: tracking.uri: 'sqlite:///mlflow.db' {lost}; {seen}; sqlite:////FOLDER/FILE, a server",
        f"{space}:4: data.path: 'gone.h5' does not travel with the job; allowed: an absolute path that every "
        "node sees, or a file of up to 10 MB beside the space file",
    ]
    space.write_text("name: small\ndata: {path: builtin:rrna16s}\n")
    for variable, value in (
        ("HIERTUNE_STORAGE", "~/kept"),
        ("HIERTUNE_LEDGER", "sqlite+pysqlite:///x.db"),
        ("MLFLOW_TRACKING_URI", "mlruns"),
    ):
        done = run_submit(space, **{variable: value})
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {variable}: ")
        assert f": {value!r} {lost}\n  {seen}; " in done.stderr
    done = run_submit(space, HIERTUNE_LEDGER="postgresql//me:hush@host/db")
    assert f"HIERTUNE_LEDGER: ledger: '***' {lost}" in done.stderr


def test_addresses_and_absolute_paths_are_submitted(tmp_path, without_addresses):
    space = tmp_path / "space.yaml"
    for storage, ledger, uri in (
        ("/shared/kept", "sqlite:////shared/x.db", "sqlite:////shared/mlflow.db"),
        ("file:///shared/kept", "sqlite+pysqlite:////shared/x.db", "databricks"),
        ("s3://bucket/kept", "postgresql+psycopg://me@host/x", "http://mlflow:5000"),
    ):
        places = f"storage: '{storage}'\nledger: '{ledger}'\ntracking: {{uri: '{uri}'}}\n"
        space.write_text("name: small\ndata: {path: builtin:rrna16s}\n" + places)
        # What the file says counts, so that the variables are no matter.
        done = run_submit(space, HIERTUNE_STORAGE="kept", MLFLOW_TRACKING_URI="mlruns")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("job\nsubmit\n")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--trials", "0"], "argument --trials: 0 is not above 0"),
        (["--trials", "many"], "argument --trials: invalid"),
        (["--runs", "runs"], "--runs runs: give an absolute path that every node sees"),
        (["--name", "../above"], "error: --name '../above': must be letters"),
        (["--time-budget", "soon"], "error: --time-budget 'soon': must be seconds"),
    ],
)
def test_its_own_options_are_checked_first(tmp_path, without_addresses, options, said):
    (tmp_path / "space.yaml").write_text("name: small\ndata: {path: builtin:rrna16s}\n")
    done = run_submit(tmp_path / "space.yaml", *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_job_knows_the_command_that_submitted_it(tmp_path, monkeypatch, without_addresses):
    """It is what goes on with the search, from any folder; the job's own folder is gone by then."""
    (tmp_path / "my spaces").mkdir()
    space = tmp_path / "my spaces" / "space.yaml"
    space.write_text("name: small\ndata: {path: builtin:rrna16s}\n")
    done = run_submit(space, "--name", "other", "--trials", "8")
    words = done.stdout.splitlines()
    variables = json.loads(words[words.index("--runtime-env-json") + 1])["env_vars"]
    typed = shlex.split(variables["HIERTUNE_SUBMITTED_BY"])
    assert typed[-2:] == [str(FOLDER / "submit"), str(space)]
    assert Path(typed[0]).parent == space.parent / "bin", "python3 on the PATH is another one"

    # In the job, as it is started there.
    job = tmp_path / "job"
    job.mkdir()
    monkeypatch.chdir(job)
    monkeypatch.setenv("HIERTUNE_SUBMITTED_BY", variables["HIERTUNE_SUBMITTED_BY"])
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (job / "space.yaml").write_bytes(space.read_bytes())
    plan = plan_search(Path("space.yaml"), tmp_path / "runs", name="other", trials=8, resume=None)
    again = resume_command(plan)
    options = f"--runs {tmp_path}/runs --name other --trials 8"
    assert again == f"{variables['HIERTUNE_SUBMITTED_BY']} {options}"
    plan.folder.make()
    write_command(plan.folder, again)
    assert plan.folder.resume.read_text() == f"{again}\n"


def test_the_job_may_be_submitted_again_and_shows_no_secret(submit, tmp_path, monkeypatch):
    monkeypatch.setenv("HIERTUNE_STORAGE", "s3://bucket/folder")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    monkeypatch.setenv("PGPASSWORD", "secret-1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-2")
    monkeypatch.delenv("HIERTUNE_LEDGER", raising=False)
    options = Namespace(runs="/shared/my runs", name="small", trials=7, time_budget="12h", no_wait=True)
    words = submit.command(write_space(tmp_path, "builtin:rrna16s"), options, "/packed")
    assert Path(words[0]).name == "ray"
    assert words[1:5] == ["job", "submit", "--working-dir", "/packed"]
    variables = json.loads(words[words.index("--runtime-env-json") + 1])["env_vars"]
    assert variables.pop("HIERTUNE_SUBMITTED_BY").endswith(f"submit {tmp_path}/space.yaml")
    assert variables == {
        "HIERTUNE_STORAGE": "s3://bucket/folder",
        "MLFLOW_TRACKING_URI": "http://mlflow:5000",
        "RAY_JOB_STOP_WAIT_TIME_S": "120",
    }
    entry = as_ray_runs_it(words, tmp_path)
    assert entry == (
        "python -m hiertune search space.yaml --continue --runs '/shared/my runs' --name small --trials 7 "
        "--time-budget 12h"
    )
    assert "secret" not in " ".join(words)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HIERTUNE_STORAGE", "s3://key:hidden@bucket/folder"),
        ("HIERTUNE_LEDGER", "postgresql+psycopg://me:hidden@host/searches"),
        ("MLFLOW_TRACKING_URI", "http://me:hidden@mlflow:5000"),
    ],
)
def test_an_address_with_a_password_is_not_shown_to_the_whole_cluster(
    submit, tmp_path, monkeypatch, name, value
):
    options = Namespace(runs="/runs", name="small", trials=None, time_budget=None, no_wait=True)
    space = write_space(tmp_path, "builtin:rrna16s")
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=rf"^{name}: .*holds a password") as refused:
        submit.command(space, options, "/packed")
    assert "hidden" not in str(refused.value)
    monkeypatch.setenv(name, value.replace("me:hidden@", "me@").replace("key:hidden@", ""))
    submit.command(space, options, "/packed")


def as_ray_runs_it(words, folder):
    """The shell command that the installed Ray makes of `ray job submit WORDS`."""
    cli = pytest.importorskip("ray.dashboard.modules.job.cli")
    arguments = [str(folder) if word == "/packed" else word for word in words[2:]]
    with mock.patch.object(cli, "_get_sdk_client") as client:
        CliRunner().invoke(cli.job_cli_group, arguments)
    return client.return_value.submit_job.call_args.kwargs["entrypoint"]


def test_weights_beside_the_space_travel_too(submit, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    (here / "space.yaml").write_text(
        "name: small\ndata: {path: /data.h5}\n"
        "model: {backbone: {choice: [{kind: timm, name: resnet18, weights: w.pth}, {kind: mlp}]}}\n"
    )
    space = load_space(here / "space.yaml")
    (refused,) = submit.left_files(space)
    assert str(refused).startswith(f"{space.file}:3: model.backbone.weights: 'w.pth' does not travel")
    (here / "w.pth").write_bytes(b"weights")
    assert not list(submit.left_files(space))
    submit.pack(space, tmp_path / "other")
    assert (tmp_path / "other" / "w.pth").read_bytes() == b"weights"


def test_the_launchers_config_is_one():
    util = pytest.importorskip("ray.autoscaler._private.util")
    config = yaml.safe_load((FOLDER / "cluster.yaml").read_text())
    util.validate_config(util.prepare_config(config))  # Ray's own defaults and schema
    assert config["head_node_type"] in config["available_node_types"]
    assert config["available_node_types"]["head"]["resources"] == {"CPU": 0}
    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    for command in starts:
        assert command == "ray stop" or "RAY_AUTH_MODE=token" in command
    assert "--dashboard-host=127.0.0.1" in starts[1]
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in starts[1]


def test_the_cluster_installs_what_hiertune_needs():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((FOLDER.parents[1] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *extras["vision"], *extras["postgresql"]]
    install = next(
        line
        for line in yaml.safe_load((FOLDER / "cluster.yaml").read_text())["setup_commands"]
        if line.startswith("pip install")
    )
    wanted = {need.name: need for need in map(Requirement, needed)}
    found = {need.name: need for need in map(Requirement, shlex.split(install)[2:])}
    assert found.keys() == wanted.keys()
    for name in wanted.keys() - {"ray"}:  # which is written shorter
        assert found[name].extras == wanted[name].extras
        assert found[name].specifier == wanted[name].specifier, name


def test_the_rayjob_has_what_kuberay_requires():
    job = yaml.safe_load((FOLDER / "rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert job["metadata"]["name"]
    spec = job["spec"]
    assert "--continue" in spec["entrypoint"].split()
    assert yaml.safe_load(spec["runtimeEnvYAML"]) == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "120"}}
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    head, workers = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    for group in (head, *workers):
        assert isinstance(group["rayStartParams"], dict)
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert container["name"]
            assert container["image"]
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            assert {"HIERTUNE_STORAGE", "HIERTUNE_LEDGER", "MLFLOW_TRACKING_URI"} <= {
                each["name"] for each in container["env"]
            }
    for group in workers:
        assert group["groupName"]
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    shared = next(mount for mount in workers[0]["template"]["spec"]["containers"][0]["volumeMounts"])
    assert spec["entrypoint"].endswith(f"--runs {shared['mountPath']}/runs")


def test_the_slurm_script_is_one():
    script = FOLDER / "slurm.sh"
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--severity=warning", script], check=True)
    text = script.read_text()
    lines = [line.split("=", 1)[0] for line in text.splitlines() if line.startswith("#SBATCH")]
    assert {"#SBATCH --nodes", "#SBATCH --requeue", "#SBATCH --signal", "#SBATCH --time"} <= set(lines)
    assert text.index("#SBATCH --signal") < text.index("set -euo"), "before the first command"


STAND_INS = {
    "scontrol": """
        [ "$*" = "show hostnames first,second" ] || exit 9
        echo first; echo second""",
    # Says what Slurm would run where; the search takes a while, and ends in order when it is told to.
    "srun": """
        echo "$@" >>"$LOG/srun"
        while [ "${1#--}" != "$1" ]; do shift; done
        exec "$@" """,
    "hostname": "echo '10.0.0.1 fe80::1'",
    "ray": """
        echo "ray $*" >>"$LOG/ray"
        case $1 in
        health-check) [ -e "$LOG/answers" ];;
        start)
            touch "$LOG/answers"
            echo "$(cat "$RAY_AUTH_TOKEN_PATH")" >>"$LOG/tokens" # in one write: two nodes start at once
            exec sleep 100;;
        esac""",
    "python": """
        [ "$1" = -c ] && exec REAL_PYTHON "$@"
        echo "python $* at $RAY_ADDRESS" >>"$LOG/search"
        until [ "$(grep -c '^ray start' "$LOG/ray")" = 2 ]; do sleep 0.1; done
        [ -z "${STOPS:-}" ] && exit 3
        trap 'echo in order; exit 130' TERM
        kill -TERM $STOPS_PARENT; while :; do sleep 0.1; done""",
}


@pytest.mark.parametrize("stopped", [False, True])
def test_the_slurm_script_starts_a_cluster_and_the_search(tmp_path, stopped):
    """Without Slurm and Ray: stand-ins say what they are asked to do."""
    log, programs = tmp_path / "log", tmp_path / "bin"
    log.mkdir()
    programs.mkdir()
    for name, text in STAND_INS.items():
        body = text.replace("REAL_PYTHON", sys.executable).replace("$STOPS_PARENT", '"$(cat "$LOG/script")"')
        (programs / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (programs / name).chmod(0o755)
    environment = {
        "PATH": f"{programs}:/usr/bin:/bin",
        "LOG": str(log),
        "SLURM_JOB_ID": "12345",
        "SLURM_JOB_NODELIST": "first,second",
        "SLURM_CPUS_PER_TASK": "8",
        "SLURM_GPUS_ON_NODE": "2",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        **({"STOPS": "1"} if stopped else {}),
    }
    script = subprocess.Popen(
        ["bash", "-c", f'echo $$ >"$LOG/script"; exec bash {FOLDER / "slurm.sh"} space.yaml --runs /runs'],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    output, errors = script.communicate(timeout=60)
    assert script.returncode == (130 if stopped else 3), errors
    assert ("in order" in output) == stopped
    search = "python -m hiertune search space.yaml --runs /runs --continue at 10.0.0.1:22345\n"
    assert (log / "search").read_text() == search
    starts = [line for line in (log / "ray").read_text().splitlines() if line.startswith("ray start")]
    head = next(line for line in starts if "--head" in line)
    worker = next(line for line in starts if "--address=10.0.0.1:22345" in line)
    assert "--node-ip-address=10.0.0.1 --port=22345 --dashboard-host=127.0.0.1" in head
    for line in (head, worker):
        assert "--num-cpus=8" in line
        assert "--num-gpus=2" in line
        assert "--block" in line
    nodes = re.findall(r"--nodelist=(\S+)", (log / "srun").read_text())
    assert sorted(nodes) == ["first", "first", "first", "second"]
    tokens = set((log / "tokens").read_text().split())
    assert len(tokens) == 1
    assert len(tokens.pop()) == 64
    assert not list(tmp_path.glob(".hiertune-*")), "the token is gone"
    assert os.path.exists(log / "answers")
