"""DFPIR: the network, its prompts and weights, and the Restorer that runs it.

`load_restorer(name).restore(images, keys)` takes and returns H x W x 3 RGB images of any sizes (uint8, uint16, or
float32 in [0, 1]), with one key of `restorer.prompts.keys` for each.
"""

from torch import nn

from models.dfpir import DFPIR, DFPIRConfig
from models.errors import WeightsError
from models.prompts import PromptBank, orthogonal_bank
from models.registry import ModelSpec, list_models
from models.restorer import Restorer, load_restorer, parse_tile

__all__ = [
    "ModelSpec",
    "PromptBank",
    "Restorer",
    "WeightsError",
    "build_model",
    "list_models",
    "load_restorer",
    "orthogonal_bank",
    "parse_tile",
]


def build_model(name: str, **config: object) -> nn.Module:
    """A network with random weights, for training: `build_model("dfpir", dim=24)`.

    Called with images, B x 3 x H x W float32 RGB in [0, 1] with sides that are multiples of `config.size_multiple`, and
    with embeddings, B x 512 float32, it returns B x 3 x H x W, not clamped.

    Args:
        name: `dfpir`, the one architecture there is.
        config: fields of `DFPIRConfig`; what is not given is as published.

    Raises:
        ValueError: an unknown architecture, or a configuration out of range.
        TypeError: an unknown field.
    """
    if name != "dfpir":
        raise ValueError(f"unknown architecture {name!r}; known: 'dfpir'")
    return DFPIR(DFPIRConfig(**config))  # type: ignore[arg-type] # DFPIRConfig checks its fields
