"""Which label leads to which prompt: decided here and nowhere else."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from classifier.labels import Degradation

if TYPE_CHECKING:
    from classifier.base import Prediction
    from pipeline.records import Status

NOISE_CUT_POINTS_255: tuple[float, float] = (19.0, 36.0)
"""Estimated sigma (0..255 scale) from which noise is restored under `noise25`, and under `noise50`."""

NOISE_PROMPTS = ("noise15", "noise25", "noise50")

FORCED_LABELS: tuple[Degradation, ...] = (
    Degradation.NOISE,
    Degradation.RAIN,
    Degradation.HAZE,
    Degradation.BLUR,
    Degradation.LOWLIGHT,
)
"""What `--label` may name besides `auto`."""


@dataclass(frozen=True)
class Decision:
    """What is to be done with an image, and why in plain words.

    `status` is the one that a faultless end leads to: restored, copied or abstained. `prompt` is the key to
    restore under, None if nothing is restored.
    """

    status: "Status"
    label: Degradation
    prompt: str | None
    reason: str


def noise_prompt(sigma_255: float) -> str:
    """The prompt key for noise of a standard deviation on the 0..255 scale."""
    low, high = NOISE_CUT_POINTS_255
    if sigma_255 < low:
        return "noise15"
    return "noise25" if sigma_255 < high else "noise50"


def prompts_for(label: Degradation) -> tuple[str, ...]:
    """The prompt keys that a label may lead to; none for `clean` and `other`."""
    if label is Degradation.NOISE:
        return NOISE_PROMPTS
    return (str(label),) if label in FORCED_LABELS else ()


def parse_label(text: str) -> tuple[str, float | None]:
    """Reads `auto`, `noise`, `noise:SIGMA`, `rain`, `haze`, `blur` or `lowlight`: the name, and SIGMA if it is given.

    Raises ValueError naming the valid labels, or what is wrong with SIGMA (0 to 255).
    """
    name, colon, number = text.partition(":")
    valid = ["auto", "noise[:SIGMA]", *(str(label) for label in FORCED_LABELS if label is not Degradation.NOISE)]
    if name not in {"auto", *FORCED_LABELS}:
        raise ValueError(f"unknown label {text!r}; choose {', '.join(valid)}")
    if not colon:
        return name, None
    if name != Degradation.NOISE:
        raise ValueError(f"label {text!r}: only noise takes a number, as in noise:25")
    try:
        sigma_255 = float(number)
    except ValueError:
        sigma_255 = float("nan")
    if not 0 <= sigma_255 <= 255:
        raise ValueError(f"label {text!r}: sigma must be a number from 0 to 255, as in noise:25")
    return name, sigma_255


def decide(
    prediction: "Prediction",
    *,
    prompts: Collection[str],
    min_confidence: float | None = None,
    is_flat: bool = False,
) -> Decision:
    """What the prediction leads to, given the keys of the model's prompts.

    Args:
        prediction: unsure ones are abstained whatever their label.
        prompts: keys of the model's.
        min_confidence: replaces the classifier's own thresholds.
        is_flat: whether the picture is of one tone or of a few flat ones (`pipeline.metrics.is_flat`): no photograph.
    """
    # What training needs imports this module, and not pyarrow, which comes with the records.
    from pipeline.records import Status

    label, confidence = prediction.label, prediction.confidence
    least = prediction.threshold if min_confidence is None else min_confidence
    if not confidence >= least:
        reason = f"best guess {label} only {_floored(confidence, 2)}, below the threshold {least:g}"
        return Decision(Status.ABSTAINED, label, None, reason)
    seen = f"{label} with probability {confidence:.2f}"
    if label is Degradation.CLEAN:
        return Decision(Status.COPIED, label, None, f"{seen}: kept as it was")
    if is_flat:
        reason = f"{seen}, but it is of one tone or of a few flat ones: nothing to restore"
        return Decision(Status.ABSTAINED, label, None, reason)
    sigma_255 = prediction.noise_sigma_255
    return _with_prompt(label, sigma_255, f"estimated sigma {_floored(sigma_255, 1)}", seen, prompts)


def _floored(value: float, digits: int) -> str:
    """So many digits behind the point, and no more than it is: it may be just below a threshold or cut point."""
    if not math.isfinite(value):
        return str(value)
    return f"{math.floor(10**digits * value + 1e-9) / 10**digits:.{digits}f}"


def decide_forced(
    label: str, *, sigma_255: float | None, estimated_sigma_255: float, prompts: Collection[str]
) -> Decision:
    """What a forced label leads to; noise without a given sigma goes by the estimated one (both on the 0..255 scale).

    Raises ValueError for `auto`, which forces nothing, and for an unknown label.
    """
    forced = Degradation(label)
    if sigma_255 is None:
        sigma_255, origin = estimated_sigma_255, f"estimated sigma {_floored(estimated_sigma_255, 1)}"
    else:
        origin = f"given sigma {sigma_255:g}"
    return _with_prompt(forced, sigma_255, origin, f"{forced} as given by --label", prompts)


def _with_prompt(label: Degradation, sigma_255: float, origin: str, seen: str, prompts: Collection[str]) -> Decision:
    """Restored under the label's prompt, or abstained where there is none."""
    from pipeline.records import Status

    if not prompts_for(label):
        return Decision(Status.ABSTAINED, label, None, f"{seen}: damage without a prompt, kept for review")
    if label is Degradation.NOISE:
        prompt = noise_prompt(sigma_255)
        reason = f"{seen}; {origin} leads to prompt {prompt}"
    else:
        prompt, reason = str(label), f"{seen}: restored under prompt {label}"
    if prompt not in prompts:
        return Decision(Status.ABSTAINED, label, None, f"{seen}: the model has no prompt {prompt}, kept for review")
    return Decision(Status.RESTORED, label, prompt, reason)
