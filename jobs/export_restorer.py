"""Turns a restorer's training into weights to ship: `python -m jobs.export_restorer --help`.

Takes the averaged weights and writes a `.safetensors` file and, beside it, the card that the registry reads.
"""

import argparse
import json
from pathlib import Path

import torch

from jobs.train_restorer import prompt_bank
from jobs.training_state import CHECKPOINT
from models.dfpir import DFPIR, DFPIRConfig
from models.registry import write_card
from models.weights import save_checkpoint


def export(arguments: argparse.Namespace) -> None:
    """Writes the weights and their card."""
    state = torch.load(arguments.training / CHECKPOINT, map_location="cpu", weights_only=True)
    network = DFPIR(DFPIRConfig(**state["config"]["model"]))
    network.load_state_dict(state["average"])
    provenance = json.loads(arguments.provenance.read_text(encoding="utf-8"))
    provenance |= {"steps": int(state["step"]), "training_minutes": round(float(state["seconds"]) / 60, 1)}
    bank = prompt_bank(state["config"]["prompts"])
    save_checkpoint(arguments.out, network, bank, licence=arguments.licence, provenance=provenance)
    quality = json.loads(arguments.quality.read_text(encoding="utf-8")) if arguments.quality else {}
    card = write_card(arguments.out, description=arguments.description, quality=quality)
    print(f"wrote {arguments.out} ({arguments.out.stat().st_size / 1e6:.1f} MB) and {card}")


def main() -> None:
    """Command line of the export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("training", type=Path, help="folder of the training")
    parser.add_argument("out", type=Path, help="file (.safetensors) to write; its card gets the suffix .json")
    parser.add_argument("--licence", required=True, help="SPDX identifier of the weights' licence")
    parser.add_argument("--provenance", type=Path, required=True, help="JSON object: data, hardware, script")
    parser.add_argument("--description", required=True, help="one line")
    parser.add_argument("--quality", type=Path, help="JSON object of measured figures, named after data and unit")
    export(parser.parse_args())


if __name__ == "__main__":
    main()
