"""Turns a restorer's training into weights to ship: `python -m jobs.export_restorer --help`.

Takes the averaged weights, with the prompts of what was trained on, and writes a `.safetensors` file and, beside it,
the card that the registry reads.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from safetensors import SafetensorError

from classifier.labels import Degradation
from jobs.errors import UsageError
from jobs.training_config import RestorerTraining, from_plain
from jobs.training_loop import run_as_command
from jobs.training_prompts import stored_bank
from jobs.training_state import CHECKPOINT, config_digest, require_target
from models.dfpir import DFPIR
from models.errors import WeightsError
from models.prompts import PUBLISHED_SENTENCES, PromptBank
from models.registry import write_card
from models.weights import save_checkpoint
from pipeline.prompting import NOISE_PROMPTS, noise_prompt, prompts_for


def export(arguments: argparse.Namespace) -> None:
    """Writes the weights and their card; raises UsageError naming the file that cannot be read or written."""
    provenance = _read_object(arguments.provenance)
    quality = _read_object(arguments.quality) if arguments.quality else {}
    network, bank, config, state = _read_training(arguments.training / CHECKPOINT)
    require_target(arguments.out, state["config"])
    provenance |= {"steps": int(state["step"]), "training_minutes": round(float(state["seconds"]) / 60, 1)}
    provenance["config_sha256"] = config_digest(state["config"])
    try:
        save_checkpoint(
            arguments.out,
            network,
            bank.only(_learnt(config, state)),
            licence=arguments.licence,
            provenance=provenance,
            windows_px=dict(arguments.window),
        )
        card = write_card(arguments.out, description=arguments.description, quality=quality)
    except WeightsError as error:
        raise UsageError(str(error)) from error
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{arguments.out} and its card cannot be written: {error}") from error
    print(f"wrote {arguments.out} ({arguments.out.stat().st_size / 1e6:.1f} MB) and {card}")


def _read_training(path: Path) -> tuple[DFPIR, PromptBank, RestorerTraining, dict[str, Any]]:
    """The network with its averaged weights, its prompts, the configuration, and all of the checkpoint."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        config = from_plain(RestorerTraining, state["config"])
        network = DFPIR(config.model)
        network.load_state_dict(state["average"])
        bank = stored_bank(state)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; give the folder of a training") from error
    except Exception as error:  # torch raises nearly anything on bytes that are no checkpoint
        raise UsageError(f"{path} is no checkpoint of a restorer's training: {shorten(repr(error), 300)}") from error
    return network, bank, config, state


def _learnt(config: RestorerTraining, state: Mapping[str, Any]) -> list[str]:
    """Keys of the prompts that stood for a damage in one of the phases that the training has come to."""
    progress = config.progress(state["step"], state["seconds"])
    phases = [phase for phase in config.phases if phase.start < progress or phase.start == 0]
    labels = {label for phase in phases for label, share in phase.tasks.items() if share > 0}
    learnt = {key for label in labels for key in prompts_for(label)}
    if config.data.noise_sigmas_255 and Degradation.NOISE not in {pairs.label for pairs in config.data.pairs}:
        learnt -= set(NOISE_PROMPTS) - {noise_prompt(sigma) for sigma in config.data.noise_sigmas_255}
    return [key for key in PUBLISHED_SENTENCES if key in learnt]


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


def _window(text: str) -> tuple[str, int]:
    key, side = text.split("=")
    return key, int(side)


def main() -> None:
    """Command line of the export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("training", type=Path, help="folder of the training")
    parser.add_argument("out", type=Path, help="file (.safetensors) to write; its card gets the suffix .json")
    parser.add_argument("--licence", required=True, help="SPDX identifier of the weights' licence")
    parser.add_argument("--provenance", type=Path, required=True, metavar="FILE", help="JSON: data, hardware, script")
    parser.add_argument("--description", required=True, help="one line")
    window_help = (
        "prompt and side in pixels of the tiles that larger images are best restored in, by benchmarks.windows"
    )
    parser.add_argument("--window", type=_window, action="append", default=[], metavar="PROMPT=PX", help=window_help)
    parser.add_argument("--quality", type=Path, metavar="FILE", help="JSON: measured figures by data and unit")
    arguments = parser.parse_args()
    run_as_command(lambda: export(arguments))


if __name__ == "__main__":
    main()
