"""The prompts that a restorer is trained under, and keeps in its checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from jobs.errors import UsageError
from jobs.training_config import RestorerTraining
from models.errors import WeightsError
from models.prompts import PromptBank, orthogonal_bank
from models.registry import resolve
from pipeline.clip_prompts import clip_bank
from pipeline.prompting import prompts_for


def prompt_bank(name: str) -> PromptBank:
    """The bank that a configuration names: `orthogonal`, a model's by name or file, or CLIP's (`clip:PATH`)."""
    if name == "orthogonal":
        return orthogonal_bank()
    try:
        if name.startswith("clip:"):
            return clip_bank(Path(name.removeprefix("clip:")))
        return resolve(name).load().prompts
    except WeightsError as error:
        raise UsageError(f"prompts: {error}") from error


def checked_bank(config: RestorerTraining) -> PromptBank:
    """The bank that a training uses; raises UsageError if there is none, or it lacks a prompt for one of the tasks."""
    bank = prompt_bank(config.prompts)
    for label in {label for phase in config.phases for label in phase.tasks}:
        if without := set(prompts_for(label)) - set(bank.keys):
            raise UsageError(f"{config.prompts} has no prompt {', '.join(sorted(without))} for {label}")
    return bank


def to_store(bank: PromptBank) -> dict[str, Any]:
    """A bank as part of a checkpoint: the file that it came of may hold another one by the time of a resumption."""
    return {"prompts": {"keys": bank.keys, "sentences": bank.sentences, "embeddings": bank.embeddings}}


def stored_bank(state: Mapping[str, Any]) -> PromptBank:
    """That of a restorer's checkpoint."""
    return PromptBank(**state["prompts"])


def require_prompts(bank: PromptBank, source: Path, chosen: str) -> None:
    """Raises UsageError where weights to start from, a checkpoint's or a model's, were trained under another bank.

    `chosen` names the configuration's.
    Under another embedding the same prompt reorders every shuffled channel, and the weights are worth nothing.
    """
    if source.suffix == ".pt":
        theirs = stored_bank(torch.load(source, map_location="cpu", weights_only=True))
    else:
        theirs = resolve(str(source)).load().prompts
    both = [key for key in bank.keys if key in theirs.keys]
    if not torch.equal(bank.embeddings[bank.indices(both)], theirs.embeddings[theirs.indices(both)]):
        raise UsageError(
            f"start_from {source} was trained under other embeddings of its prompts than {chosen}; name its own as "
            "`prompts`"
        )
