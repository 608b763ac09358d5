"""Turns a checkpoint of `jobs.train_restorer` into weights to ship: `python -m jobs.export_restorer --help`.

Takes the averaged weights and writes a `.safetensors` file and, beside it, the card that the registry reads.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jobs.train_restorer import COMPACT
from models.dfpir import DFPIR
from models.prompts import orthogonal_bank
from models.registry import write_card
from models.weights import save_checkpoint


def export(arguments: argparse.Namespace) -> None:
    """Writes the weights and their card."""
    # The optimiser's state may hold numpy scalars (its learning rate); tensors and numbers are all that is let in.
    numbers: list[Any] = [np.dtype, np.dtypes.Float64DType, np.float64(0).__reduce__()[0]]
    with torch.serialization.safe_globals(numbers):
        state = torch.load(arguments.checkpoint, map_location="cpu", weights_only=True)
    network = DFPIR(COMPACT)
    network.load_state_dict(state["average"])
    provenance = json.loads(arguments.provenance.read_text(encoding="utf-8"))
    provenance |= {"steps": int(state["step"]), "training_minutes": round(float(state["seconds"]) / 60, 1)}
    save_checkpoint(arguments.out, network, orthogonal_bank(), licence=arguments.licence, provenance=provenance)
    quality = json.loads(arguments.quality.read_text(encoding="utf-8")) if arguments.quality else {}
    card = write_card(arguments.out, description=arguments.description, quality=quality)
    print(f"wrote {arguments.out} ({arguments.out.stat().st_size / 1e6:.1f} MB) and {card}")


def main() -> None:
    """Command line of the export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="checkpoint (.pt) of jobs.train_restorer")
    parser.add_argument("out", type=Path, help="file (.safetensors) to write; its card gets the suffix .json")
    parser.add_argument("--licence", required=True, help="SPDX identifier of the weights' licence")
    parser.add_argument("--provenance", type=Path, required=True, help="JSON object: data, hardware, script")
    parser.add_argument("--description", default="Compact DFPIR, five degradations, seven prompts", help="one line")
    parser.add_argument("--quality", type=Path, help="JSON object of measured figures, named after data and unit")
    export(parser.parse_args())


if __name__ == "__main__":
    main()
