"""The `dfpir` command."""

import atexit
import io
import json
import logging
import math
import os
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console

from jobs.errors import InterruptedBySignalError, RunError, TrainingError, UsageError
from jobs.signals import interrupt, signals_raise
from jobs.terminal import harmless

app = typer.Typer(
    name="dfpir",
    help="Restores folders of photographs whose damage nobody has labelled.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)
messages = Console(stderr=True, highlight=False, emoji=False)
results = Console(highlight=False, emoji=False)
T = TypeVar("T")


def _named(text: str) -> Path:
    """A path that says something: an empty one would be the working directory."""
    if not text:
        raise typer.BadParameter("it is empty (a shell variable that is not set?); the working directory is `.`")
    return Path(text)


Source = Annotated[
    Path,
    typer.Argument(
        metavar="SRC",
        parser=_named,
        help="Folder of photographs, searched recursively, or a list of them: .txt with a path per line, .csv or "
        ".parquet with a column `path`; relative paths start at the list's folder. Never changed.",
    ),
]
Target = Annotated[
    Path, typer.Argument(metavar="OUT", parser=_named, help="Run folder: images, manifest, plan and logs go here.")
]
Model = Annotated[
    str | None, typer.Option(help="Restoration weights: a name from `dfpir models`, or a file; default: dfpir-compact.")
]
ClassifierName = Annotated[
    str | None,
    typer.Option("--classifier", help="Classifier weights: a name, a file, or clip:FILE; default: degradation-small."),
]
Label = Annotated[
    str | None,
    typer.Option(
        help="auto, or the one damage of all images: noise[:SIGMA], rain, haze, blur, lowlight; default: auto."
    ),
]
Reference = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", parser=_named, help="Folder of undamaged originals, matched by relative path without extension."
    ),
]
Format = Annotated[str | None, typer.Option(help="Format of restored images: same, png, jpeg or webp; default: same.")]
Quality = Annotated[int | None, typer.Option(help="JPEG and WebP quality, 1 to 100; default: 95.")]
Clean = Annotated[
    str | None, typer.Option(help="Images that are not restored: copy, link (hard links) or skip; default: copy.")
]
Engine = Annotated[str | None, typer.Option(help="ray or local (no Ray at all); default: ray.")]
Address = Annotated[
    str | None,
    typer.Option(help="Address of a running Ray cluster; default: RAY_ADDRESS, else one is started here."),
]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda; default: auto.")]
Dtype = Annotated[str | None, typer.Option(help="auto, float32 or bfloat16; default: auto.")]
MaxWorkers = Annotated[
    int | None,
    typer.Option(
        help="At most this many workers; default: on Ray what there is room for, else up to eight per GPU, or one."
    ),
]
Tile = Annotated[str | None, typer.Option(help="auto, off, or the side of a tile in pixels; default: auto.")]
MinConfidence = Annotated[
    float | None, typer.Option(help="Abstain below this probability, 0 to 1; default: the classifier's thresholds.")
]
SecondLook = Annotated[
    bool | None,
    typer.Option(
        "--second-look/--no-second-look",
        help="Classify each result again, to fill `clean_probability_after`; default: yes.",
    ),
]
MaxFailedFraction = Annotated[
    float | None,
    typer.Option(help="More failures than this share make the exit code 1; the run never stops for it; default: 0.05."),
]
Limit = Annotated[
    int | None,
    typer.Option(help="Plan no more than the first N images of SRC; what an earlier call planned is done as well."),
]
RetryFailed = Annotated[
    bool | None, typer.Option("--retry-failed", help="Do images again that failed or were quarantined.")
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        parser=_named,
        help="TOML file with options of `restore`, and max-pixels; what the command line says wins.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


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


@contextmanager
def _faults_explained() -> Iterator[None]:
    """Wrong usage, unusable places: exit code 2; a run that broke off: 1; a signal: 128 and its number."""
    fault: Exception
    try:
        yield
    except UsageError as error:
        code, fault = 2, error
    except InterruptedBySignalError as error:
        code, fault = 128 + error.signal_number, error
    except (RunError, TrainingError) as error:
        code, fault = 1, error
    except OSError as error:
        code, fault = 2, UsageError(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except KeyboardInterrupt:
        code, fault = 130, UsageError("interrupted")
    else:
        return
    text = "\n".join(map(harmless, str(fault).split("\n")))
    messages.print(f"dfpir: {text}", markup=False, soft_wrap=True)
    raise typer.Exit(code) from fault


def _watched(items: Iterable[T], what: str, total: int) -> Iterable[T]:
    """The items, with a bar on a terminal and with nothing elsewhere, where it would leave an empty line."""
    from rich.progress import track

    return track(items, what, total=total, console=messages, transient=True) if messages.is_terminal else items


@contextmanager
def _left_as_found(out: Path) -> Iterator[None]:
    """Removes a folder that was made before wrong usage was found, if it is empty."""
    was_there = out.exists()
    try:
        yield
    except UsageError:
        if not was_there:
            with suppress(OSError):
                out.rmdir()
        raise


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

    The same command again goes on where it stopped.

    Exit code: 0 done; 1 more images failed than allowed, or the run broke off; 2 wrong use, or a place that cannot be
    used; 128 + N ended by signal N.
    """
    given = _given(locals())
    with _faults_explained(), signals_raise():
        from jobs import display
        from jobs.config import read_options
        from jobs.places import sole_driver
        from jobs.progress import ProgressView
        from jobs.restore import make_runner, prepare, run

        options = read_options(config, given)
        with sole_driver(src, out):
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

    Lists SRC, samples image headers, and writes the plan and job.json, but no image.
    """
    given = _given(locals())
    with _faults_explained():
        from jobs import display
        from jobs.config import read_options
        from jobs.networks import worker_seconds
        from jobs.places import sole_driver
        from jobs.restore import estimate_job, prepare
        from models.memory import return_freed_memory

        options = read_options(config, given)
        return_freed_memory()
        with sole_driver(src, out):
            job = prepare(src, out, options)
        record, unreadable = display.plan_record(job, estimate_job(job)), job.unreadable_directories
        options = options.model_copy(update={"dtype": job.context.config.dtype})
        del job  # the networks need as much memory as the plan of a million images
        readable = record["left"] * (1 - record["unreadable_fraction"])
        record["worker_seconds"] = worker_seconds(options, images=readable, megapixels=record["megapixels"])
    if as_json:
        print(json.dumps(record, allow_nan=False))
    else:
        display.plan(results, record, unreadable)


@app.command()
def preview(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", parser=_named, help="One photograph.")],
    picture: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            parser=_named,
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
    given = _given(locals())
    with _faults_explained():
        from jobs.config import read_options
        from jobs.preview import preview as preview_image

        target = picture or Path(f"{image.name}.preview.png")
        preview_image(image, target, read_options(config, given), console=results)


@app.command()
def audit(
    run: Annotated[Path, typer.Argument(metavar="RUN", parser=_named, help="Run folder: the OUT of `restore`.")],
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
    with _faults_explained():
        from jobs import display
        from jobs.audit import audit as audit_run

        found = audit_run(
            run,
            contents=not quick,
            sources=sources,
            watch=lambda checks, total: _watched(checks, "files", total),
        )
    if as_json:
        print(json.dumps(asdict(found)))
    else:
        display.audited(results, found)
    if found.findings:
        raise typer.Exit(1)


@app.command()
def demo(
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", parser=_named, help="Folder for the demonstration, new or of an earlier one."),
    ] = Path("dfpir-demo"),
    engine: Engine = None,
) -> None:
    """Degrades real photographs, restores them blindly and measures.

    They are photographs that ship with scikit-image.
    """
    with _faults_explained():
        from jobs.demo import run_demo

        run_demo(out, engine=engine or "ray", messages=messages, results=results)


@app.command()
def evaluate(
    dataset: Annotated[
        str, typer.Option(help="sots (outdoor), rain100l, cbsd68, gopro, lol, kodak24, urban100, or pairs: your own.")
    ],
    root: Annotated[
        Path,
        typer.Option(
            metavar="DIR", parser=_named, help="Folder of the set as downloaded; pairs: degraded/, reference/."
        ),
    ],
    label: Annotated[str | None, typer.Option(help="With pairs: noise, rain, haze, blur or lowlight.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", parser=_named, help="Parquet file, a row per image; default: DATASET.parquet, here."
        ),
    ] = None,
    model: Model = None,
    classifier: ClassifierName = None,
    device: Device = None,
    dtype: Dtype = None,
    limit: Annotated[int | None, typer.Option(help="Only the first N images.")] = None,
) -> None:
    """Measures a model on a test set by the published protocol.

    Every image is restored twice: with its label given, and with it predicted.
    """
    with _faults_explained():
        from jobs import evaluate as evaluation
        from jobs.config import read_options
        from jobs.datasets import find_examples
        from jobs.display import tell_if_uncalibrated
        from jobs.networks import load_networks
        from jobs.places import require_writable

        target = (out or Path(f"{dataset}.parquet")).resolve()
        if target.suffix != ".parquet":
            raise UsageError(f"--out {out}: give a name that ends in .parquet")
        given = {"model": model, "classifier": classifier, "device": device, "dtype": dtype, "tile": "off"}
        options = read_options(None, given | {"limit": limit})
        examples = find_examples(dataset, root, label=label, limit=options.limit)
        evaluation.check_files(examples)
        networks = load_networks(options)
        evaluation.check_prompts(examples, networks[0])
        tell_if_uncalibrated(messages, options.classifier)
        told = evaluation.provenance(dataset, examples, *networks)
        partial = target.with_suffix(".partial.parquet")
        for path in (target, partial):
            evaluation.require_own(path, told)
        require_writable(target)
        found, rows = evaluation.evaluate(examples, *networks), list[evaluation.Result]()
        try:
            with signals_raise(goes_on=False):
                for row in _watched(found, dataset, len(examples)):
                    rows.append(row)
        except BaseException:  # a file that cannot be read, or Ctrl-C, does not cost the results before it
            if rows:
                done = f"{len(rows)} of {len(examples)} rows"
                evaluation.write(rows, partial, told | {"rows": done})
                results.print(f"{done}: {partial.name}", markup=False, soft_wrap=True)
            raise
        results.print(evaluation.table(dataset, rows))
        evaluation.write(rows, target, told)
        partial.unlink(missing_ok=True)
        results.print(f"one row per image: {out or target.name}", markup=False, soft_wrap=True)


@app.command()
def figures(
    photographs: Annotated[
        Path,
        typer.Argument(
            metavar="PHOTOGRAPHS",
            parser=_named,
            help="Folder with a folder of pictures for each label, or of clean photographs, which are then degraded.",
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", parser=_named, help="Folder for the figures, PNG and SVG.")],
    per_label: Annotated[int, typer.Option(min=1, help="Pictures of each label.")] = 30,
    model: Model = None,
    classifier: ClassifierName = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Draws what model and classifier make of photographs.

    Confusion matrix, reliability diagram, t-SNE of latent features, and examples of before and after.
    """
    with _faults_explained(), _left_as_found(out):
        from jobs import figures as drawing
        from jobs.config import read_options
        from jobs.display import tell_if_uncalibrated
        from jobs.networks import load_networks
        from models.registry import resolve
        from models.weights import load_checkpoint

        given = {"model": model, "classifier": classifier, "device": device, "dtype": dtype}
        options = read_options(None, given)
        drawing.require_apart(out, photographs)
        out.mkdir(parents=True, exist_ok=True)
        networks = load_networks(options)
        tell_if_uncalibrated(messages, options.classifier)
        found = drawing.pictures(photographs, per_label=per_label)
        drawn = drawing.draw(found, *networks, load_checkpoint(resolve(options.model).path))
        for path in drawing.save(drawn, out):
            results.print(str(path), markup=False, soft_wrap=True)


train = typer.Typer(help="Trains a restorer or a classifier from a configuration.", no_args_is_help=True)
app.add_typer(train, name="train")
RestorerConfig = Annotated[
    Path, typer.Argument(metavar="CONFIG", parser=_named, help="TOML file, such as configs/compact.toml.")
]
ClassifierConfig = Annotated[
    Path, typer.Argument(metavar="CONFIG", parser=_named, help="TOML file, such as configs/classifier.toml.")
]
TrainingFolder = Annotated[
    Path, typer.Argument(metavar="OUT", parser=_named, help="Folder: checkpoints, logs, samples.")
]
Threads = Annotated[int, typer.Option(min=0, help="Threads of torch; 0: its own choice.")]
Loaders = Annotated[int, typer.Option(min=0, help="Processes that make samples ahead.")]
LoadersOfEach = Annotated[
    int, typer.Option(min=0, help="Processes that make samples ahead; of each worker, if there are several.")
]
Compiled = Annotated[
    bool, typer.Option("--compile", help="Faster steps after minutes of compiling; needs a C++ compiler.")
]
MaxMinutes = Annotated[
    float, typer.Option(min=0, help="Stop at the first step after so long; the same command goes on.")
]


@train.command("restorer")
def train_restorer(
    config: RestorerConfig,
    out: TrainingFolder,
    device: Device = None,
    threads: Threads = 0,
    loaders: LoadersOfEach = 0,
    compiled: Compiled = False,
    max_minutes: MaxMinutes = math.inf,
    workers: Annotated[
        int,
        typer.Option(min=1, help="GPUs, or CPU workers, that share every batch; with several, or --address, on Ray."),
    ] = 1,
    address: Address = None,
) -> None:
    """Trains a restorer, or goes on where the last call stopped."""
    with _faults_explained(), _left_as_found(out):
        from jobs.config import read_options
        from jobs.networks import resolve_device
        from jobs.train_restorer import train as run
        from jobs.training_config import RestorerTraining, read_config

        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
        chosen = read_options(None, {"device": device}).device
        training = read_config(RestorerTraining, config)
        options: dict[str, Any] = {"loaders": loaders, "compiled": compiled, "max_minutes": max_minutes}
        if workers == 1 and address is None:
            run(training, out, device=resolve_device(chosen), threads=threads, **options)
            return
        from jobs.ray_train import train_on_ray

        messages.print(f"the workers' log: {out / 'training.log'}", markup=False, soft_wrap=True)
        train_on_ray(training, out, device=chosen, workers=workers, threads=threads or 1, address=address, **options)


@train.command("classifier")
def train_classifier(
    config: ClassifierConfig,
    out: TrainingFolder,
    device: Device = None,
    threads: Threads = 0,
    loaders: Loaders = 0,
    max_minutes: MaxMinutes = math.inf,
    export: Annotated[
        Path | None,
        typer.Option(metavar="FILE", parser=_named, help="Calibrated weights (.safetensors) to write at the end."),
    ] = None,
    licence: Annotated[str, typer.Option(metavar="SPDX", help="With --export: the weights' licence.")] = "",
) -> None:
    """Trains a classifier, or goes on where the last call stopped."""
    with _faults_explained(), _left_as_found(out):
        from jobs.config import read_options
        from jobs.networks import resolve_device
        from jobs.train_classifier import export as write_weights
        from jobs.train_classifier import require_exportable
        from jobs.train_classifier import train as run
        from jobs.training_config import ClassifierTraining, read_config

        training = read_config(ClassifierTraining, config)
        if export is not None:
            require_exportable(export, licence, training)
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
        chosen = resolve_device(read_options(None, {"device": device}).device)
        trained = run(training, out, device=chosen, threads=threads, loaders=loaders, max_minutes=max_minutes)
        if export is not None:
            messages.print_json(json.dumps(write_weights(trained, export, licence=licence)))


@app.command()
def models(as_json: AsJson = False) -> None:
    """Lists shipped and known weights.

    With size, licence, hash and measured quality.
    """
    from jobs import display

    if as_json:
        print(json.dumps(display.model_records()))
    else:
        display.models(results)


def _given(arguments: dict[str, Any]) -> dict[str, Any]:
    """The options of a command without its positional and its own arguments."""
    return {k: v for k, v in arguments.items() if k not in {"src", "out", "image", "picture", "config", "as_json"}}


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
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    main()
