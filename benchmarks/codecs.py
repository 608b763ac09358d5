"""Codecs side by side: processor time and file size of photographs in this project's ways and in those of libraries.

`python -m benchmarks.codecs PHOTOGRAPHS` decodes a folder, then encodes and decodes every photograph in each way in
turn, on one thread. The first way of each kind is Pillow's, which the others' times are divided into.
"""

import argparse
import io
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision import io as torchvision_io

from benchmarks.record import add_csv_option, spread, write_csv
from jobs.datasets import is_photograph
from pipeline.jpeg import read_jpeg
from pipeline.png import encode_png

Pixels = NDArray[np.uint8]
Ways = dict[str, tuple[Callable[[Any], object], Sequence[object]]]
"""By its name: what is done with every photograph, and the photographs as it takes them."""


def main() -> None:
    """Times every way on every photograph and writes a row for each way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photographs", type=Path)
    parser.add_argument("--most", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    add_csv_option(parser, "codecs.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    paths = sorted(path for path in arguments.photographs.iterdir() if is_photograph(path))
    if not paths:
        parser.error(f"no photographs in {arguments.photographs}")
    pictures = [_decoded(path.read_bytes()) for path in paths[: arguments.most]]
    tensors = [torch.from_numpy(picture).permute(2, 0, 1) for picture in pictures]
    kinds: dict[str, Ways] = {
        "PNG, encoding": {
            "Pillow, level 2": (lambda picture: _pillow(picture, "PNG", compress_level=2), pictures),
            "Pillow, level 1": (lambda picture: _pillow(picture, "PNG", compress_level=1), pictures),
            "torchvision, level 1": (lambda tensor: _file(torchvision_io.encode_png(tensor, 1)), tensors),
            "pipeline.png": (lambda picture: encode_png(picture, {}), pictures),
        },
        "JPEG of quality 95, encoding": {
            "Pillow, 4:4:4": (lambda picture: _pillow(picture, "JPEG", quality=95, subsampling=0), pictures),
            "torchvision, 4:2:0": (lambda tensor: _file(torchvision_io.encode_jpeg(tensor, 95)), tensors),
        },
    }
    for name, options in {"PNG": {"compress_level": 2}, "JPEG": {"quality": 95, "subsampling": 0}}.items():
        files = [_pillow(picture, name, **options) for picture in pictures]
        kinds[f"{name}, decoding"] = {"Pillow": (_decoded, files), "torchvision": (_torchvision_decoded, files)}
        if name == "JPEG":
            kinds[f"{name}, decoding"]["pipeline.jpeg"] = (lambda file: read_jpeg(file, in_inks=False)[0], files)
    megapixels = sum(picture.shape[0] * picture.shape[1] for picture in pictures) / 1e6
    rows = []
    for kind, ways in kinds.items():
        for row in _compared(ways, rounds=arguments.rounds, megapixels=megapixels):
            rows.append({"kind": kind, "photographs": len(pictures), "megapixels": round(megapixels, 2), **row})
            print(", ".join(str(value) for value in rows[-1].values()), flush=True)
    write_csv(arguments.csv, rows)


def _compared(ways: Ways, *, rounds: int, megapixels: float) -> list[dict[str, object]]:
    """A row for each way, with the first one's time as a multiple of its own: the median of all rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    sizes: dict[str, int] = {}
    for _ in range(rounds):
        for name, (do, photographs) in ways.items():
            started = time.process_time()
            done = [do(photograph) for photograph in photographs]
            seconds[name].append(time.process_time() - started)
            sizes[name] = sum(len(file) for file in done if isinstance(file, bytes))
    first = np.array(next(iter(seconds.values())))
    rows: list[dict[str, object]] = []
    for name, own in seconds.items():
        rows.append(
            {
                "codec": name,
                "ms_per_megapixel": round(1000 * float(np.median(own)) / megapixels, 2),
                **spread((first / own).tolist()),
                "bytes_per_pixel": round(sizes[name] / megapixels / 1e6, 3) or "",
            }
        )
    return rows


def _decoded(file: bytes) -> Pixels:
    with Image.open(io.BytesIO(file)) as image:
        return np.array(image.convert("RGB"))


def _torchvision_decoded(file: bytes) -> Tensor:
    pixels: Tensor = torchvision_io.decode_image(torch.frombuffer(bytearray(file), dtype=torch.uint8))
    return pixels


def _pillow(picture: Pixels, name: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, name, **options)
    return file.getvalue()


def _file(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes()


if __name__ == "__main__":
    main()
