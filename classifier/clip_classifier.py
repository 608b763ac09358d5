"""Zero-shot backend: which sentence of what may be wrong does a CLIP model find nearest to a photograph?

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021. CLIP sees 224 x 224
pixels, in which noise and rain are lost, so that it looks at native crops besides the whole picture. Weights come from
a local file; nothing is downloaded.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from classifier import CLIP_PREFIX
from classifier.base import Classifier
from classifier.calibration import LABEL_RISKS, label_probabilities, require_usable
from classifier.clip_weights import OPENAI, Tokenizer, load_clip, require_file
from classifier.errors import ClassifierWeightsError
from classifier.files import file_sha256
from classifier.labels import LABELS, Degradation
from classifier.view import Views, ViewSettings

CROPS = 3

SENTENCES: Mapping[Degradation, tuple[str, ...]] = {
    Degradation.NOISE: (
        "a noisy photo",
        "a photo with heavy grain",
        "a photo with sensor noise from a high ISO setting",
    ),
    Degradation.RAIN: ("a photo with rain streaks", "a photo taken in heavy rain", "a rainy photo"),
    Degradation.HAZE: ("a hazy photo", "a foggy photo with low contrast", "a photo taken through mist or smog"),
    Degradation.BLUR: ("a motion-blurred photo", "a photo blurred by camera shake", "a photo with motion blur"),
    Degradation.LOWLIGHT: ("an under-exposed photo", "a photo taken in low light", "a very dark photo"),
    Degradation.CLEAN: ("a clean, sharp photo", "a well-exposed photo of high quality", "a flawless, clear photo"),
    Degradation.OTHER: ("a photo with JPEG artifacts", "an out-of-focus photo", "a pixelated photo of low resolution"),
}
"""What stands for each label: the mean direction of its sentences."""


@dataclass(frozen=True)
class ClipCalibration:
    """What `jobs.calibrate_clip` writes beside CLIP weights.

    Without it, probabilities are those of CLIP's own temperature, and every label that changes a photograph needs the
    highest threshold there is.
    """

    architecture: str = OPENAI
    """The name that open_clip has for it."""
    temperature: float = 1.0
    bias: Mapping[Degradation, float] = field(default_factory=lambda: dict.fromkeys(LABELS, 0.0))
    """Added to the logits: some sentences are nearer to every photograph than others."""
    thresholds: Mapping[Degradation, float] = field(
        default_factory=lambda: {label: LABEL_RISKS[label].unfitted_threshold for label in LABELS}
    )
    quality: Mapping[str, Any] = field(default_factory=dict)
    """As measured on samples that were not fitted."""

    @staticmethod
    def path(weights: Path) -> Path:
        """Where the calibration of these weights lies."""
        return weights.with_name(weights.name + ".dfpir.json")

    def write(self, weights: Path) -> Path:
        """Writes it beside the weights; returns the file."""
        path = self.path(weights)
        path.write_text(json.dumps({"sha256": file_sha256(weights)} | asdict(self), indent=2) + "\n")
        return path

    @classmethod
    def read(cls, weights: Path, sha256: str) -> "ClipCalibration":
        """The calibration of weights with this hash; the default where none lies beside them.

        Raises:
            ClassifierWeightsError: it is of other weights, or cannot be read.
        """
        path = cls.path(weights)
        if not path.exists():
            return cls()
        try:
            found = json.loads(path.read_text())
            if found.pop("sha256") != sha256:
                raise ValueError("it belongs to other weights")
            if missing := {each.name for each in fields(cls)} - found.keys():
                raise ValueError(f"it lacks {', '.join(sorted(missing))}")
            if not isinstance(found["quality"], dict):
                raise ValueError(f"its quality is {found['quality']!r}, no figures by name")
            for name in ("bias", "thresholds"):
                found[name] = {label: float(found[name][label]) for label in LABELS}
            calibration = cls(**found)
            require_usable(calibration.temperature, calibration.thresholds)
            if not np.isfinite(list(calibration.bias.values())).all():
                raise ValueError("a bias is not finite")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ClassifierWeightsError(
                f"{path} is no calibration of {weights.name}: {error!r}; run jobs.calibrate_clip again, or remove it"
            ) from error
        return calibration


class ClipClassifier(Classifier):
    """`name` is `clip:` and the file's name, `sha256` that of weights and calibration together."""

    def __init__(
        self,
        weights: Path,
        *,
        calibration: ClipCalibration | None = None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Loads weights that open_clip reads.

        Args:
            weights: the file.
            calibration: in place of what lies beside the weights.
            device: of the image tower.
            dtype: of the image tower.

        Raises:
            ClassifierWeightsError: open_clip is not installed, or weights or calibration are missing or at fault.
        """
        require_file(weights)
        sha256 = file_sha256(weights)
        self.calibration = calibration or ClipCalibration.read(weights, sha256)
        network, tokenize = load_clip(weights, self.calibration.architecture)
        self.name = CLIP_PREFIX + weights.name
        described = json.dumps(asdict(self.calibration) | {"sentences": SENTENCES}, sort_keys=True)
        self.sha256 = hashlib.sha256((sha256 + described).encode()).hexdigest()
        self.thresholds = self.calibration.thresholds
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self._tower = network.visual
        try:
            self._directions = _directions(network, tokenize)
            self.view, self._mean, self._std = _preparation(network)
            likeness = self.logits(self.take_views(np.zeros((1, 1, 3), np.uint8)))
            if not np.isfinite(likeness).all():
                raise ValueError("its weights are not finite")
        except Exception as error:  # models of open_clip have little in common
            raise ClassifierWeightsError(
                f"CLIP {self.calibration.architecture} with {weights} cannot be used: {shorten(repr(error), 300)}"
            ) from error
        self.device, self.dtype = torch.device(device), dtype
        self._tower.to(self.device, dtype)

    @torch.inference_mode()
    def logits(self, views: Views) -> NDArray[np.float64]:
        """Likeness to each label's sentences, in the order of `LABELS`: half the whole picture, half the crops."""
        pixels = torch.from_numpy(np.concatenate([views.thumbnail[None], views.crops])).permute(0, 3, 1, 2)
        normal = (pixels.float() / 255 - self._mean) / self._std
        with torch.autocast(self.device.type, enabled=False):
            found: Tensor | tuple[Tensor, Tensor] = self._tower(normal.to(self.device, self.dtype))
        features = found[0] if isinstance(found, tuple) else found  # CoCa's tower gives what its captions need as well
        whole, *crops = F.normalize(features.float().cpu(), dim=1) @ self._directions.T
        likeness: NDArray[np.float64] = ((whole + torch.stack(crops).mean(dim=0)) / 2).double().numpy()
        return likeness

    def probabilities(self, views: Sequence[Views]) -> list[dict[Degradation, float]]:
        """See `Classifier.probabilities`."""
        bias = np.array([self.calibration.bias[label] for label in LABELS])
        return [label_probabilities(self.logits(each) + bias, self.calibration.temperature) for each in views]


@torch.inference_mode()
def _directions(network: Any, tokenize: Tokenizer) -> Tensor:
    """What a picture's direction is multiplied with to give its likeness to each label: labels x features."""
    words = [tokenize(SENTENCES[label]) for label in LABELS]
    means = [network.encode_text(tokens, normalize=True).mean(dim=0) for tokens in words]
    scaled: Tensor = F.normalize(torch.stack(means), dim=1) * network.logit_scale.exp()
    return scaled


def _preparation(network: Any) -> tuple[ViewSettings, Tensor, Tensor]:
    """Sizes of the views that a model sees, and the mean and deviation of each colour that it was trained with."""
    import open_clip

    settings = open_clip.get_model_preprocess_cfg(network)
    mean, deviation = (torch.tensor(settings[key]).view(3, 1, 1) for key in ("mean", "std"))
    size = settings["size"]
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise ValueError(f"it sees pictures of {height} x {width} px; square ones are needed")
    return ViewSettings(crop_px=height, crops=CROPS, thumbnail_px=height), mean, deviation
