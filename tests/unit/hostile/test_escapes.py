"""Names that a terminal, a browser or a file system would obey, through all that shows or stores them."""

import csv
import html
import io
import json
import re
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from hiertune import Taxonomy
from hiertune.data import write_dataset
from hiertune.doctor import finding, print_findings
from hiertune.errors import InputError
from hiertune.report import write_report
from hiertune.tracking.store import _is_within

HOSTILE = [
    "\x1b[31mred",
    "\x1b]0;title\x07",
    "\x9b2J",
    "a\rb",
    "[bold]b[/bold]",
    "[/]",
    "[link=file:///etc/passwd]x[/link]",
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</title><script>",
    "{{7*7}}",
    "${jndi:x}",
    "=cmd|' /C calc'!A0",
    "@SUM(1)",
    "../../etc/passwd",
    "/etc/passwd",
    "‮gnp.exe",
    "a\u2028b",
    "%s%n",
    "-rf",
]
OBEYED = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\u2029]")
"""What a terminal obeys; line ends are ours."""
texts = st.one_of(st.sampled_from(HOSTILE), st.text(min_size=1, max_size=30))


@pytest.mark.parametrize("name", HOSTILE)
def test_classes_of_any_name(folder, run, name):
    """They may be called so; they are shown harmlessly, and kept as they are."""
    lineages = [("f", name), ("f", "plain")] * 20
    taxonomy = Taxonomy.from_lineages(lineages, ["family", "genus"])
    inputs = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    ids = [f"{i}{name}" for i in range(40)]
    write_dataset("n.h5", inputs, taxonomy.encode(lineages), taxonomy, ids)
    code, out, err = run(["data", "smoothing", "n.h5", "--class", "plain"])
    assert (code, err) == (0, "")
    assert not OBEYED.search(out), repr(out)
    code, out, err = run(["data", "smoothing", "n.h5", "--class", name + "x"])
    assert code == 2
    assert not OBEYED.search(out + err), repr(err)
    assert not (folder.parent / "etc").exists()


@pytest.mark.parametrize("name", HOSTILE)
def test_files_and_ids_of_any_name(folder, run, name):
    (folder / "x.csv").write_text("", encoding="utf-8")
    with (folder / "x.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["id", "a", "b", "c"], [name, 1, 2, 3]])
    code, out, err = run(["predict", "model", "x.csv", "--out", "named.csv"])
    assert (code, err) == (0, "")
    rows = list(csv.reader((folder / "named.csv").open(newline="", encoding="utf-8")))
    assert rows[1][0] == name  # a table for programs: nothing is put before '=' (docs/security.md)
    for argv in (
        ["predict", name, "x.csv"],
        ["data", "describe", name],
        ["report", name],
        ["export", name, "o"],
    ):
        code, out, err = run(argv if not name.startswith("-") else [argv[0], "--", *argv[1:]])
        if argv[0] == "data" and name.startswith("-"):
            continue  # an option of the group
        assert code == 2, (argv, out, err)
        assert not OBEYED.search(out + err), repr(err)


LEVELS = ["../x", "a/b", "", "\x1b[31m", "a\0b", "<b>", "[bold]", "=x", "a\nb", "‮x"]


@pytest.mark.parametrize("level", LEVELS)
def test_a_level_is_a_plain_name(level):
    """They are parts of metrics' names, of columns and of parameters' keys."""
    with pytest.raises(InputError) as caught:
        Taxonomy.from_parents([level, "genus"], [[-1], [0]])
    assert len(str(caught.value)) < 1000


def test_a_report_of_hostile_texts(folder):
    run = folder / "runs" / "demo"
    summary = json.loads((run / "summary.json").read_text())
    lines = (run / "trials.csv").read_text().splitlines()
    for name in (name for name in HOSTILE if set(name) & set("<{")):
        rows = list(csv.reader(lines))
        rows[0][6:7] = [f"param/{name}"]
        for row in rows[1:]:
            row[2] = name
        text = io.StringIO()
        csv.writer(text).writerows(rows)
        (run / "trials.csv").write_text(text.getvalue(), encoding="utf-8")
        summary["data"]["path"] = summary["tracking"]["uri"] = summary["versions"]["python"] = name
        summary["controls"] = {name: summary["controls"].popitem()[1]}
        (run / "summary.json").write_text(json.dumps(summary))
        (run / "space.yaml").write_text(f"name: {name}", encoding="utf-8")
        page = write_report(run).read_text("utf-8")
        body = page[: page.index("<script>", page.index("<noscript>"))]
        if "<" in name:
            assert name not in body
            assert name in html.unescape(body)
        assert body.count("<script") == 0
        if "{" in name:
            assert name in body  # not evaluated


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(texts, texts, texts)
def test_findings_of_any_text(what, why, advice):
    stream = io.StringIO()
    console = Console(file=stream, width=80, force_terminal=False, color_system=None)
    print_findings(console, [finding.problem("check", what, why, advice)])
    shown = stream.getvalue()
    assert not OBEYED.search(shown), repr(shown)


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(texts)
def test_error_messages_of_any_text(run, text):
    if text.startswith("-"):
        return
    code, out, err = run(["search", text])
    assert code == 2
    assert not OBEYED.search(out + err), repr(err)


# ------------------------------------------------------------------------- links in run folders


def test_what_a_received_folder_links_to_is_not_written(folder, run):
    precious = folder / "precious"
    precious.write_text("mine")
    demo = folder / "runs" / "demo"
    for name in (".report.html.new", "report.html"):
        (demo / name).unlink(missing_ok=True)
        (demo / name).symlink_to(precious)
    assert run(["report", "runs/demo"])[0] == 0
    for name in (".model.json.new", ".README.md.new"):
        (demo / "model" / name).symlink_to(precious)
    assert run(["decode", "runs/demo", "--save"])[0] == 0
    assert precious.read_text() == "mine"
    shutil.copytree(demo / "model", folder / "mine")
    before = (folder / "mine" / "model.json").read_bytes()
    shutil.rmtree(demo / "model")
    (demo / "model").symlink_to(folder / "mine")
    code, _, err = run(["decode", "runs/demo", "--save"])
    assert (code, "is a link to another place" in err) == (2, True)
    assert (folder / "mine" / "model.json").read_bytes() == before


def test_a_spool_cannot_send_files_from_outside(folder):
    run = folder / "runs" / "demo"
    (run / "kept").mkdir()
    (run / "kept" / "a").write_text("")
    assert _is_within(run, run / "kept")
    assert _is_within(run, run / "space.yaml")
    assert not _is_within(run, run / "../../data.h5")
    assert not _is_within(run, run / "/etc/passwd")
    (run / "kept" / "link").symlink_to("/etc/passwd")
    assert not _is_within(run, run / "kept" / "link")
    assert not _is_within(run, run / "kept")
