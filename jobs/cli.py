"""The `dfpir` command."""

import atexit
import io
import json
import os
import signal
import sys
import warnings
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import asdict
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs import cli_models
from jobs.cli_options import (
    Address,
    AsJson,
    ClassifierName,
    Clean,
    ConfigFile,
    Device,
    Dtype,
    Engine,
    Format,
    Label,
    Limit,
    MaxFailedFraction,
    MaxWorkers,
    MinConfidence,
    Model,
    Quality,
    Reference,
    RetryFailed,
    SecondLook,
    Source,
    Target,
    Tile,
    given_options,
    named,
)
from jobs.signals import interrupt, signals_raise
from jobs.terminal import faults_explained, messages, results, waiting, watched

app = typer.Typer(
    name="dfpir",
    help="Restores folders of photographs whose damage nobody has labelled.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)
app.add_typer(cli_models.train, name="train")


def _tell_version(wanted: bool) -> None:
    if wanted:
        print(f"dfpir {installed_version('dfpir')}")
        raise typer.Exit


@app.callback()
def _before_commands(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_tell_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options of `dfpir` itself."""


@app.command()
def restore(
    src: Source,
    out: Target,
    model: Model = None,
    classifier: ClassifierName = None,
    label: Label = None,
    reference: Reference = None,
    format: Format = None,
    quality: Quality = None,
    clean: Clean = None,
    engine: Engine = None,
    address: Address = None,
    device: Device = None,
    dtype: Dtype = None,
    max_workers: MaxWorkers = None,
    tile: Tile = None,
    min_confidence: MinConfidence = None,
    second_look: SecondLook = None,
    max_failed_fraction: MaxFailedFraction = None,
    limit: Limit = None,
    retry_failed: RetryFailed = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Restores the photographs in SRC into OUT.

    If it stops before its end, run the same command again to go on.

    Exit code: 0 done; 1 more images failed than allowed, or the run broke off; 2 wrong use, or a place that cannot be
    used; 128 + N ended by signal N.
    """
    given = given_options(locals())
    with faults_explained(), signals_raise():
        from jobs import display
        from jobs.config import read_options
        from jobs.places import sole_driver
        from jobs.progress import ProgressView
        from jobs.restore import make_runner, prepare, run

        options = read_options(config, given)
        with sole_driver(src, out):
            with waiting("listing SRC, reading plan and manifest"):
                job = prepare(src, out, options)
            display.before(messages, job, options)
            with ProgressView(messages, total=job.planned, done=job.planned - job.images_left) as progress:
                summary = run(job, make_runner(options), on_outcomes=progress)
    if as_json:
        print(json.dumps(asdict(summary), allow_nan=False))
    else:
        display.after(results, summary)
    if summary.failed_fraction > options.max_failed_fraction:
        undone = summary.counts["failed"] + summary.counts["quarantined"]
        messages.print(
            f"dfpir: {undone} of {summary.planned} images failed, more than --max-failed-fraction "
            f"{options.max_failed_fraction:g} allows"
        )
        raise typer.Exit(1)


@app.command()
def plan(
    src: Source,
    out: Target,
    model: Model = None,
    classifier: ClassifierName = None,
    label: Label = None,
    reference: Reference = None,
    format: Format = None,
    quality: Quality = None,
    clean: Clean = None,
    device: Device = None,
    dtype: Dtype = None,
    tile: Tile = None,
    min_confidence: MinConfidence = None,
    second_look: SecondLook = None,
    limit: Limit = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Estimates time and disk; restores nothing.

    Lists SRC, reads a sample of image headers, times this machine, and writes the plan and job.json, but no image.
    """
    given = given_options(locals())
    with faults_explained():
        from jobs import display
        from jobs.config import read_options
        from jobs.networks import worker_seconds
        from jobs.places import sole_driver
        from jobs.restore import prepare
        from models.memory import return_freed_memory
        from pipeline.estimate import estimate

        options = read_options(config, given)
        return_freed_memory()
        with sole_driver(src, out), waiting("listing SRC, reading plan and manifest"):
            job = prepare(src, out, options)
        resolved = job.context.config
        estimated = estimate(job.left.table["uri"], output_format=resolved.output_format)
        record, unreadable = display.plan_record(job, estimated), job.unreadable_directories
        options = options.model_copy(update={"dtype": resolved.dtype})
        del job  # the networks need as much memory as the plan of a million images
        readable = record["left"] * (1 - record["unreadable_fraction"])
        record["worker_seconds"] = worker_seconds(options, images=readable, megapixels=record["megapixels"])
    if as_json:
        print(json.dumps(record, allow_nan=False))
    else:
        display.plan(results, record, unreadable)


@app.command()
def preview(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", parser=named, help="One photograph.")],
    picture: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            parser=named,
            help="Before/after picture to write; default: IMAGE's name + .preview.png, here.",
        ),
    ] = None,
    model: Model = None,
    classifier: ClassifierName = None,
    label: Label = None,
    device: Device = None,
    dtype: Dtype = None,
    tile: Tile = None,
    min_confidence: MinConfidence = None,
    config: ConfigFile = None,
) -> None:
    """Shows what would become of one photograph, and why.

    Prints probabilities, the decision and its reason, and writes a picture of before and after.
    """
    given = given_options(locals())
    with faults_explained():
        from jobs.config import read_options
        from jobs.preview import preview as preview_image

        target = picture or Path(f"{image.name}.preview.png")
        preview_image(image, target, read_options(config, given), console=results)


@app.command()
def audit(
    run: Annotated[Path, typer.Argument(metavar="RUN", parser=named, help="Run folder: the OUT of `restore`.")],
    sources: Annotated[
        bool, typer.Option("--sources", help="Look at the inputs, too: are they there, and as they were?")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Compare sizes of files instead of contents.")] = False,
    as_json: AsJson = False,
) -> None:
    """Checks a run's plan, manifest and files against each other.

    Does every planned image have its row, and is every result the file that its row says? Changes nothing.

    Exit code: 0 everything holds; 1 something does not; 2 there is no run that could be audited.
    """
    with faults_explained(), ExitStack() as reading:
        from jobs.audit import audit as audit_run
        from jobs.display_audit import audited

        def watch(checks: Iterable[Any], total: int) -> Iterable[Any]:
            reading.close()
            return watched(checks, "files", total)

        reading.enter_context(waiting("reading plan and manifest"))
        found = audit_run(run, contents=not quick, sources=sources, watch=watch)
    if as_json:
        print(json.dumps(asdict(found)))
    else:
        audited(results, found)
    if found.findings:
        raise typer.Exit(1)


@app.command()
def demo(
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", parser=named, help="Folder for the demonstration, new or of an earlier one."),
    ] = Path("dfpir-demo"),
    engine: Engine = None,
) -> None:
    """Degrades real photographs, restores them blindly and measures.

    They are photographs that ship with scikit-image.
    """
    with faults_explained():
        from jobs.demo import run_demo

        run_demo(out, engine=engine or "ray", messages=messages, results=results)


app.command()(cli_models.evaluate)
app.command()(cli_models.figures)


@app.command()
def models(as_json: AsJson = False) -> None:
    """Lists shipped and known weights.

    With their size, licence, hash and measured quality.
    """
    from jobs import display

    if as_json:
        print(json.dumps(display.model_records()))
    else:
        display.models(results)


def main() -> None:
    """Entry point of the console script.

    The process ends once Python's own exit functions have run and all is written: on a busy machine the libraries'
    destructors abort one process in twenty after its work is done ("terminate called without an active exception").
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by `2>&-`: else the next file to be opened would have its number
            nothing = open(os.devnull, "r+")  # noqa: SIM115 - until the process ends
            os.set_inheritable(nothing.fileno(), True)
            setattr(sys, name, nothing)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal's encoding may lack a name's characters
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as behind `nohup`
        signal.signal(signal.SIGINT, interrupt)
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", module="PIL")  # of metadata, without a word about whose they are
    code: Any = 0
    try:
        app()
    except SystemExit as end:
        code = end.code
    except OSError as error:  # of printing: commands explain those of their work
        print(f"dfpir: {error}", file=sys.stderr)
        code = 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the work is done, and an exit function may be in an import
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    main()
