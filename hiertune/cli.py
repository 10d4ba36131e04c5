"""The command line. Commands only read their options and call; what takes time to import comes late.

Exit codes: 0 done, 1 the search failed, the doctor found a problem or not all could be delivered, 2 bad input
and nothing started, 130 interrupted, 143 ended by SIGTERM.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import stat
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from hiertune._text import visible
from hiertune.errors import InputError

if TYPE_CHECKING:
    from hiertune.search.interrupt import Interruption
    from hiertune.search.plan import SearchPlan
    from hiertune.tracking import Delivery

app = typer.Typer(
    name="hiertune",
    help="Search the settings of hierarchical classifiers, and prove which settings win.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
data_app = typer.Typer(no_args_is_help=True)
app.add_typer(data_app, name="data")
import_app = typer.Typer(help="Take over settings from other programs.", no_args_is_help=True)
app.add_typer(import_app, name="import")
track_app = typer.Typer(help="See to what a search tells MLflow.", no_args_is_help=True)
app.add_typer(track_app, name="track")

Runs = Annotated[Path, typer.Option("--runs", help="Folder that holds one folder per search.")]


def main(argv: list[str] | None = None) -> None:
    """Run the command line; the process ends with one of the exit codes above."""
    with _outputs():
        errors = Console(stderr=True)
        try:
            app(args=argv)
        except InputError as error:
            text = escape(visible(str(error), keep="\n"))
            errors.print(f"[bold red]error:[/] {text}", highlight=False, soft_wrap=True)
            sys.exit(2)


class _Pipe(io.FileIO):
    """What nobody reads any more, as after `| head`, is dropped: a command goes on without a word."""

    all_there_is = False
    """The command is there for this output only, and ends with it."""

    def write(self, content: Any) -> int:
        try:
            return super().write(content)
        except BrokenPipeError:
            if self.all_there_is:
                self.all_there_is = False  # what is left is dropped
                sys.exit(0)
            return len(content)


@contextlib.contextmanager
def _outputs() -> Iterator[None]:
    """The standard streams, such that what can't be shown or is not read any more ends no command."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_forgiving, before)
    try:
        yield
    finally:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        sys.stdout, sys.stderr = before


def _forgiving(stream: Any) -> Any:
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    stream.reconfigure(errors="replace")  # a mark that a terminal can't show must not end a search
    try:
        number = stream.fileno()
    except OSError:  # there is no file behind it
        return stream
    if not stat.S_ISFIFO(os.fstat(number).st_mode):
        return stream
    pipe = io.BufferedWriter(_Pipe(number, "wb", closefd=False))
    return io.TextIOWrapper(pipe, stream.encoding, "replace", None, stream.line_buffering)


def _end_with_output() -> None:
    """From here on the command ends when nobody reads what it prints."""
    pipe = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if isinstance(pipe, _Pipe):
        pipe.all_there_is = True


@app.command()
def search(
    space: Annotated[Path, typer.Argument(help="The space file (YAML).")],
    runs: Runs = Path("runs"),
    name: Annotated[str | None, typer.Option(help="Name of the search, instead of the file's.")] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="Trials in all, instead of the file's.")] = None,
    time_budget: Annotated[
        str | None,
        typer.Option("--time-budget", help="Wall time for the trials (90m, 12h, 2d), instead of the file's."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the search of that name.")] = False,
    go_on: Annotated[
        bool, typer.Option("--continue", help="Go on with the search of that name, or begin it.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and show the space; start nothing.")
    ] = False,
) -> None:
    """Search a space: train many settings, prove which win, keep the best model."""
    from hiertune.search.interrupt import Interruption, leave

    console = Console()
    with Interruption() as interruption:
        try:
            from hiertune.search.plan import plan_search

            plan = plan_search(
                space,
                runs,
                name=name,
                trials=trials,
                time_budget=time_budget,
                # A dry run of a name that exists shows what going on with it would be.
                resume=None if go_on or (dry_run and not resume) else resume,
                dry_run=dry_run,
            )
            for text in plan.warnings:
                console.print(f"[yellow]warning:[/] {escape(text)}", highlight=False, soft_wrap=True)
            if dry_run:
                from hiertune.search.results import print_plan

                print_plan(console, plan)
            else:
                _search(plan, console, interruption)
        except BaseException:  # libraries turn KeyboardInterrupt into errors of their own
            if not interruption.at_once:
                raise
            leave(interruption.last_words)


def _search(plan: SearchPlan, console: Console, interruption: Interruption) -> None:
    from hiertune.search.interrupt import INTERRUPTED, SearchInterrupted, leave

    with console.status("loading Ray, Tune and Optuna"):
        from hiertune.search import cluster
        from hiertune.search.driver import SearchFailed, run_search
    code = 0
    try:
        run_search(plan, console, interruption, _anew())
    except SearchInterrupted as error:
        console.print(f"stopped: {escape(str(error))}", highlight=False, soft_wrap=True)
        code = INTERRUPTED
    except InputError:
        raise
    except Exception as error:  # the log has its traceback
        if interruption.at_once:
            raise
        said = visible(str(error), keep="\n")
        if not isinstance(error, SearchFailed | OSError):
            said = f"{type(error).__name__}: {said.partition(chr(10))[0]}"
        log = plan.folder.log
        see = f"\n  see {escape(str(log))}" if log.exists() else ""
        Console(stderr=True).print(
            f"[bold red]the search failed:[/] {escape(said)}{see}",
            highlight=False,
            soft_wrap=True,
        )
        code = 1
    if cluster.is_in_use():
        leave(code=code)
    sys.exit(code)


Search = Annotated[str, typer.Argument(metavar="NAME", help="Name of a search, or its folder.")]


@app.command()
def stop(
    name: Search,
    runs: Runs = Path("runs"),
    now: Annotated[bool, typer.Option("--now", help="At once, without the current epochs.")] = False,
) -> None:
    """Stop a search that runs, here or on another machine, as Ctrl-C would, and say how it goes on."""
    from hiertune.search.stop import stop_search

    stop_search(_run_of(name, runs), now, Console())


def _anew() -> list[str]:
    """This very command, to go on with the search that it has begun."""
    resumes = {"--resume", "--continue"} & set(sys.orig_argv)
    return [sys.executable, *sys.orig_argv[1:], *([] if resumes else ["--resume"])]


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A config without distributions, such as a best.yaml.")],
    out: Annotated[Path, typer.Option(help="Folder for the model and its metrics.")] = Path("model"),
    refit: Annotated[bool, typer.Option(help="Train on train + validation and read the test split.")] = False,
) -> None:
    """Train one config in this process, without Ray; resumes from its checkpoint if interrupted."""
    from hiertune.standalone import train_config

    train_config(config, out, refit=refit, console=Console())


@app.command()
def predict(
    model: Annotated[str, typer.Argument(help="A model folder, such as runs/NAME/model; a URI too.")],
    inputs: Annotated[
        Path, typer.Argument(help=".h5, .fasta[.gz], .npy, .csv; an image or a folder of them")
    ],
    out: Annotated[Path | None, typer.Option(help="CSV file; by default the terminal.")] = None,
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Leave out images that cannot be read.")
    ] = False,
) -> None:
    """Name every row of a file at every level."""
    from hiertune.export import predict_file
    from hiertune.storage import local_copy

    with local_copy(model) as folder:
        if out is None:
            _end_with_output()
        broken = predict_file(folder, inputs, out, skip_broken=skip_broken)
    if broken:
        shown = ", ".join(broken[:5]) + (", ..." if len(broken) > 5 else "")
        text = f"{len(broken):,} images cannot be read, and are left out: {shown}"
        Console(stderr=True).print(
            f"[yellow]note:[/] {escape(visible(text))}", highlight=False, soft_wrap=True
        )


@app.command()
def decode(
    name: Search,
    runs: Runs = Path("runs"),
    metric: Annotated[
        str | None, typer.Option(help="Choose by this val/ metric, instead of the search's objective.")
    ] = None,
    save: Annotated[bool, typer.Option("--save", help="Let the model name by the best rule.")] = False,
    show_all: Annotated[bool, typer.Option("--all", help="Show every rule, not only the best.")] = False,
) -> None:
    """Compare ways to turn the winner's logits into names, without training."""
    from hiertune.posthoc import decode_winner

    decode_winner(_run_of(name, runs), metric, save=save, show_all=show_all, console=Console())


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="A search's folder, runs/NAME; a URI in storage too.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
) -> None:
    """Copy the winner's model out of a search."""
    from hiertune.export import export_winner
    from hiertune.storage import local_copy

    with local_copy(run, "model/", "summary.json") as folder:
        export_winner(folder, out)
    text = f"the winner of {run} is in {out}"
    Console().print(escape(visible(text)), highlight=False, soft_wrap=True)


@app.command()
def report(name: Search, runs: Runs = Path("runs")) -> None:
    """Write report.html of a finished or running search."""
    from hiertune.report import write_report

    text = f"wrote {write_report(_run_of(name, runs))}"
    Console().print(escape(visible(text)), highlight=False, soft_wrap=True)


@app.command()
def schema() -> None:
    """Print the JSON Schema of space files, for editors that complete and check YAML."""
    from hiertune.space import json_schema

    print(json.dumps(json_schema(), indent=2))


@track_app.command("sync")
def track_sync(
    name: Search,
    runs: Runs = Path("runs"),
    uri: Annotated[str | None, typer.Option(help="Where to, instead of where the search tracked to.")] = None,
) -> None:
    """Deliver to MLflow what a search could not deliver."""
    from hiertune.tracking import at_work, sync

    console, run = Console(), _run_of(name, runs, tracked=True).resolve()
    if at_work(run):
        console.print("the search still runs: waiting for its own delivery", highlight=False)
    with console.status("delivering"):
        delivery = sync(run, uri)
    _show_delivery(console, run, delivery)
    if not delivery.complete:
        sys.exit(1)


@track_app.command("status")
def track_status(name: Search, runs: Runs = Path("runs")) -> None:
    """Show how much of a search is in MLflow."""
    from hiertune.tracking import at_work, delivery

    console, run = Console(), _run_of(name, runs, tracked=True).resolve()
    if at_work(run):
        console.print("the search still runs", highlight=False)
    _show_delivery(console, run, delivery(run))


def _run_of(name: str, runs: Path, *, tracked: bool = False) -> Path:
    """The folder of a search, or of one that was tracked: `name` in `runs`, or a folder as it is."""
    from hiertune.search.outputs import is_search
    from hiertune.tracking import is_tracked

    is_one = is_tracked if tracked else is_search
    problem = "no search of this name was tracked" if tracked else "there is no search of this name"
    for folder in (Path(name), runs / name):
        if is_one(folder):
            return folder
    known = sorted(folder.name for folder in runs.glob("*") if is_one(folder))
    raise InputError(
        f"{problem}: {name}",
        file=runs,
        allowed=", ".join(known) or "a name in that folder (--runs), or the folder of a search",
    )


def _show_delivery(console: Console, run: Path, delivery: Delivery) -> None:
    from hiertune.tracking import destination_of

    text = f"{delivery.delivered} of {delivery.total} points delivered to {destination_of(run)}"
    console.print(escape(visible(text)), highlight=False, soft_wrap=True)
    if delivery.error:
        since = "" if delivery.since is None else f" (since {datetime.fromtimestamp(delivery.since):%F %T})"
        console.print(f"[yellow]{escape(visible(delivery.error))}[/]{since}", highlight=False, soft_wrap=True)


@app.command()
def doctor(
    space: Annotated[Path | None, typer.Argument(help="A space file, to check all that it needs.")] = None,
    runs: Runs = Path("runs"),
    start_ray: Annotated[bool, typer.Option("--start-ray", help="Really start Ray on this machine.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Check what usually breaks, and say what to do about it."""
    from hiertune import doctor

    console = Console()
    with console.status("looking"):
        found = doctor.diagnose(space, runs, start_ray=start_ray)
    if as_json:
        print(doctor.as_json(found))
    else:
        doctor.print_findings(console, found)
    if any(finding.status == "problem" for finding in found):
        sys.exit(1)


@data_app.callback()
def clean_up_when_ended(context: typer.Context) -> None:
    """Make and look at data sets."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)  # half-written files are removed on the way out

    before = signal.signal(signal.SIGTERM, end)
    context.call_on_close(lambda: signal.signal(signal.SIGTERM, before))


@data_app.command()
def describe(
    file: Annotated[str, typer.Argument(help="An HDF5 file, or builtin:NAME.")],
    kmer: Annotated[int, typer.Option(help="Word length, for built-in sequences.")] = 6,
) -> None:
    """Show what is in a data set."""
    from hiertune.config import DataConfig, KmerConfig
    from hiertune.data import describe as describe_data
    from hiertune.data import open_dataset

    config = DataConfig(path=file, kmer=KmerConfig(k=kmer), in_memory="never")
    data = open_dataset(config, require=())
    Console().print(describe_data(data))


@data_app.command()
def smoothing(
    file: Annotated[str, typer.Argument(help="An HDF5 file, or builtin:NAME.")],
    name: Annotated[
        str, typer.Option("--class", help="The class, by its name or, from the top, its path: 'a;b;c'.")
    ],
    level: Annotated[str | None, typer.Option(help="Its level; by default the finest.")] = None,
    alpha: Annotated[float, typer.Option(help="Mass that leaves the class.")] = 0.1,
    beta: Annotated[float, typer.Option(help="How fast it falls with distance.")] = 1.0,
    clade_share: Annotated[float, typer.Option(help="Share of it under the same top-level class.")] = 1.0,
    uniform_roots: Annotated[bool, typer.Option(help="Classes without a parent: evenly.")] = True,
    fallback_to_uniform: Annotated[
        bool, typer.Option(help="Levels where no class has a parent: evenly, or not at all.")
    ] = True,
    top: Annotated[int, typer.Option(min=1, help="How many of the classes that get most.")] = 20,
) -> None:
    """Show where taxonomy smoothing sends the mass of a class."""
    from hiertune.config import DataConfig
    from hiertune.data import read_taxonomy
    from hiertune.losses import TaxonomySmoothing, target_row

    taxonomy = read_taxonomy(DataConfig(path=file))
    at = taxonomy.levels[-1] if level is None else level
    index = taxonomy.find(at, name)
    loss = TaxonomySmoothing(taxonomy, at, alpha, beta, uniform_roots, fallback_to_uniform, clade_share)
    Console().print(target_row(loss, taxonomy, at, index, top))


Levels = Annotated[str, typer.Option(help="Names of the levels, coarse to fine, separated by commas.")]
Unknown = Annotated[
    list[str] | None, typer.Option(help="A further name that means 'unknown'; may be repeated.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")]


@data_app.command("import-fasta")
def import_fasta_command(
    fasta: Annotated[Path, typer.Argument(help="FASTA, plain or gzip, with headers '>ID<TAB>a;b;c'.")],
    out: Annotated[Path, typer.Argument(help="HDF5 file to make.")],
    levels: Levels,
    kmer: Annotated[int, typer.Option(min=1, max=8, help="Word length.")] = 6,
    transform: Annotated[str, typer.Option(help="counts, frequency, sqrt or presence.")] = "sqrt",
    separator: Annotated[str, typer.Option(help="Between the ranks of a lineage.")] = ";",
    unknown: Unknown = None,
    overwrite: Overwrite = False,
) -> None:
    """Make a data set of k-mer features from sequences with lineages."""
    from hiertune.data import describe as describe_data
    from hiertune.data import import_fasta

    import_fasta(
        fasta,
        out,
        _names(levels),
        k=kmer,
        transform=transform,
        separator=separator,
        unknown=unknown or (),
        overwrite=overwrite,
        console=Console(),
    )
    Console().print(describe_data(out))


@data_app.command("import-table")
def import_table_command(
    table: Annotated[Path, typer.Argument(help="CSV, TSV or Parquet, with a header.")],
    out: Annotated[Path, typer.Argument(help="HDF5 file to make.")],
    labels: Annotated[str, typer.Option(help="Label columns, coarse to fine, separated by commas.")],
    features: Annotated[
        str | None, typer.Option(help="Feature columns; by default all others that hold numbers.")
    ] = None,
    id_column: Annotated[str | None, typer.Option("--id", help="Column of the ids.")] = None,
    split_column: Annotated[
        str | None, typer.Option("--split", help="Column with train, val or test.")
    ] = None,
    unknown: Unknown = None,
    overwrite: Overwrite = False,
) -> None:
    """Make a data set from a table of features and labels."""
    from hiertune.data import describe as describe_data
    from hiertune.data import import_table

    import_table(
        table,
        out,
        _names(labels),
        features=None if features is None else _names(features),
        id_column=id_column,
        split_column=split_column,
        unknown=unknown or (),
        overwrite=overwrite,
        console=Console(),
    )
    Console().print(describe_data(out))


Size = Annotated[
    int, typer.Option(help="Height and width, up to 4096: the shorter side is resized to it, the longer cut.")
]
SkipBroken = Annotated[
    bool, typer.Option("--skip-broken", help="Leave out images that are missing or unreadable.")
]
ValShare = Annotated[float, typer.Option(help="Share of the source's training rows that becomes val.")]
TestShare = Annotated[float, typer.Option(help="Share of the source's training rows that becomes test.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads that decode; by default one per core.")]


@data_app.command("import-images")
def import_images_command(
    folder: Annotated[Path, typer.Argument(help="FOLDER/CLASS/x.jpg, or FOLDER/train/CLASS/x.jpg, ...")],
    out: Annotated[Path, typer.Argument(help="HDF5 file to make.")],
    taxonomy: Annotated[
        Path | None,
        typer.Option(help="CSV, TSV or Parquet with the lineage of each class; else the folders are it."),
    ] = None,
    levels: Annotated[
        str | None,
        typer.Option(help="Columns of the table, or names for the folders; coarse to fine, with commas."),
    ] = None,
    class_column: Annotated[
        str | None, typer.Option(help="Column with the folders' names; by default the first.")
    ] = None,
    size: Size = 224,
    unknown: Unknown = None,
    skip_broken: SkipBroken = False,
    val_share: ValShare = 0.0,
    test_share: TestShare = 0.0,
    threads: Threads = None,
    overwrite: Overwrite = False,
) -> None:
    """Make a data set from a folder of images."""
    from hiertune.data import ImageOptions, import_images
    from hiertune.data import describe as describe_data

    import_images(
        folder,
        out,
        taxonomy,
        None if levels is None else _names(levels),
        class_column=class_column,
        unknown=unknown or (),
        options=ImageOptions(size, skip_broken, val_share, test_share, threads, overwrite),
        console=Console(),
    )
    Console().print(describe_data(out))


@data_app.command("import-inat")
def import_inat_command(
    annotations: Annotated[
        list[Path], typer.Argument(help="JSON files, such as train2018.json val2018.json.")
    ],
    out: Annotated[Path, typer.Argument(help="HDF5 file to make.")],
    images: Annotated[Path, typer.Option(help="Folder in which the files' file_name start.")],
    categories: Annotated[
        Path | None, typer.Option(help="categories.json that replaces the files' categories.")
    ] = None,
    levels: Annotated[
        str | None,
        typer.Option(help="Keys of categories, coarse to fine, with commas; by default the ranks they have."),
    ] = None,
    split: Annotated[
        list[str] | None,
        typer.Option(help="train, val or test, once for each file; by default its name says so."),
    ] = None,
    size: Size = 224,
    unknown: Unknown = None,
    skip_broken: SkipBroken = False,
    val_share: ValShare = 0.0,
    test_share: TestShare = 0.0,
    threads: Threads = None,
    overwrite: Overwrite = False,
) -> None:
    """Make a data set from the JSON files of an iNaturalist competition (2017, 2018, 2019, 2021)."""
    from hiertune.data import ImageOptions, import_inat
    from hiertune.data import describe as describe_data

    import_inat(
        annotations,
        out,
        images,
        categories=categories,
        levels=None if levels is None else _names(levels),
        splits=split or None,
        unknown=unknown or (),
        options=ImageOptions(size, skip_broken, val_share, test_share, threads, overwrite),
        console=Console(),
    )
    Console().print(describe_data(out))


@data_app.command("import-linnaeus")
def import_linnaeus_command(
    labels: Annotated[Path, typer.Argument(help="Linnaeus' labels.h5.")],
    out: Annotated[Path, typer.Argument(help="HDF5 file to make.")],
    images: Annotated[Path, typer.Option(help="Its images.h5, or the folder of the images.")],
    extension: Annotated[str, typer.Option(help="What file names have after the identifier: .jpg")] = "",
    levels: Annotated[
        str | None,
        typer.Option(help="Datasets, coarse to fine, with commas: taxa_L20,taxa_L10; by default all."),
    ] = None,
    names: Annotated[
        str | None,
        typer.Option(help="Names for the levels, coarse to fine, with commas: genus,species."),
    ] = None,
    taxa: Annotated[
        Path | None, typer.Option(help="Table with columns id and name; by default ids are the names.")
    ] = None,
    size: Size = 224,
    skip_broken: SkipBroken = False,
    val_share: ValShare = 0.0,
    test_share: TestShare = 0.0,
    threads: Threads = None,
    overwrite: Overwrite = False,
) -> None:
    """Make a data set from the HDF5 files of Linnaeus: labels and images, without other metadata."""
    from hiertune.data import ImageOptions, import_linnaeus
    from hiertune.data import describe as describe_data

    import_linnaeus(
        labels,
        out,
        images,
        extension=extension,
        levels=None if levels is None else _names(levels),
        names=None if names is None else _names(names),
        taxa=taxa,
        options=ImageOptions(size, skip_broken, val_share, test_share, threads, overwrite),
        console=Console(),
    )
    Console().print(describe_data(out))


@import_app.command("linnaeus-config")
def import_linnaeus_config(
    file: Annotated[Path, typer.Argument(help="An experiment of Linnaeus (YAML).")],
    out: Annotated[Path | None, typer.Option(help="Config to write; by default the terminal.")] = None,
    data: Annotated[
        str | None, typer.Option(help="The data set to train on, in hiertune's format, or builtin:NAME.")
    ] = None,
    names: Annotated[
        str | None,
        typer.Option(
            help="Names of the levels, coarse to fine, instead of Linnaeus' taxa_L40, taxa_L30, ..."
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Turn an experiment of Linnaeus into a config, and say what of it could not be taken over."""
    from hiertune.linnaeus import import_experiment, look_at

    if out is not None and out.exists() and not overwrite:
        raise InputError("exists already", file=out, allowed="another --out, or --overwrite")
    facts = None if data is None else look_at(data)
    imported = import_experiment(file, None if names is None else _names(names), facts)
    if out is None:
        print(imported.yaml(), end="")
        print(imported.account(), end="", file=sys.stderr)
        return
    try:
        out.write_text(imported.yaml(), encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror}", file=out) from None
    print(imported.account(), end="")
    print(f"\nwrote {out}: hiertune train {out}")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]
