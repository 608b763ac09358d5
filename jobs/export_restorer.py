"""Turns a restorer's training into weights to ship: `python -m jobs.export_restorer --help`.

Takes the averaged weights and writes a `.safetensors` file and, beside it, the card that the registry reads.
"""

import argparse
import json
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from safetensors import SafetensorError

from jobs.errors import UsageError
from jobs.train_restorer import prompt_bank
from jobs.training_loop import told_plainly
from jobs.training_state import CHECKPOINT, require_weights_name
from models.dfpir import DFPIR, DFPIRConfig
from models.errors import WeightsError
from models.registry import write_card
from models.weights import save_checkpoint


def export(arguments: argparse.Namespace) -> None:
    """Writes the weights and their card; raises UsageError naming the file that cannot be read or written."""
    require_weights_name(arguments.out)
    provenance = _read_object(arguments.provenance)
    quality = _read_object(arguments.quality) if arguments.quality else {}
    network, state = _read_training(arguments.training / CHECKPOINT)
    provenance |= {"steps": int(state["step"]), "training_minutes": round(float(state["seconds"]) / 60, 1)}
    try:
        bank = prompt_bank(state["config"]["prompts"])
        save_checkpoint(arguments.out, network, bank, licence=arguments.licence, provenance=provenance)
        card = write_card(arguments.out, description=arguments.description, quality=quality)
    except WeightsError as error:
        raise UsageError(str(error)) from error
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{arguments.out} and its card cannot be written: {error}") from error
    print(f"wrote {arguments.out} ({arguments.out.stat().st_size / 1e6:.1f} MB) and {card}")


def _read_training(path: Path) -> tuple[DFPIR, dict[str, Any]]:
    """The network with its averaged weights, and all of the checkpoint."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        network = DFPIR(DFPIRConfig(**state["config"]["model"]))
        network.load_state_dict(state["average"])
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; give the folder of a training") from error
    except Exception as error:  # torch raises nearly anything on bytes that are no checkpoint
        raise UsageError(f"{path} is no checkpoint of a restorer's training: {shorten(repr(error), 300)}") from error
    return network, state


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON file with an object in it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds no JSON object")
    return content


def main() -> None:
    """Command line of the export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("training", type=Path, help="folder of the training")
    parser.add_argument("out", type=Path, help="file (.safetensors) to write; its card gets the suffix .json")
    parser.add_argument("--licence", required=True, help="SPDX identifier of the weights' licence")
    parser.add_argument("--provenance", type=Path, required=True, help="JSON object: data, hardware, script")
    parser.add_argument("--description", required=True, help="one line")
    parser.add_argument("--quality", type=Path, help="JSON object of measured figures, named after data and unit")
    arguments = parser.parse_args()
    told_plainly(lambda: export(arguments))


if __name__ == "__main__":
    main()
