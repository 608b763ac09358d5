"""The commands that measure and train models."""

import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.cli_options import Address, ClassifierName, Device, Dtype, Model, named
from jobs.errors import UsageError
from jobs.terminal import faults_explained, messages, results, watched


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


def evaluate(
    dataset: Annotated[
        str, typer.Option(help="sots (outdoor), rain100l, cbsd68, gopro, lol, kodak24, urban100, or pairs: your own.")
    ],
    root: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            parser=named,
            help="Folder of the set as downloaded; with pairs, one that holds degraded/ and reference/.",
        ),
    ],
    label: Annotated[str | None, typer.Option(help="With pairs: noise, rain, haze, blur or lowlight.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", parser=named, help="Parquet file, a row per image; default: DATASET.parquet, here."
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
    with faults_explained():
        from jobs import evaluate as evaluation
        from jobs.config import read_options
        from jobs.datasets import find_examples
        from jobs.display import tell_if_uncalibrated
        from jobs.networks import load_networks

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
        evaluation.run(
            dataset,
            examples,
            *networks,
            target,
            watch=lambda found: watched(found, dataset, len(examples)),
            show=lambda rows: results.print(evaluation.table(dataset, rows)),
            tell=lambda text: results.print(text, markup=False, soft_wrap=True),
        )
        results.print(f"one row per image: {out or target.name}", markup=False, soft_wrap=True)


def figures(
    photographs: Annotated[
        Path,
        typer.Argument(
            metavar="PHOTOGRAPHS",
            parser=named,
            help="Folder with a folder of pictures for each label, or of clean photographs, which are then degraded.",
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", parser=named, help="Folder for the figures, PNG and SVG.")],
    per_label: Annotated[int, typer.Option(min=1, help="Pictures of each label.")] = 30,
    model: Model = None,
    classifier: ClassifierName = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Draws how well model and classifier do on photographs.

    Confusion matrix, reliability diagram, t-SNE of latent features, and examples of before and after.
    """
    with faults_explained(), _left_as_found(out):
        from jobs import figures as drawing
        from jobs.config import read_options
        from jobs.display import tell_if_uncalibrated
        from jobs.networks import load_networks
        from models.registry import resolve

        logging.basicConfig(format="%(message)s")  # before open_clip does, under which lines begin with `WARNING:`
        given = {"model": model, "classifier": classifier, "device": device, "dtype": dtype}
        options = read_options(None, given)
        drawing.require_apart(out, photographs)
        out.mkdir(parents=True, exist_ok=True)
        networks = load_networks(options)
        tell_if_uncalibrated(messages, options.classifier)
        found = drawing.pictures(photographs, per_label=per_label)
        drawn = drawing.draw(found, *networks, resolve(options.model).load())
        for path in drawing.save(drawn, out):
            results.print(str(path), markup=False, soft_wrap=True)


train = typer.Typer(help="Trains a restorer or a classifier from a configuration.", no_args_is_help=True)
RestorerConfig = Annotated[
    Path, typer.Argument(metavar="CONFIG", parser=named, help="TOML file, such as configs/compact.toml.")
]
ClassifierConfig = Annotated[
    Path, typer.Argument(metavar="CONFIG", parser=named, help="TOML file, such as configs/classifier.toml.")
]
TrainingFolder = Annotated[
    Path, typer.Argument(metavar="OUT", parser=named, help="Folder: checkpoints, logs, samples.")
]
Threads = Annotated[int, typer.Option(min=0, help="Threads that torch uses; 0: it chooses.")]
Loaders = Annotated[int, typer.Option(min=0, help="Processes that make samples ahead.")]
LoadersOfEach = Annotated[
    int, typer.Option(min=0, help="Processes that make samples ahead; of each worker, if there are several.")
]
Compiled = Annotated[
    bool, typer.Option("--compile", help="Faster steps after minutes of compiling; needs a C++ compiler.")
]
MaxMinutes = Annotated[
    float, typer.Option(min=0, help="Stop at the first step after so many minutes; the same command goes on.")
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
        typer.Option(
            min=1, help="GPUs, or CPU workers, that share every batch; several, or one with --address, run on Ray."
        ),
    ] = 1,
    address: Address = None,
) -> None:
    """Trains a restorer, or goes on where the last call stopped."""
    with faults_explained(), _left_as_found(out):
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
        typer.Option(metavar="FILE", parser=named, help="Calibrated weights (.safetensors) to write at the end."),
    ] = None,
    licence: Annotated[str, typer.Option(metavar="SPDX", help="With --export: the weights' licence.")] = "",
) -> None:
    """Trains a classifier, or goes on where the last call stopped."""
    with faults_explained(), _left_as_found(out):
        from jobs.config import read_options
        from jobs.export_classifier import export as write_weights
        from jobs.export_classifier import require_exportable
        from jobs.networks import resolve_device
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
