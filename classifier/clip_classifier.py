"""Zero-shot backend: which sentence of what may be wrong does a CLIP model find nearest to a photograph?

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021. CLIP sees 224 x 224
pixels, in which noise and rain are lost, so that it looks at native crops besides the whole picture. Weights come from
a local file; nothing is downloaded.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from classifier import CLIP_PREFIX
from classifier.base import Classifier
from classifier.calibration import HIGHEST_THRESHOLD, LABEL_RISKS, label_probabilities
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

    architecture: str = "ViT-B-32-quickgelu"
    """The name that open_clip has for it."""
    temperature: float = 1.0
    bias: Mapping[Degradation, float] = field(default_factory=lambda: dict.fromkeys(LABELS, 0.0))
    """Added to the logits: some sentences are nearer to every photograph than others."""
    thresholds: Mapping[Degradation, float] = field(
        default_factory=lambda: {
            label: HIGHEST_THRESHOLD if LABEL_RISKS[label].precision else LABEL_RISKS[label].lowest_threshold
            for label in LABELS
        }
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
            for name in ("bias", "thresholds"):
                found[name] = {label: float(found[name][label]) for label in LABELS}
            return cls(**found)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ClassifierWeightsError(
                f"{path} is no calibration of {weights.name}: {error!r}; run jobs.calibrate_clip again, or remove it"
            ) from error


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
        try:
            import open_clip
        except ImportError as error:
            raise ClassifierWeightsError("CLIP needs the package open_clip_torch; install it") from error
        if not weights.is_file():
            raise ClassifierWeightsError(f"{weights}: no such file; name CLIP weights that are on this machine")
        sha256 = file_sha256(weights)
        self.calibration = calibration or ClipCalibration.read(weights, sha256)
        architecture = self.calibration.architecture
        try:
            network: Any = open_clip.create_model(architecture, pretrained=str(weights), precision="fp32")
        except Exception as error:  # open_clip raises whatever its loaders raise
            raise ClassifierWeightsError(
                f"{weights} does not hold the weights of CLIP {architecture}: {error}"
            ) from error
        self.name = CLIP_PREFIX + weights.name
        described = json.dumps(asdict(self.calibration) | {"sentences": SENTENCES}, sort_keys=True)
        self.sha256 = hashlib.sha256((sha256 + described).encode()).hexdigest()
        self.thresholds = self.calibration.thresholds
        self.device, self.dtype = torch.device(device), dtype
        with torch.inference_mode():
            tokenize = open_clip.get_tokenizer(architecture)
            directions = [
                network.eval().encode_text(tokenize(list(SENTENCES[label])), normalize=True).mean(dim=0)
                for label in LABELS
            ]
            self._directions = F.normalize(torch.stack(directions), dim=1) * network.logit_scale.exp()
        settings = open_clip.get_model_preprocess_cfg(network)
        self._mean, self._std = (torch.tensor(settings[key]).view(3, 1, 1) for key in ("mean", "std"))
        size = settings["size"]
        side = int(size if isinstance(size, int) else size[0])
        self.view = ViewSettings(crop_px=side, crops=CROPS, thumbnail_px=side)
        self._tower = network.visual.to(self.device, dtype)

    @torch.inference_mode()
    def logits(self, views: Views) -> NDArray[np.float64]:
        """Likeness to each label's sentences, in the order of `LABELS`: half the whole picture, half the crops."""
        pixels = torch.from_numpy(np.concatenate([views.thumbnail[None], views.crops])).permute(0, 3, 1, 2)
        normal = (pixels.float() / 255 - self._mean) / self._std
        features: Tensor = self._tower(normal.to(self.device, self.dtype)).float().cpu()
        whole, *crops = F.normalize(features, dim=1) @ self._directions.T
        likeness: NDArray[np.float64] = ((whole + torch.stack(crops).mean(dim=0)) / 2).double().numpy()
        return likeness

    def probabilities(self, views: Sequence[Views]) -> list[dict[Degradation, float]]:
        """See `Classifier.probabilities`."""
        bias = np.array([self.calibration.bias[label] for label in LABELS])
        return [label_probabilities(self.logits(each) + bias, self.calibration.temperature) for each in views]
