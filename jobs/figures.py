"""`dfpir figures`: what a model and a classifier make of photographs, as pictures (PNG and SVG).

Confusion matrix, reliability diagram, t-SNE of latent features by degradation, and a sheet of before and after.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.manifold import TSNE
from torch import Tensor

from classifier.base import Classifier, Prediction
from classifier.calibration import calibration_error
from classifier.labels import LABELS, Degradation
from jobs.classifier_samples import as_filed, draw_damaged
from jobs.datasets import as_restored
from jobs.errors import UsageError
from jobs.text import harmless
from jobs.training_data import Photographs, photographs_in
from models import Restorer
from models.weights import Checkpoint
from pipeline.images import as_grey_as
from pipeline.metrics import is_flat
from pipeline.prompting import decide, noise_prompt

log = logging.getLogger(__name__)

LATENT_PX = 192
"""Side of the piece from the middle of a picture whose latent features are shown."""
RELIABILITY_BINS = 10


@dataclass(frozen=True)
class Labelled:
    """A picture, H x W x 3 uint8, and what is wrong with it."""

    pixels: NDArray[np.uint8]
    label: Degradation


def pictures(folder: Path, *, per_label: int) -> Iterator[Labelled]:
    """Pictures of known labels, each read or made when it is asked for.

    Args:
        folder: with a folder for each label, whose pictures are taken as they are; or clean photographs, which are
            degraded as for training.
        per_label: at most so many of each label.

    Raises:
        UsageError: there is no picture in it, or one cannot be read.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder")
    inside = {path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")}
    places = {label: folder / str(label) for label in LABELS if str(label) in inside}
    known = f"the labels are {', '.join(LABELS)}"
    if left_out := sorted(inside - set(map(str, places))):
        names = harmless(", ".join(left_out))
        log.warning("left out folders of %s that are named after no label: %s; %s", folder, names, known)
    if places:
        paths = [(path, label) for label, place in places.items() for path in photographs_in([place])[:per_label]]
        if not paths:
            raise UsageError(f"the folders of labels in {folder} hold no pictures")
        for path, label in paths:
            yield Labelled(as_restored(path), label)
        return
    photographs = Photographs.clean([folder])
    rng = np.random.default_rng(0)
    for label in LABELS:
        for _ in range(per_label):
            yield Labelled(as_filed(draw_damaged(photographs, label, rng), rng), label)


def confusion(truth: Sequence[Degradation], predictions: Sequence[Prediction]) -> Figure:
    """Counts of each predicted label (columns) for each true one (rows), with the share of the row as its shade."""
    rows = [label for label in LABELS if label in truth]
    counts = np.zeros((len(rows), len(LABELS)), dtype=int)
    for label, prediction in zip(truth, predictions, strict=True):
        counts[rows.index(label), LABELS.index(prediction.label)] += 1
    figure, axes = _figure(6)
    shares = counts / counts.sum(axis=1, keepdims=True)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(LABELS)), LABELS, rotation=45, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    for (row, column), count in np.ndenumerate(counts):
        if count:
            colour = "white" if shares[row, column] > 0.6 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=colour)
    right = sum(label is prediction.label for label, prediction in zip(truth, predictions, strict=True))
    axes.set_title(f"{right} of {len(truth)} right")
    return figure


def reliability(truth: Sequence[Degradation], predictions: Sequence[Prediction]) -> Figure:
    """How often predictions of each confidence are right, and how many there are.

    All labels count alike, however many pictures each has; a classifier's card has them as often as they are expected
    in use.
    """
    confidence = np.array([prediction.confidence for prediction in predictions])
    right = np.array([label is prediction.label for label, prediction in zip(truth, predictions, strict=True)])
    indices = np.array([LABELS.index(label) for label in truth])
    weights = 1 / np.bincount(indices)[indices]
    edges = np.linspace(0, 1, RELIABILITY_BINS + 1)
    bins = np.clip(np.digitize(confidence, edges) - 1, 0, RELIABILITY_BINS - 1)
    figure, axes = _figure(5)
    axes.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1)
    for number in np.unique(bins):
        inside = bins == number
        share = float(np.average(right[inside], weights=weights[inside]))
        axes.bar(edges[number], share, width=1 / RELIABILITY_BINS, align="edge", color="tab:blue", edgecolor="white")
        axes.text(edges[number] + 0.5 / RELIABILITY_BINS, share + 0.01, str(inside.sum()), ha="center", fontsize=8)
    probability = np.array([[prediction.probabilities[label] for label in LABELS] for prediction in predictions])
    error = calibration_error(probability, indices, weights=weights, bins=RELIABILITY_BINS)
    axes.set_title(f"expected calibration error {error:.3f}, all labels alike")
    axes.set_xlabel("confidence")
    axes.set_ylabel("share that is right")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.08)
    return figure


def middle(picture: Labelled, multiple: int) -> Labelled:
    """A copy of the square from a picture's middle, of a side of a multiple of so many pixels, `LATENT_PX` at most."""
    height, width = picture.pixels.shape[:2]
    side = min(LATENT_PX, height, width) // multiple * multiple
    top, left = (height - side) // 2, (width - side) // 2
    return replace(picture, pixels=picture.pixels[top : top + side, left : left + side].copy())


@torch.inference_mode()
def latent_features(checkpoint: Checkpoint, chosen: Sequence[tuple[Labelled, str]]) -> dict[str, NDArray[np.float32]]:
    """Means over pixels of the latent features, N x C, before and after the perturbation by each picture's prompt.

    The sides of the pictures are multiples of what the network needs.
    """
    network, bank = checkpoint.network.eval(), checkpoint.prompts
    kept: dict[str, list[Tensor]] = {"before": [], "after": []}

    def note(module: object, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        kept["before"].append(inputs[0].mean(dim=(2, 3)))
        kept["after"].append(output.mean(dim=(2, 3)))

    hook = network.latent_shuffle_channel.register_forward_hook(note)
    for picture, prompt in chosen:
        pixels = torch.from_numpy(picture.pixels).permute(2, 0, 1)[None]
        network(pixels.float() / 255, bank.embeddings[bank.indices([prompt])])
    hook.remove()
    return {name: torch.cat(parts).numpy() for name, parts in kept.items()}


def latent_map(features: Mapping[str, NDArray[np.float32]], labels: Sequence[Degradation]) -> Figure:
    """t-SNE (van der Maaten and Hinton, 2008) of standardised features before and after the perturbation, by label."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    for axes, (name, points) in zip(figure.subplots(1, 2), features.items(), strict=True):
        scaled = (points - points.mean(axis=0)) / np.maximum(points.std(axis=0), 1e-6)
        perplexity = min(30.0, (len(points) - 1) / 3)
        places = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(scaled)
        for label in dict.fromkeys(labels):
            inside = np.array([each is label for each in labels])
            axes.scatter(*places[inside].T, s=14, label=str(label))
        axes.set_title(f"latent features {name} the perturbation")
        axes.set_xticks([])
        axes.set_yticks([])
    axes.legend()
    return figure


def sheet(examples: Sequence[tuple[Labelled, Prediction]], restorer: Restorer) -> Figure:
    """Pictures as they are and as `dfpir restore` would leave them, with the decision."""
    figure = Figure(figsize=(2.4 * len(examples), 5), layout="constrained")
    columns = figure.subplots(2, len(examples), squeeze=False).T
    for (before, after), (picture, prediction) in zip(columns, examples, strict=True):
        decision = decide(prediction, prompts=restorer.prompts.keys, is_flat=is_flat(picture.pixels))
        result = picture.pixels
        if decision.prompt is not None:
            result = as_grey_as(picture.pixels, restorer.restore([picture.pixels], [decision.prompt])[0])
        for axes, pixels in ((before, picture.pixels), (after, result)):
            axes.imshow(pixels)
            axes.axis("off")
        before.set_title(str(picture.label), fontsize=9)
        after.set_title(decision.prompt or str(decision.status), fontsize=9)
    return figure


def draw(
    found: Iterable[Labelled], restorer: Restorer, classifier: Classifier, checkpoint: Checkpoint
) -> dict[str, Figure]:
    """All figures by name. Only the first picture of each label is kept whole."""
    multiple = checkpoint.network.config.size_multiple
    truth: list[Degradation] = []
    predictions: list[Prediction] = []
    first: dict[Degradation, tuple[Labelled, Prediction]] = {}
    usable: list[tuple[Labelled, str]] = []
    small = 0
    for picture in found:
        prediction = classifier.predict([picture.pixels])[0]
        truth.append(picture.label)
        predictions.append(prediction)
        first.setdefault(picture.label, (picture, prediction))
        noisy = picture.label is Degradation.NOISE
        prompt = noise_prompt(prediction.noise_sigma_255) if noisy else str(picture.label)
        if min(picture.pixels.shape[:2]) < multiple:
            small += 1
        elif prompt in checkpoint.prompts.keys:
            usable.append((middle(picture, multiple), prompt))
    if small:
        log.warning("latent features leave out %d pictures with a side of less than %d px", small, multiple)
    figures = {
        "confusion": confusion(truth, predictions),
        "reliability": reliability(truth, predictions),
        "before-after": sheet(list(first.values()), restorer),
    }
    if len(usable) > 3 and len({picture.pixels.tobytes() for picture, _ in usable}) > 1:
        figures["latent"] = latent_map(latent_features(checkpoint, usable), [picture.label for picture, _ in usable])
    else:
        log.warning(
            "no figure of latent features: t-SNE needs more than 3 pictures, not all alike, and %d can be used",
            len(usable),
        )
    return figures


def require_apart(out: Path, photographs: Path) -> None:
    """Raises UsageError if figures written there would be pictures to be drawn the next time."""
    if out.resolve().is_relative_to(photographs.resolve()):
        raise UsageError(f"{out} lies in {photographs}, whose pictures are drawn; name another folder for the figures")


def save(figures: Mapping[str, Figure], out: Path) -> list[Path]:
    """Writes every figure as PNG and SVG, and returns the files; one of other photographs, not drawn now, goes."""
    out.mkdir(parents=True, exist_ok=True)
    if "latent" not in figures:
        for kind in ("png", "svg"):
            (out / f"latent.{kind}").unlink(missing_ok=True)
    paths = [out / f"{name}.{kind}" for name in figures for kind in ("png", "svg")]
    for path in paths:
        figures[path.stem].savefig(path, dpi=150)
    return paths


def _figure(width: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, 5), layout="constrained")
    return figure, figure.subplots()
