"""What bfloat16 changes inside the network: `python -m benchmarks.precision --help`.

Restores photographs with noise of sigma 25 in float32 and in bfloat16, and compares which attention logits CAAPM
keeps, row by row of its C x C matrices, and the results with each other. Channel orders are integers, computed once in
float32: the matrices that they are folded into must be the same.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.engine import network_and_bank, padded_tensor
from benchmarks.record import add_csv_option, write_csv
from jobs.datasets import with_noise
from models import inference
from models.dfpir import keep_largest
from models.inference import InferenceDFPIR


@contextmanager
def masks_seen() -> Iterator[list[Tensor]]:
    """Which logits are kept, heads x C x C bool for each perturbation block that runs meanwhile."""
    seen: list[Tensor] = []

    def watched(logits: Tensor, kept_fraction: float) -> Tensor:
        kept = keep_largest(logits, kept_fraction)
        seen.append(kept[0].isfinite())
        return kept

    with patch.object(inference, "keep_largest", watched):
        yield seen


def photographs(folder: Path, most: int, multiple: int) -> Iterator[Tensor]:
    """Noisy photographs, 1 x 3 x H x W float32 in [0, 1], padded."""
    for number, path in enumerate(sorted(folder.glob("*.png"))[:most]):
        clean = np.asarray(Image.open(path).convert("RGB"))
        yield padded_tensor(with_noise(clean, 25, seed=number), multiple)


def orders_agree(exact: InferenceDFPIR, rounded: InferenceDFPIR) -> bool:
    """Whether all matrices that hold channel orders are equal; they are float32 in both forms."""
    names = [name for name, _ in exact.named_buffers() if name.startswith("perturb") and name.count(".") == 1]
    assert names
    return all(torch.equal(exact.get_buffer(name), rounded.get_buffer(name)) for name in names)


@torch.inference_mode()
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="clean PNG photographs")
    parser.add_argument("--models", nargs="+", default=["dfpir-compact", "full"], help="full: random weights")
    parser.add_argument("--most", type=int, default=1000, help="photographs taken")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_csv_option(parser, "precision.csv")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.models:
        network, bank = network_and_bank(name)
        forms = [
            InferenceDFPIR(network, bank, dtype=d, device=arguments.device) for d in (torch.float32, torch.bfloat16)
        ]
        count, differing, images, squares = 0, 0, 0, []
        for image in photographs(arguments.folder, arguments.most, network.config.size_multiple):
            kept, results = [], []
            for form in forms:
                with masks_seen() as seen:
                    results.append(form(image.to(arguments.device), torch.tensor([1], device=arguments.device)))
                kept.append(seen)
            for exact, rounded in zip(*kept, strict=True):
                changed = (exact != rounded).any(dim=-1)
                count, differing = count + changed.numel(), differing + int(changed.sum())
            squares.append(float((results[0] - results[1]).square().mean()))
            images += 1
        if not images:
            parser.error(f"no PNG photographs in {arguments.folder}")
        row = {
            "model": name, "images": images, "rows": count, "differing": differing,
            "differing_share": round(differing / count, 6), "orders_agree": orders_agree(*forms),
            "rms_difference_255": round(255 * float(np.mean(squares)) ** 0.5, 4),
        }  # fmt: skip
        rows.append(row)
        print(
            f"{name}: {differing} of {count} mask rows differ ({differing / count:.3%}) on {images} photographs; "
            f"orders agree: {row['orders_agree']}; results differ by {row['rms_difference_255']} of 255 (RMS)",
            flush=True,
        )
    write_csv(arguments.csv, rows, device=arguments.device)


if __name__ == "__main__":
    main()
