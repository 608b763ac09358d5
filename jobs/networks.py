"""The networks that options name: where they run, in which precision, and how long they take."""

import os
import time
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from classifier import load_classifier
from classifier.base import Classifier
from classifier.errors import ClassifierWeightsError
from jobs.config import RestoreOptions
from jobs.errors import UsageError
from models import Restorer, load_restorer, parse_tile
from models.errors import WeightsError
from models.graphs import RUNS_BEFORE
from models.memory import keep_freed_memory
from models.precision import fastest_dtype
from pipeline.worker import WINDOW_IMAGES

DTYPES = ("float32", "bfloat16")


def resolve_device(device: str) -> str:
    """`auto` becomes cuda where there is one; asking for what is not there is an error."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no CUDA device is visible here; use --device cpu or auto")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def resolve_run_device(options: RestoreOptions) -> str:
    """As `resolve_device`, but of the cluster where the run is to take place on one that is there already."""
    address = options.address or os.environ.get("RAY_ADDRESS") or None
    if options.engine == "local" or address is None or options.device == "cpu":
        return resolve_device(options.device)
    from jobs.ray_cluster import all_nodes, connected

    with connected(address, threads=1):
        has_gpu = any(node["Resources"].get("GPU") for node in all_nodes() if node["Alive"])
    if options.device == "cuda" and not has_gpu:
        raise UsageError(f"--device cuda: the Ray cluster at {address} has no GPU; use --device cpu or auto")
    return "cuda" if has_gpu else "cpu"


def resolve_dtype(dtype: str, device: str) -> str:
    """`auto` becomes what is fastest on the device (`models.precision.fastest_dtype`)."""
    return str(fastest_dtype(device)).removeprefix("torch.") if dtype == "auto" else dtype


def load_networks(options: RestoreOptions) -> tuple[Restorer, Classifier]:
    """The restorer and the classifier that the options name, where and in the precision that these say.

    Raises UsageError if weights are at fault.
    """
    return _load_restorer(options), _load_classifier(options)


def _load_restorer(options: RestoreOptions) -> Restorer:
    device, dtype = _device_and_dtype(options)
    try:
        return load_restorer(options.model, device=device, dtype=dtype, tile=parse_tile(options.tile))
    except (WeightsError, ValueError) as error:
        raise UsageError(str(error)) from error


def _load_classifier(options: RestoreOptions) -> Classifier:
    device, dtype = _device_and_dtype(options)
    try:
        return load_classifier(options.classifier, device=device, dtype=dtype)
    except ClassifierWeightsError as error:
        raise UsageError(str(error)) from error


def _device_and_dtype(options: RestoreOptions) -> tuple[str, torch.dtype]:
    device = resolve_device(options.device)
    return device, getattr(torch, resolve_dtype(options.dtype, device))


def worker_seconds(options: RestoreOptions, *, images: float, megapixels: float) -> float:
    """How long one worker here takes for images that have so many megapixels together, if it restores them all.

    By medians of three, on noise: what the network takes grows with an image, what the classifier takes does not. On a
    GPU once the network is recorded, as it is for nearly all of a run.
    """
    if not images:
        return 0.0
    pa.default_memory_pool().release_unused()
    image = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    # One network at a time, since both together hold more than the plan of a million images.
    seconds = megapixels * _seconds_to_restore(image, options) / (image[..., 0].size / 1e6)
    if options.label == "auto":
        seconds += images * _seconds_to_classify(image, options) * (1 + options.second_look)
    return seconds


def _seconds_to_restore(image: NDArray[np.uint8], options: RestoreOptions) -> float:
    restorer = _load_restorer(options)
    keep_freed_memory()  # as a worker does
    before = RUNS_BEFORE + 1 if restorer.device.type == "cuda" else 1
    return _median_seconds(lambda: restorer.restore([image], restorer.prompts.keys[:1]), before=before)


def _seconds_to_classify(image: NDArray[np.uint8], options: RestoreOptions) -> float:
    """Of one image among as many as a worker asks about at once."""
    classifier, count = _load_classifier(options), WINDOW_IMAGES[resolve_device(options.device)]
    return _median_seconds(lambda: classifier.predict([image] * count)) / count


def _median_seconds(work: Callable[[], object], *, before: int = 1) -> float:
    """Of three calls, after so many that do not count."""
    for _ in range(before):
        work()
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds))
