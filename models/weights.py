"""Weights on disk: our own `.safetensors`, the released `.pth.tar`, and prompt banks.

A `.safetensors` checkpoint holds

- `network.<key>`: the state dict in float16; the guidance layers, whose order is fragile, in float32;
- `prompts.embeddings`: K x 512 float32;
- `prompts.permutations.<block>`: K x (expansion C) int32, the channel orders computed when it was written;
- metadata, each value a string: `format`, `format_version`, `architecture`, `licence`, and as JSON `config`,
  `prompts` (a list of key and sentence) and `provenance`.

Loading is strict: whatever is missing, unexpected, of another shape, not finite or not as described raises
`WeightsError`. Nothing that a file holds is executed.
"""

import copy
import hashlib
import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.container import (
    is_plain_float,
    listed,
    metadata_entry,
    metadata_json,
    read_container,
    require_finite,
    write_container,
)
from models.dfpir import DFPIR, DFPIRConfig
from models.errors import WeightsError
from models.prompts import PromptBank, prompt_guidance, prompt_permutations
from models.released import infer_config, without_unused, wrapped_prefix
from models.tiling import SMALLEST_TILE_PX

FORMAT = "dfpir-weights"
BANK_FORMAT = "dfpir-prompts"
ARCHITECTURE = "dfpir"
RELEASED_SUFFIXES = (".pth.tar", ".pth", ".tar", ".ckpt")
_GUIDANCE = ("linear_layer1.", "linear_layer3.")


@dataclass(frozen=True)
class Checkpoint:
    """A network ready to run, with all that is known of it."""

    network: DFPIR
    """In float32, on the CPU."""
    prompts: PromptBank
    """With the permutations that belong to `network`."""
    licence: str
    provenance: Mapping[str, Any]
    sha256: str
    """Of the file, in hexadecimal; of a released checkpoint and its prompt bank together."""
    windows_px: Mapping[str, int] = field(default_factory=dict)
    """By prompt, the side in pixels of the tiles in which an image larger than that is best restored.

    Attention over a whole photograph sees other statistics than the patches of the training showed (Chu et al.,
    "Improving image restoration by revisiting global information aggregation", ECCV 2022). Where damage hangs on the
    whole picture, as haze does, tiles lose more than they gain, and the prompt has none.
    """


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def save_checkpoint(
    path: Path,
    network: DFPIR,
    prompts: PromptBank,
    *,
    licence: str,
    provenance: Mapping[str, Any],
    windows_px: Mapping[str, int] | None = None,
) -> None:
    """Writes a `.safetensors` checkpoint, whole or not at all.

    Args:
        path: file to write; replaced if it exists.
        network: the weights to keep.
        prompts: the bank that the network was trained with.
        licence: SPDX identifier of the weights' licence.
        provenance: how the weights came about; JSON values only.
        windows_px: see `Checkpoint.windows_px`.

    Raises:
        WeightsError: a weight is not finite, or lies beyond float16, or a window is of no use.
    """
    tensors = {
        f"network.{key}": value.detach().cpu().to(torch.float32 if _is_guidance(key) else torch.float16)
        for key, value in network.state_dict().items()
    }
    require_finite(path, tensors)
    _check_windows(path, windows_px or {}, prompts, network.config)
    tensors["prompts.embeddings"] = prompts.embeddings.cpu()
    exact = copy.deepcopy(network).cpu().float()
    for block, order in prompt_permutations(exact, prompts.embeddings.cpu()).items():
        tensors[f"prompts.permutations.{block}"] = order.to(torch.int32)
    metadata = {
        "format": FORMAT,
        "architecture": ARCHITECTURE,
        "config": json.dumps(asdict(network.config)),
        "licence": licence,
        "provenance": json.dumps(provenance),
        "windows_px": json.dumps(windows_px or {}),
        **_describe_prompts(prompts),
    }
    write_container(path, tensors, metadata)


def load_checkpoint(path: Path, prompts: PromptBank | None = None, *, expected_sha256: str | None = None) -> Checkpoint:
    """Reads a `.safetensors` checkpoint of ours, or a released `.pth.tar`.

    Args:
        path: the file; its suffix says which of the two it is.
        prompts: the bank for a released checkpoint, which carries none; without it, the file `bank_beside(path)`
            is read. Refused for `.safetensors`, which carry their own.
        expected_sha256: refuse a file of another hash.

    Raises:
        WeightsError: for every fault of the file, naming it.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such weights file")
    sha256 = file_sha256(path)
    if expected_sha256 is not None and sha256 != expected_sha256:
        raise WeightsError(
            f"{path} has SHA-256 {sha256}, but {expected_sha256} is registered for it; "
            "the file is damaged or another one: fetch it again"
        )
    if path.name.endswith(".safetensors"):
        if prompts is not None:
            raise WeightsError(f"{path} carries its own prompts; give a bank with released checkpoints only")
        return _load_own(path, sha256)
    if path.name.endswith(RELEASED_SUFFIXES):
        return _load_released(path, sha256, prompts)
    raise WeightsError(
        f"{path}: weights are files ending in .safetensors, or released checkpoints ending in "
        f"{', '.join(RELEASED_SUFFIXES)}; a training checkpoint is exported by `python -m jobs.export_restorer`"
    )


def save_prompt_bank(path: Path, bank: PromptBank) -> None:
    """Writes a bank alone, to go with a released checkpoint: whole or not at all, over a file that is there.

    A checkpoint's is looked for at `bank_beside` it. Raises OSError if it cannot be written.
    """
    write_container(path, {"embeddings": bank.embeddings.cpu()}, {"format": BANK_FORMAT, **_describe_prompts(bank)})


def load_prompt_bank(path: Path) -> PromptBank:
    """Reads what `save_prompt_bank` wrote; raises WeightsError for every fault of the file."""
    metadata, tensors = read_container(Path(path), expected_format=BANK_FORMAT)
    if set(tensors) != {"embeddings"}:
        raise WeightsError(f"{path}: a prompt bank holds the tensor embeddings alone, not {listed(tensors)}")
    require_finite(path, tensors)
    return _bank(path, metadata, tensors["embeddings"])


def bank_beside(path: Path) -> Path:
    """Where the prompt bank of a released checkpoint is looked for: `a.pth.tar` has `a.prompts.safetensors`."""
    suffix = next((suffix for suffix in RELEASED_SUFFIXES if path.name.endswith(suffix)), path.suffix)
    return path.with_name(path.name.removesuffix(suffix) + ".prompts.safetensors")


def _load_own(path: Path, sha256: str) -> Checkpoint:
    metadata, tensors = read_container(path, expected_format=FORMAT)
    if (architecture := metadata_entry(path, metadata, "architecture")) != ARCHITECTURE:
        raise WeightsError(f"{path}: unknown architecture {architecture!r}; known: {ARCHITECTURE!r}")
    config_fields = metadata_json(path, metadata, "config", dict)
    try:
        config = DFPIRConfig(**config_fields)
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{path}: its configuration {config_fields} is not one of DFPIR: {error}") from error
    prefix = "network."
    state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    network = _build(path, config, state)
    extra = {key: value for key, value in tensors.items() if not key.startswith(prefix)}
    if "prompts.embeddings" not in extra:
        raise WeightsError(f"{path}: missing key: prompts.embeddings")
    require_finite(path, {"prompts.embeddings": extra["prompts.embeddings"]})
    bank = _bank(path, metadata, extra.pop("prompts.embeddings"))
    bank = _with_stored_permutations(path, network, bank, extra)
    # Weights of before have no entry.
    windows_px = metadata_json(path, metadata, "windows_px", dict) if "windows_px" in metadata else {}
    _check_windows(path, windows_px, bank, config)
    return Checkpoint(
        network=network,
        prompts=bank,
        licence=metadata_entry(path, metadata, "licence"),
        provenance=metadata_json(path, metadata, "provenance", dict),
        sha256=sha256,
        windows_px=windows_px,
    )


def _check_windows(path: Path, windows_px: Mapping[str, Any], prompts: PromptBank, config: DFPIRConfig) -> None:
    for key, side in windows_px.items():
        if key not in prompts.keys or type(side) is not int or side < SMALLEST_TILE_PX or side % config.size_multiple:
            raise WeightsError(
                f"{path}: a window of {side!r} px for {key}; windows are for prompts of the bank "
                f"({', '.join(prompts.keys)}), from {SMALLEST_TILE_PX} px up, multiples of {config.size_multiple}"
            )


def _load_released(path: Path, sha256: str, prompts: PromptBank | None) -> Checkpoint:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's advice around it is to load what the file says without a check.
        reason = re.search(r"WeightsUnpickler error: (.+?)(\. |$)", str(error), re.MULTILINE)
        raise WeightsError(
            f"{path} is not a checkpoint that holds tensors only, or is cut short; it was not loaded"
            + (f" ({reason[1]})" if reason else "")
            + '. If it comes from somebody you trust, save its weights alone, as {"state_dict": tensors by name}'
        ) from error
    except Exception as error:  # torch raises nearly anything on bytes that are no checkpoint
        raise WeightsError(f"{path} is not a PyTorch checkpoint, or is cut short: {error!r}") from error
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        found = listed(content) if isinstance(content, dict) else type(content).__name__
        raise WeightsError(f"{path}: expected an entry state_dict, as released checkpoints have; found {found}")
    state = {str(key).removeprefix("module."): value for key, value in content["state_dict"].items()}
    if len(state) < len(content["state_dict"]):
        raise WeightsError(f"{path}: state_dict has entries both with and without the prefix module.")
    if odd := [key for key, value in state.items() if not isinstance(value, Tensor)]:
        raise WeightsError(f"{path}: entries of state_dict that are no tensors: {listed(odd)}")
    if prefix := wrapped_prefix(state):
        raise WeightsError(
            f"{path}: all keys of state_dict begin with {prefix!r}; save its tensors under the names behind that, as "
            '{"state_dict": tensors by name}'
        )
    state = without_unused(state)
    network = _build(path, infer_config(path, state), state)
    if prompts is None:
        beside = bank_beside(path)
        if not beside.is_file():
            raise WeightsError(
                f"{path} carries no prompts, as released checkpoints do not. Put the bank that it was trained with at "
                f"{beside}: models.weights.save_prompt_bank(path, pipeline.clip_prompts.clip_bank(CLIP_WEIGHTS)) "
                "makes it from CLIP ViT-B/32 weights"
            )
        prompts = load_prompt_bank(beside)
    return Checkpoint(
        network=network,
        prompts=replace(prompts, permutations=prompt_permutations(network, prompts.embeddings)),
        licence="unknown: see where the checkpoint was released",
        provenance={"origin": "released checkpoint"},
        sha256=_with_bank(sha256, prompts),
    )


def _build(path: Path, config: DFPIRConfig, state: Mapping[str, Tensor]) -> DFPIR:
    """The network with exactly these weights, in float32."""
    try:
        blocks = sum(config.num_blocks) + config.num_refinement_blocks
        if blocks > len(state):  # a number of any size, of which building would not come to an end
            raise ValueError(f"it would have {blocks} blocks, of {len(state)} tensors")
        with torch.device("meta"):
            network = DFPIR(config)
    except Exception as error:  # torch raises nearly anything on sizes that are none
        raise WeightsError(f"{path} describes a network that cannot be built, {asdict(config)}: {error}") from error
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    faults = []
    if missing := [key for key in shapes if key not in state]:
        faults.append(f"missing keys: {listed(missing)}")
    if unexpected := [key for key in state if key not in shapes]:
        faults.append(f"unexpected keys: {listed(unexpected)}")
    if wrong := [
        f"{key} is {tuple(value.shape)}, not {shapes[key]}"
        for key, value in state.items()
        if key in shapes and tuple(value.shape) != shapes[key]
    ]:
        faults.append(f"wrong shapes: {listed(wrong)}")
    if odd := [f"{key} is {value.dtype}" for key, value in state.items() if not is_plain_float(value)]:
        faults.append(f"no plain floating-point numbers: {listed(odd)}")
    if faults:
        raise WeightsError(f"{path} does not fit DFPIR of {asdict(config)}: {'; '.join(faults)}")
    require_finite(path, state)
    network.load_state_dict({key: value.float() for key, value in state.items()}, assign=True)
    return network.eval()


def _with_stored_permutations(path: Path, network: DFPIR, bank: PromptBank, stored: Mapping[str, Tensor]) -> PromptBank:
    """The bank with the stored channel orders, after computing them anew.

    Another processor may sum in another order and so swap channels whose guidance agrees to rounding: the stored
    order counts, as long as it is a descending order within that rounding.
    """
    orders = {}
    guidance = prompt_guidance(network, bank.embeddings)
    names = {f"prompts.permutations.{block}": block for block in guidance}
    if set(stored) != set(names):
        missing, unexpected = set(names) - set(stored), set(stored) - set(names)
        raise WeightsError(f"{path}: missing keys: {listed(missing)}; unexpected keys: {listed(unexpected)}")
    for name, block in names.items():
        order, values = stored[name].long(), guidance[block]
        expected = torch.arange(values.shape[1]).expand_as(values)
        if order.shape != values.shape or not torch.equal(order.sort(dim=1).values, expected):
            raise WeightsError(f"{path}: {name} holds no permutations of {values.shape[1]} channels per prompt")
        ordered = values.gather(1, order)
        before, after = ordered[:, :-1], ordered[:, 1:]
        if (after - before > 1e-5 * (1 + torch.maximum(before.abs(), after.abs()))).any():
            raise WeightsError(
                f"{path}: the channel orders stored for block {block} are not those that its guidance layers give the "
                "stored prompts; the file was put together from parts that do not belong together"
            )
        orders[block] = order
    return replace(bank, permutations=orders)


def _describe_prompts(bank: PromptBank) -> dict[str, str]:
    pairs = [{"key": key, "sentence": sentence} for key, sentence in zip(bank.keys, bank.sentences, strict=True)]
    return {"prompts": json.dumps(pairs)}


def _with_bank(sha256: str, bank: PromptBank) -> str:
    """A hash that changes with the bank as well, whose embeddings decide every channel order."""
    digest = hashlib.sha256((sha256 + _describe_prompts(bank)["prompts"]).encode())
    digest.update(bank.embeddings.float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _bank(path: Path, metadata: Mapping[str, str], embeddings: Tensor) -> PromptBank:
    pairs = metadata_json(path, metadata, "prompts", list)
    try:
        return PromptBank(tuple(p["key"] for p in pairs), tuple(p["sentence"] for p in pairs), embeddings)
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path}: its prompts are not usable: {error}") from error


def _is_guidance(key: str) -> bool:
    return any(part in key for part in _GUIDANCE)
