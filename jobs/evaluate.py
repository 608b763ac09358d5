"""`dfpir evaluate`: a model on one of the field's test sets, by the published protocol.

RGB, whole images, results in floating point and clipped to [0, 1], data range 1; PSNR and SSIM as scikit-image
computes them by default (SSIM in uniform windows of 7 x 7 px), as for the published tables. Every image is restored
twice: under the prompt of its true label, and under the one that the classifier predicts.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from rich.table import Table
from scipy.stats import t
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from classifier.base import Classifier
from classifier.labels import Degradation
from jobs.datasets import Example
from jobs.errors import RunError, UsageError
from jobs.places import require_writable
from jobs.restore import code_version
from jobs.signals import signals_raise
from models import Restorer
from models.memory import is_out_of_memory
from models.registry import list_models
from models.weights import file_sha256
from pipeline.images import ImageFault, read_header
from pipeline.metrics import PSNR_CAP_DB, is_flat
from pipeline.prompting import decide, noise_prompt, prompts_for
from pipeline.records import Status, arrow_schema
from pipeline.synthesis import from_uint8

SSIM_WINDOW_PX = 7


@dataclass(frozen=True)
class Result:
    """One image of a test set: PSNR in dB, SSIM, of the input and of both restorations."""

    name: str
    label: str
    sigma_255: int | None
    height: int
    width: int
    predicted_label: str
    confidence: float
    """Of the predicted label."""
    predicted_status: str
    """What the pipeline would do: restored, copied or abstained. The last two score as their input."""
    predicted_prompt: str | None
    given_prompt: str
    psnr_input_db: float
    psnr_given_db: float
    psnr_predicted_db: float
    ssim_input: float
    ssim_given: float
    ssim_predicted: float

    @property
    def recognised(self) -> bool:
        """Whether it would be restored for what is wrong with it."""
        return self.predicted_label == self.label and self.predicted_status == Status.RESTORED


SCHEMA = arrow_schema(Result)
"""Of the file of results: a column's type does not hang on what a set has, so that several sets can be read as one."""


def scores(image: NDArray[np.float32], reference: NDArray[np.float32]) -> tuple[float, float]:
    """PSNR (dB) and SSIM of two H x W x 3 images in [0, 1].

    PSNR is at most `PSNR_CAP_DB`, which equal images have; one smaller than SSIM's window has no number for it.
    """
    with np.errstate(divide="ignore"):
        psnr = min(peak_signal_noise_ratio(reference, image, data_range=1), PSNR_CAP_DB)  # type: ignore[no-untyped-call]
    if min(reference.shape[:2]) < SSIM_WINDOW_PX:
        return float(psnr), math.nan
    ssim = structural_similarity(reference, image, data_range=1, channel_axis=2, win_size=SSIM_WINDOW_PX)  # type: ignore[no-untyped-call]
    return float(psnr), float(ssim)


def check_prompts(examples: Sequence[Example], restorer: Restorer) -> None:
    """Raises UsageError if the model lacks a prompt that an example's label may lead to."""
    wanted = dict.fromkeys(prompt for example in examples for prompt in _given_prompts(example))
    if missing := [prompt for prompt in wanted if prompt not in restorer.prompts.keys]:
        known = ", ".join(restorer.prompts.keys)
        raise UsageError(f"{restorer.name} has no prompt {', '.join(missing)}, which these images need; only {known}")


def _given_prompts(example: Example) -> tuple[str, ...]:
    """The prompts that its label may lead to: of noise the strength's, or all where only an estimate will tell it."""
    return prompts_for(example.label) if example.sigma_255 is None else (noise_prompt(example.sigma_255),)


def check_files(examples: Sequence[Example]) -> None:
    """Raises UsageError, before the first restoration, naming files whose header cannot be read and unequal pairs."""
    pairs = dict.fromkeys((example.reference, example.degraded) for example in examples)  # noise has three of each
    if faults := [fault for pair in pairs if (fault := _fault(*pair))]:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise UsageError(f"{len(faults)} of {len(pairs)} images cannot be evaluated: {'; '.join(faults[:5])}{more}")


def _fault(reference: Path, degraded: Path | None) -> str:
    sizes, faults = set(), []
    for path in (reference, degraded):
        if path is None:
            continue
        try:
            with path.open("rb") as file:
                header = read_header(file)
        except (OSError, ImageFault) as fault:
            faults.append(f"cannot read {path}: {fault}")
        else:
            # In any order: where EXIF turns one of them is known only after decoding.
            sizes.add(tuple(sorted((header.width, header.height))))
    if len(sizes) > 1:
        return f"{degraded} and its reference {reference} are of different sizes"
    return " and ".join(faults)


WHICH = ("dataset", "images", "weights_sha256", "classifier_sha256", "dtype")
"""What tells one evaluation from another; the same one, of files of the same contents, replaces its rows."""


def provenance(dataset: str, examples: Sequence[Example], restorer: Restorer, classifier: Classifier) -> dict[str, str]:
    """What made the results: test set, weights, precision, versions."""
    files = [(each.name, str(each.label), each.sigma_255, str(each.reference.absolute())) for each in examples]
    return {
        "dataset": dataset,
        "images": f"{len(examples)} (files and labels {hashlib.sha256(json.dumps(files).encode()).hexdigest()[:12]})",
        "model": restorer.name,
        "files_sha256": _contents(examples),
        "weights_sha256": restorer.sha256,
        "classifier": classifier.name,
        "classifier_sha256": classifier.sha256,
        "device": str(restorer.device),
        "dtype": str(restorer.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "code_version": code_version(),
    }


def _contents(examples: Sequence[Example]) -> str:
    """A digest of all files that are read."""
    paths = dict.fromkeys(path for each in examples for path in (each.reference, each.degraded) if path is not None)
    return hashlib.sha256("".join(map(file_sha256, paths)).encode()).hexdigest()


def require_own(path: Path, provenance: Mapping[str, str], *, which: Sequence[str]) -> None:
    """Raises UsageError if anything but results of the same `which` lies where results are to go."""
    if not path.exists():
        return
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowException):
        raise UsageError(f"{path} is there already, and no file of results; name another with --out") from None
    if differing := [key for key in which if metadata.get(key.encode()) != provenance[key].encode()]:
        raise UsageError(
            f"{path} has the results of another evaluation (another {', '.join(differing)}); move it away, or name "
            "another file with --out"
        )


def run(
    dataset: str,
    examples: Sequence[Example],
    restorer: Restorer,
    classifier: Classifier,
    target: Path,
    *,
    watch: Callable[[Iterator[Result]], Iterable[Result]],
    show: Callable[[list[Result]], None],
    tell: Callable[[str], None],
) -> None:
    """Evaluates the examples into `target`, a Parquet file with a row for each, and shows them before it is written.

    A file that cannot be read, or a signal, costs no result before it: those go into a `.partial.parquet` beside
    `target`, which `tell` is called with a word about. Results are taken from what `watch` makes of them.

    Raises:
        UsageError: anything but results of the same evaluation lies there; or as `evaluate`.
        RunError: as `evaluate`.
        InterruptedBySignalError: a signal asked for the end.
    """
    told = provenance(dataset, examples, restorer, classifier)
    partial = target.with_suffix(".partial.parquet")
    require_own(target, told, which=(*WHICH, "files_sha256"))
    require_own(partial, told, which=WHICH)  # of files of which one has been mended since, as a rule
    require_writable(target)
    rows = list[Result]()
    try:
        with signals_raise(goes_on=False):
            for row in watch(evaluate(examples, restorer, classifier)):
                rows.append(row)
    except BaseException:
        if rows:
            done = f"{len(rows)} of {len(examples)} rows"
            write(rows, partial, told | {"rows": done})
            tell(f"{done}: {partial.name}")
        raise
    show(rows)
    write(rows, target, told)
    partial.unlink(missing_ok=True)


def evaluate(examples: Sequence[Example], restorer: Restorer, classifier: Classifier) -> Iterator[Result]:
    """Results in the order of the examples.

    Raises:
        UsageError: a file cannot be read.
        RunError: an image does not fit into memory, whole as the protocol has it.
        KeyError: the model has no prompt for the label.
    """
    for example in examples:
        try:
            yield _result(example, restorer, classifier)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise RunError(f"{example.name} does not fit into memory, whole as the protocol has it") from error


def _result(example: Example, restorer: Restorer, classifier: Classifier) -> Result:
    degraded, reference = example.read()
    image, truth = (from_uint8(pixels) for pixels in (degraded, reference))
    prediction = classifier.predict([degraded])[0]
    sigma_255 = prediction.noise_sigma_255 if example.sigma_255 is None else example.sigma_255
    given = noise_prompt(sigma_255) if example.label is Degradation.NOISE else str(example.label)
    decision = decide(prediction, prompts=restorer.prompts.keys, is_flat=is_flat(degraded))
    by_prompt: dict[str | None, tuple[float, float]] = {None: scores(image, truth)}
    for prompt in (given, decision.prompt):
        if prompt is not None and prompt not in by_prompt:
            by_prompt[prompt] = scores(restorer.restore([image], [prompt])[0], truth)
    height, width = truth.shape[:2]
    return Result(
        name=example.name,
        label=str(example.label),
        sigma_255=example.sigma_255,
        height=height,
        width=width,
        predicted_label=str(prediction.label),
        confidence=prediction.confidence,
        predicted_status=str(decision.status),
        predicted_prompt=decision.prompt,
        given_prompt=given,
        psnr_input_db=by_prompt[None][0],
        psnr_given_db=by_prompt[given][0],
        psnr_predicted_db=by_prompt[decision.prompt][0],
        ssim_input=by_prompt[None][1],
        ssim_given=by_prompt[given][1],
        ssim_predicted=by_prompt[decision.prompt][1],
    )


def interval(values: Sequence[float]) -> float:
    """Half of the 95 % confidence interval of a mean, by Student's t; not a number for fewer than two values."""
    if len(values) < 2:
        return math.nan
    return float(t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))


def published(dataset: str, sigma_255: int | None) -> dict[str, float]:
    """PSNR in dB that the paper reports on a test set, by model."""
    noise = f"_noise{sigma_255}" if sigma_255 is not None else ""
    key = f"published_{dataset}{noise}_db"
    return {spec.name: spec.quality[key] for spec in list_models() if key in spec.quality}


def table(dataset: str, results: Sequence[Result]) -> Table:
    """Means with 95 % intervals, a row for each noise level, with what was published beside them."""
    shown = Table(box=None, padding=(0, 1, 0, 0), title="right: the true label, surely enough to be restored")
    if small := {result.name for result in results if math.isnan(result.ssim_input)}:
        of = len({result.name for result in results})
        shown.caption = f"SSIM leaves out images with a side of less than {SSIM_WINDOW_PX} px: {len(small)} of {of}"
    for column in ("set", "images", "", "input", "label given", "predicted", "published"):
        shown.add_column(column, justify="left" if column == "set" else "right")
    for sigma_255 in dict.fromkeys(result.sigma_255 for result in results):
        group = [result for result in results if result.sigma_255 == sigma_255]
        recognised = sum(result.recognised for result in group)
        name = dataset if sigma_255 is None else f"{dataset} {sigma_255}"
        reported = "\n".join(
            f"{model.removeprefix('dfpir-')} {psnr:.2f}" for model, psnr in published(dataset, sigma_255).items()
        )

        def cells(measure: str, digits: int, group: list[Result] = group) -> list[str]:
            kinds = ("input", "given", "predicted")
            unit = "_db" if measure == "psnr" else ""
            columns = [[getattr(result, f"{measure}_{kind}{unit}") for result in group] for kind in kinds]
            columns = [[value for value in column if not math.isnan(value)] or [math.nan] for column in columns]
            either_side = [f" ±{interval(values):.{digits}f}" if len(values) > 1 else "" for values in columns]
            return [f"{np.mean(v):.{digits}f}{sides}" for v, sides in zip(columns, either_side, strict=True)]

        shown.add_row(name, str(len(group)), "PSNR", *cells("psnr", 2), reported)
        shown.add_row("", f"{recognised} right", "SSIM", *cells("ssim", 3), "")
    return shown


def write(results: Sequence[Result], path: Path, provenance: dict[str, str]) -> None:
    """One row per image as Parquet, with what made them in the file's metadata."""
    rows = pa.Table.from_pylist([asdict(result) for result in results], schema=SCHEMA)
    unfinished = path.with_suffix(".unfinished")
    try:
        pq.write_table(rows.replace_schema_metadata(provenance), unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
