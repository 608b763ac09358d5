"""The classifiers' weights files, and what is known of them before a network is built: timm takes seconds to import."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from classifier.calibration import require_usable
from classifier.errors import ClassifierWeightsError
from classifier.labels import LABELS, Degradation
from classifier.view import ViewSettings

FORMAT = "dfpir-classifier-1"
SHIPPED = Path(__file__).parent / "shipped"


@dataclass(frozen=True, kw_only=True)
class WeightsFile:
    """What a file says of itself."""

    path: Path
    sha256: str
    architecture: Mapping[str, Any]
    """Of the network, which alone can tell whether it fits."""
    view: ViewSettings
    temperature: float
    thresholds: Mapping[Degradation, float]
    licence: str
    provenance: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The file's, without its ending."""
        return self.path.stem


def file_sha256(path: Path) -> str:
    """The sha256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shipped_names() -> list[str]:
    """Names of the classifiers that come with the project."""
    return sorted(path.stem for path in SHIPPED.glob("*.safetensors"))


def find_weights(name_or_path: str | Path) -> Path:
    """The file of a shipped classifier, or the given path.

    Raises:
        ClassifierWeightsError: no shipped classifier has this name and no file lies there.
    """
    shipped = SHIPPED / f"{name_or_path}.safetensors"
    if isinstance(name_or_path, str) and name_or_path in shipped_names():
        return shipped
    path = Path(name_or_path)
    if path.is_file():
        return path
    names = ", ".join(shipped_names()) or "none"
    raise ClassifierWeightsError(
        f"no classifier {str(name_or_path)!r}: expected the name of a shipped one ({names}) or the path of a "
        ".safetensors file; nothing is downloaded"
    )


def _check_card(path: Path, sha256: str) -> None:
    card_path = path.with_suffix(".json")
    if not card_path.exists():
        if path.parent == SHIPPED:
            raise ClassifierWeightsError(f"{card_path} is missing: restore it from the project's repository")
        return
    try:
        expected = json.loads(card_path.read_text())["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ClassifierWeightsError(f"{card_path} is not a classifier's card with a `sha256`: {error!r}") from error
    if sha256 != expected:
        raise ClassifierWeightsError(
            f"{path} has sha256 {sha256}, but its card {card_path.name} says {expected}: the file is damaged or "
            "was replaced; fetch both again, or remove the card of weights of your own"
        )


def _described(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if metadata.get("format") != FORMAT:
        raise ClassifierWeightsError(
            f"{path} is not a classifier of this project: its format is {metadata.get('format')!r}, not {FORMAT!r}"
        )
    try:
        description: dict[str, Any] = json.loads(metadata["classifier"])
        missing = {"labels", "architecture", "view", "temperature", "thresholds", "licence"} - description.keys()
    except (ValueError, KeyError, AttributeError, RecursionError) as error:
        raise ClassifierWeightsError(f"{path} has no readable description in its metadata: {error!r}") from error
    if missing:
        raise ClassifierWeightsError(f"the description in {path} lacks {', '.join(sorted(missing))}")
    if description["labels"] != [str(label) for label in LABELS]:
        raise ClassifierWeightsError(
            f"{path} was trained for the labels {description['labels']}, this version has {list(map(str, LABELS))}"
        )
    return description


def read_weights_file(name_or_path: str | Path, *, check_card: bool = True) -> WeightsFile:
    """Finds a weights file and checks what can be checked without its network.

    Raises:
        ClassifierWeightsError: the file is not there, is none of ours, has another hash than its card says, or its
            description is at fault.
    """
    path = find_weights(name_or_path)
    sha256 = file_sha256(path)
    if check_card:
        _check_card(path, sha256)
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        hint = (
            "; a training's checkpoint is exported by `dfpir train classifier CONFIG OUT --export FILE --licence SPDX`"
        )
        raise ClassifierWeightsError(
            f"{path} is not a readable .safetensors file{hint if path.suffix == '.pt' else ''}: {error}"
        ) from error
    description = _described(path, metadata)
    try:
        file = WeightsFile(
            path=path,
            sha256=sha256,
            architecture=dict(description["architecture"]),
            view=ViewSettings(**description["view"]),
            temperature=float(description["temperature"]),
            thresholds={label: float(description["thresholds"][label]) for label in LABELS},
            licence=description["licence"],
            provenance=description.get("provenance", {}),
        )
        require_usable(file.temperature, file.thresholds)
    except (TypeError, ValueError, KeyError) as error:
        raise ClassifierWeightsError(f"{path} describes a classifier that cannot be used: {error}") from error
    return file
