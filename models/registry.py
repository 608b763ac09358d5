"""The models that this release knows: shipped ones, each beside its card, and released ones to be given by path.

A card is the JSON file `models/shipped/<name>.json` next to `<name>.safetensors`; `write_card` makes it. Fields:

- `sha256`: of the weights, in hexadecimal; loading by name refuses another file;
- `licence`: SPDX identifier; `parameters`: their number; `prompts`: list of keys;
- `size_multiple`: padding granularity in pixels; `description`: one line;
- `quality`: measured figures, each named after data and unit, such as `{"cbsd68_noise25_gain_db": 4.2}`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.errors import WeightsError
from models.prompts import PUBLISHED_SENTENCES, THREE_TASKS
from models.weights import Checkpoint, load_checkpoint

SHIPPED_DIR = Path(__file__).parent / "shipped"


@dataclass(frozen=True)
class ModelSpec:
    """All that is needed to find and trust a set of weights."""

    name: str
    file: Path | None
    """None for a model that is known but not shipped."""
    sha256: str | None
    licence: str
    parameters: int
    prompts: tuple[str, ...]
    size_multiple: int
    """Both sides of an image are padded to a multiple of this many pixels."""
    description: str
    quality: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Resolved:
    """A weights file, and its spec where it was asked for by name."""

    path: Path
    spec: ModelSpec | None

    def load(self) -> Checkpoint:
        """The weights; raises WeightsError if they are damaged, or of another hash than registered."""
        return load_checkpoint(self.path, expected_sha256=self.spec.sha256 if self.spec else None)


_RELEASED_LICENCE = "see the authors' release"
KNOWN: tuple[ModelSpec, ...] = (
    ModelSpec(
        name="dfpir-3tasks",
        file=None,
        sha256=None,
        licence=_RELEASED_LICENCE,
        parameters=31_104_761,
        prompts=tuple(THREE_TASKS),
        size_multiple=8,
        description="as released, three tasks; not shipped: give its .pth.tar",
        quality={
            "published_sots_db": 31.87,
            "published_rain100l_db": 38.65,
            "published_cbsd68_noise15_db": 34.14,
            "published_cbsd68_noise25_db": 31.47,
            "published_cbsd68_noise50_db": 28.25,
        },
    ),
    ModelSpec(
        name="dfpir-5tasks",
        file=None,
        sha256=None,
        licence=_RELEASED_LICENCE,
        parameters=31_104_761,
        prompts=tuple(PUBLISHED_SENTENCES),
        size_multiple=8,
        description="as released, five tasks; not shipped: give its .pth.tar",
        quality={
            "published_sots_db": 31.64,
            "published_rain100l_db": 37.62,
            "published_cbsd68_noise25_db": 31.29,
            "published_gopro_db": 28.82,
            "published_lol_db": 23.82,
        },
    ),
)
"""Checkpoints of the paper's authors, with the figures that the paper reports."""


def list_models(directory: Path = SHIPPED_DIR) -> tuple[ModelSpec, ...]:
    """Shipped models by name, then known ones; raises WeightsError for a card that cannot be read."""
    return (*(_read_card(card) for card in sorted(directory.glob("*.json"))), *KNOWN)


def resolve(name_or_path: str | Path, directory: Path = SHIPPED_DIR) -> Resolved:
    """The weights file that a name of a shipped model, or a path, stands for.

    Raises:
        WeightsError: no such model or file; the message lists the names.
    """
    specs = {spec.name: spec for spec in list_models(directory)}
    spec = specs.get(str(name_or_path))
    if spec is not None and spec.file is None:
        raise WeightsError(f"{spec.name} is known but not shipped: give the path of its .pth.tar checkpoint instead")
    if spec is not None and spec.file is not None:
        if not spec.file.is_file():
            raise WeightsError(f"{spec.file}, the weights of {spec.name}, is missing; install dfpir again")
        return Resolved(spec.file, spec)
    path = Path(name_or_path)
    if path.is_file():
        return Resolved(path, None)
    shipped = ", ".join(name for name, spec in specs.items() if spec.file is not None) or "none"
    raise WeightsError(f"{name_or_path}: neither a weights file nor a shipped model; shipped models: {shipped}")


def write_card(weights: Path, *, description: str, quality: Mapping[str, float]) -> Path:
    """Writes the card of a `.safetensors` checkpoint beside it, from the checkpoint itself and what is given.

    Raises:
        WeightsError: the checkpoint cannot be loaded.
    """
    checkpoint = load_checkpoint(weights)
    card = {
        "sha256": checkpoint.sha256,
        "licence": checkpoint.licence,
        "parameters": sum(p.numel() for p in checkpoint.network.parameters()),
        "prompts": list(checkpoint.prompts.keys),
        "size_multiple": checkpoint.network.config.size_multiple,
        "description": description,
        "quality": dict(quality),
    }
    path = weights.with_suffix(".json")
    path.write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    return path


def _read_card(path: Path) -> ModelSpec:
    try:
        card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return ModelSpec(
            name=path.stem,
            file=path.with_suffix(".safetensors"),
            sha256=card["sha256"],
            licence=card["licence"],
            parameters=int(card["parameters"]),
            prompts=tuple(card["prompts"]),
            size_multiple=int(card["size_multiple"]),
            description=card["description"],
            quality=dict(card["quality"]),
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise WeightsError(f"{path} is not a model's card: {type(error).__name__}: {error}") from error
