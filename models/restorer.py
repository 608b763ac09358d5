"""The Restorer: images of any size and prompt keys in, restored images out."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.dfpir import DFPIR
from models.graphs import Forward, Recorded
from models.inference import InferenceDFPIR
from models.memory import MEMORY_SHARE, available_bytes, bytes_per_pixel, on_device, total_bytes
from models.padding import padded_size
from models.prompts import PromptBank
from models.registry import resolve
from models.tiling import SMALLEST_TILE_PX, run_tiled
from models.transfer import download, upload

Tile = Literal["auto", "off"] | int
Image = NDArray[Any]
"""H x W x 3, RGB: uint8, uint16, or float32 in [0, 1]."""

_TORCH_DTYPE = {
    np.dtype(np.uint8): torch.uint8,
    np.dtype(np.uint16): torch.uint16,
    np.dtype(np.float32): torch.float32,
}
_FULL_SCALE = {torch.uint8: 255.0, torch.uint16: 65535.0, torch.float32: 1.0}
_LEAST, _MOST = -1.0, 2.0
"""Of float32: filters and noise go a little beyond [0, 1], and levels up to 255 do not stay within."""
_LARGEST_BATCH = 32
_TILED_BYTES_PER_PIXEL = 2 * 3 * 4
"""Of an image in tiles, whole: what goes in and what comes out."""


def parse_tile(option: str) -> Tile:
    """The value of a `tile` option given as text; raises ValueError naming what it may be."""
    if option == "auto":
        return "auto"
    if option == "off":
        return "off"
    if option.isdigit() and int(option) >= SMALLEST_TILE_PX:
        return int(option)
    raise ValueError(f"must be auto, off, or a side of at least {SMALLEST_TILE_PX} pixels, not {option!r}")


class Restorer:
    """Restores images with one DFPIR network and its bank of prompts.

    The batch that an image was in changes none of its pixels by more than one level of 255 in float32. May be called
    from many threads, each of which takes memory for itself; on a GPU their batches take turns.

    Attributes:
        name: of the model, for records; may be empty.
        sha256: of the weights file, in hexadecimal; may be empty.
        prompts: the bank; `prompts.keys` are the valid prompt keys.
        size_multiple: images are padded to a multiple of this many pixels, and cropped back.
        device: where the network runs.
        dtype: of its features, float32 or bfloat16.
        windows_px: side of the tiles that images under a prompt are best restored in, with `tile` auto.
        memory_budget_bytes: what a batch may take; lower it to get smaller batches and, with `tile` auto, tiles.
    """

    def __init__(
        self,
        network: DFPIR,
        prompts: PromptBank,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        tile: Tile = "auto",
        windows_px: Mapping[str, int] | None = None,
        sharers: int = 1,
        sha256: str = "",
        name: str = "",
    ) -> None:
        """Prepares the network for inference; `network` itself is left as it is.

        Args:
            network: in float32.
            prompts: the bank that it was trained with.
            device: `cpu`, `cuda` or one CUDA device.
            dtype: float32 or bfloat16.
            tile: `auto` tiles what is larger than its prompt's window or does not fit into memory, `off` never does,
                and a number of pixels tiles whatever is larger than that; it is rounded up to the size multiple.
            windows_px: see `Checkpoint.windows_px`; a prompt without one attends to whole images.
            sharers: Restorers, this one included, that divide all memory of the device among them; one alone plans with
                what is free when it is made.
            sha256: of the weights file, for records.
            name: of the model, for records.

        Raises:
            ValueError: another device or dtype, a tile of less than two size multiples, or CUDA asked for where there
                is none.
        """
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype must be float32 or bfloat16, not {dtype}")
        self.device = torch.device(device)
        if self.device.type not in MEMORY_SHARE:
            raise ValueError(f"device must be cpu or cuda, not {device}")
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError("CUDA was asked for, but torch finds no CUDA device here; use device='cpu'")
        self.size_multiple = network.config.size_multiple
        if isinstance(tile, int):
            tile = self._tile_side(tile)
        elif tile not in ("auto", "off"):
            raise ValueError(f"tile must be auto, off or a number of pixels, not {tile!r}")
        self.name = name
        self.sha256 = sha256
        self.prompts = prompts
        self.dtype = dtype
        self._tile: Tile = tile
        self.windows_px = dict(windows_px or {}) if tile == "auto" else {}
        with torch.device("cpu"):
            form: Forward = InferenceDFPIR(network, prompts, dtype=dtype, device=self.device)
        self._forward = Recorded(form) if self.device.type == "cuda" else form
        self._bytes_per_pixel = bytes_per_pixel(network.config, dtype, self.device)
        # Read once: a choice that depended on the moment would tile one of two equal images.
        # The others may hold their part by now, or not yet.
        mine = available_bytes(self.device) if sharers == 1 else total_bytes(self.device) / sharers
        self.memory_budget_bytes = int(MEMORY_SHARE[self.device.type] * mine)

    def _tile_side(self, px: int) -> int:
        """Side of the tiles that were asked for, a size multiple; raises ValueError if they could not overlap."""
        if px < 2 * self.size_multiple:
            raise ValueError(f"tiles must be at least {2 * self.size_multiple} pixels, not {px}")
        return padded_size(px, px, self.size_multiple)[0]

    def tile_px_for(self, height: int, width: int, prompt_key: str) -> int | None:
        """Side in pixels of the tiles that an image of this size is restored in under a prompt; None: whole."""
        height, width = padded_size(height, width, self.size_multiple)
        if self._tile == "off":
            return None
        if isinstance(self._tile, int):
            return self._tile if max(height, width) > self._tile else None
        side = self.windows_px.get(prompt_key, max(height, width))
        left = self._left_for_tiles(height * width)
        room = self.memory_budget_bytes if side >= max(height, width) else left
        if min(height, side) * min(width, side) * self._bytes_per_pixel > room:
            fitting = int((left / self._bytes_per_pixel) ** 0.5)
            side = min(side, max(fitting // self.size_multiple, 2) * self.size_multiple)
        return side if max(height, width) > side else None

    def _place_of_tiled(self, pixels: int) -> torch.device:
        """Where an image of so many pixels lies while its tiles are restored: beside the network, if it is small."""
        small = _TILED_BYTES_PER_PIXEL * pixels <= self.memory_budget_bytes // 4
        return self.device if small else torch.device("cpu")

    def _left_for_tiles(self, pixels: int) -> int:
        """Of the budget, beside an image of so many pixels that is held whole, as floats, in the same memory.

        A quarter in any case: small tiles show the network too little of the picture.
        """
        held = _TILED_BYTES_PER_PIXEL * pixels if self._place_of_tiled(pixels).type == self.device.type else 0
        return max(self.memory_budget_bytes - held, self.memory_budget_bytes // 4)

    def smaller_tile_px(self, height: int, width: int, *, than: int | None) -> int | None:
        """Side of the tiles to try next when an image of this size ran out of memory: half of what was tried.

        `than` is the side of the tiles that were too large; None: the image was whole. None when `tile` is off, or
        when tiles would get too small.
        """
        tried = than or max(padded_size(height, width, self.size_multiple))
        side = tried // 2 // self.size_multiple * self.size_multiple
        return side if self._tile != "off" and side >= max(SMALLEST_TILE_PX, 2 * self.size_multiple) else None

    def batch_limit(self, height: int, width: int, *, tile_px: int | None) -> int:
        """How many images of this size (of their tiles, where they are tiled) fit in one batch; at least 1."""
        height, width = padded_size(height, width, self.size_multiple)
        budget = self.memory_budget_bytes
        if tile_px is not None:
            budget = self._left_for_tiles(height * width)
            height, width = min(height, tile_px), min(width, tile_px)
        fitting = int(budget / (height * width * self._bytes_per_pixel))
        return max(1, min(fitting, _LARGEST_BATCH))

    @torch.inference_mode()
    def restore(
        self, images: Sequence[Image], prompt_keys: Sequence[str], *, tile_px: int | None = None
    ) -> list[Image]:
        """Restored images of the same sizes and dtypes, in the same order.

        Args:
            images: each H x W x 3, RGB, uint8, uint16 or float32 in [0, 1]; sizes and dtypes may differ.
            prompt_keys: one of `prompts.keys` for each image.
            tile_px: cuts every image into tiles of this side, one at a time, for what ran out of memory otherwise; it
                is rounded up to the size multiple.

        Returns:
            Integers rounded and clipped to their range, float32 clipped to [0, 1].

        Raises:
            KeyError: an unknown prompt key; the message names the known ones.
            ValueError: an image of another shape, dtype or range, not one key per image, or a tile of less than two
                size multiples.
        """
        if len(images) != len(prompt_keys):
            raise ValueError(f"{len(images)} images but {len(prompt_keys)} prompt keys; each image needs one")
        for image in images:
            if not isinstance(image, np.ndarray):
                raise ValueError(f"expected NumPy arrays, found {type(image).__name__}")
            if image.ndim != 3 or image.shape[2] != 3 or not image.size or image.dtype not in _TORCH_DTYPE:
                raise ValueError(f"expected H x W x 3 uint8, uint16 or float32, found {image.shape} {image.dtype}")
            if image.dtype == np.float32 and not (image.min() >= _LEAST and image.max() <= _MOST):  # nor if one is NaN
                raise ValueError(f"expected float32 in [0, 1], found {image.min()} to {image.max()}")
        prompts = self.prompts.indices(prompt_keys)
        if tile_px is not None:
            tile_px = self._tile_side(tile_px)
        groups: dict[tuple[int, int, np.dtype[Any], int | None], list[int]] = defaultdict(list)
        for i, (image, key) in enumerate(zip(images, prompt_keys, strict=True)):
            height, width = padded_size(image.shape[0], image.shape[1], self.size_multiple)
            groups[height, width, image.dtype, tile_px or self.tile_px_for(height, width, key)].append(i)
        restored: dict[int, Image] = {}
        for (height, width, dtype, side), members in groups.items():
            limit = 1 if tile_px is not None else self.batch_limit(height, width, tile_px=side)
            step = limit if side is None else 1
            for first in range(0, len(members), step):
                chunk = members[first : first + step]
                place = self.device if side is None else self._place_of_tiled(height * width)
                batch = _as_floats(upload([images[i] for i in chunk], height, width, place))
                keys = [prompts[i] for i in chunk]
                out = self._run(batch, keys) if side is None else self._run_tiles(batch[0], keys[0], side, limit)[None]
                for i, found in zip(chunk, download(_as_images(out, dtype)), strict=True):
                    restored[i] = found[: images[i].shape[0], : images[i].shape[1]].copy()
        return [restored[i] for i in range(len(images))]

    def _run(self, batch: Tensor, prompts: list[int]) -> Tensor:
        """One pass of the network: B x 3 x H x W float32 on its device, in and out."""
        index = torch.tensor(prompts, device=self.device)
        # TF32 is float32 in name only: its rounding changes which attention logits survive. So would autocast's.
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with exact, torch.autocast(self.device.type, enabled=False), on_device(self.device):
            return self._forward(batch, index)

    def _run_tiles(self, image: Tensor, prompt: int, side: int, limit: int) -> Tensor:
        """One image, 3 x H x W float32 on the device or the CPU, in tiles."""
        return run_tiled(
            image,
            lambda tiles: self._run(tiles.to(self.device), [prompt] * len(tiles)).to(image.device),
            tile_px=side,
            multiple=self.size_multiple,
            batch_limit=limit,
        )


def load_restorer(
    name_or_path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    tile: Tile = "auto",
    sharers: int = 1,
) -> Restorer:
    """A Restorer with the weights of a shipped model, by name, or of a file.

    Raises:
        WeightsError: the name is unknown, or the file is missing, damaged or of another hash than registered.
        ValueError: as `Restorer`.
    """
    found = resolve(name_or_path)
    with torch.device("cpu"):
        checkpoint = found.load()
    return Restorer(
        checkpoint.network,
        checkpoint.prompts,
        device=device,
        dtype=dtype,
        tile=tile,
        windows_px=checkpoint.windows_px,
        sharers=sharers,
        sha256=checkpoint.sha256,
        name=found.spec.name if found.spec else found.path.name,
    )


def _as_floats(images: Tensor) -> Tensor:
    """B x H x W x 3 of any of the dtypes as B x 3 x H x W float32 in [0, 1]."""
    floats = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return floats.div_(_FULL_SCALE[images.dtype])


def _as_images(floats: Tensor, dtype: np.dtype[Any]) -> Tensor:
    """B x 3 x H x W float32, which is used up, as B x H x W x 3 of a dtype, in which they travel."""
    images = floats.permute(0, 2, 3, 1).clamp_(0, 1)
    kind = _TORCH_DTYPE[dtype]
    if kind != torch.float32:
        images = images.mul_(_FULL_SCALE[kind]).round_().to(kind)
    return images.contiguous()
