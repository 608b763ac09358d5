"""CLIP models with weights from a local file, for the zero-shot backend and for DFPIR's prompts."""

import logging
import pickle
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from classifier.errors import ClassifierWeightsError

OPENAI = "ViT-B-32-quickgelu"
"""open_clip's name of OpenAI's ViT-B/32, which was trained with the quick approximation of GELU; weights trained with
the exact one belong to `ViT-B-32`."""

NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size")
"""Numbers that OpenAI's archives hold beside the weights."""

Tokenizer = Callable[[Sequence[str]], Tensor]


def require_file(path: Path) -> None:
    """Raises ClassifierWeightsError if no file lies there."""
    if path.is_dir():
        raise ClassifierWeightsError(f"{path} is a folder; name the file of CLIP weights")
    if not path.is_file():
        raise ClassifierWeightsError(f"{path}: no such file; name CLIP weights that are on this machine")


def load_clip(path: Path, architecture: str) -> tuple[Any, Tokenizer]:
    """A CLIP model of open_clip, in float32, on the CPU and for inference, and its tokenizer; nothing is downloaded.

    From a file of tensors nothing is executed. OpenAI's files are TorchScript archives: `torch.jit.load` runs no Python
    of theirs, but they are programs of its own language, so take them from OpenAI alone.

    Args:
        path: tensors as open_clip reads them, or a TorchScript archive as OpenAI publishes them.
        architecture: open_clip's name of the model.

    Raises:
        ClassifierWeightsError: open_clip is not installed or does not know the name, or the file is not there or does
            not hold the model's weights.
    """
    try:
        import open_clip
    except ImportError as error:
        raise ClassifierWeightsError("CLIP needs the package open_clip_torch; install it") from error
    require_file(path)
    if architecture not in open_clip.list_models():  # those of a folder or a hub would bring weights of their own
        raise ClassifierWeightsError(
            f"open_clip knows no model {architecture!r}; open_clip.list_models() has the names"
        )
    state = None
    try:
        state = _archived(path)
        network: Any
        if state is None:
            network = open_clip.create_model(architecture, pretrained=str(path.absolute()), precision="fp32")
        else:
            network = _untold(lambda: open_clip.create_model(architecture, precision="fp32"))
            network.load_state_dict(state)
        return network.eval(), open_clip.get_tokenizer(architecture)
    except Exception as error:  # open_clip raises whatever its loaders raise
        if state is None and not _is_readable(path):
            raise ClassifierWeightsError(f"{path} holds no weights that can be read, or is cut short") from error
        raise ClassifierWeightsError(f"{path} cannot be loaded as CLIP {architecture}: {_said(error)}") from error


def _archived(path: Path) -> dict[str, Tensor] | None:
    """The weights in a TorchScript archive; None for any other file."""
    with warnings.catch_warnings():
        for kind in (FutureWarning, DeprecationWarning):  # torch would have new archives written in another format
            warnings.simplefilter("ignore", kind)
        try:
            state = torch.jit.load(path, map_location="cpu").state_dict()  # type: ignore[no-untyped-call]
        except RuntimeError:
            return None
    return {name: value for name, value in state.items() if name not in NO_WEIGHTS}


def _is_readable(path: Path) -> bool:
    """Whether a file that did not become a network is whole at all, whatever it holds."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="np"):
                return True
        torch.load(path, map_location="meta", weights_only=True)
    except pickle.UnpicklingError:  # which `_said` tells
        return True
    except Exception:  # torch raises nearly anything on bytes that are no weights
        return False
    return True


def _untold(make: Callable[[], Any]) -> Any:
    """What is made, without open_clip's warning that its weights are random: they are not for long."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        return make()
    finally:
        logging.disable(before)


def _said(error: Exception) -> str:
    """What a loader says, shortened, without torch's advice to load unchecked; and how another model is named."""
    if isinstance(error, pickle.UnpicklingError):
        reason = re.search(r"WeightsUnpickler error: (.+?)(\. |$)", str(error), re.MULTILINE)
        return "it holds more than tensors, or is cut short" + (f" ({reason[1]})" if reason else "")
    advice = "; another model of open_clip is named by `python -m jobs.calibrate_clip ... --architecture`"
    return shorten(repr(error), 300) + (advice if isinstance(error, RuntimeError | AssertionError) else "")
