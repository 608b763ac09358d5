"""DFPIR's prompts as CLIP encodes them: for released checkpoints, which carry none, and for trainings as published."""

from collections.abc import Sequence
from pathlib import Path

import torch

from classifier.clip_weights import OPENAI, load_clip
from classifier.errors import ClassifierWeightsError
from models.dfpir import TEXT_DIM
from models.errors import WeightsError
from models.prompts import PUBLISHED_SENTENCES, PromptBank


def clip_bank(
    checkpoint_path: str | Path, *, keys: Sequence[str] = tuple(PUBLISHED_SENTENCES), model: str = OPENAI
) -> PromptBank:
    """Published sentences as CLIP's text tower encodes them: float32, not normalised; nothing is downloaded.

    Args:
        checkpoint_path: weights of a CLIP model, tensors or a TorchScript archive as OpenAI publishes them
            (`classifier.clip_weights.load_clip` says what they are trusted with).
        keys: of the prompts that the network has learnt; `models.prompts.THREE_TASKS` for the paper's three tasks.
        model: open_clip's name of it; the published prompts come from OpenAI's ViT-B/32.

    Raises:
        WeightsError: open_clip is not installed, or the file is missing or does not fit the model.
        KeyError: no published prompt has a key.
    """
    sentences = [PUBLISHED_SENTENCES[key] for key in keys]
    try:
        network, tokenize = load_clip(Path(checkpoint_path), model)
    except ClassifierWeightsError as error:
        raise WeightsError(str(error)) from error
    with torch.inference_mode():
        embeddings = network.encode_text(tokenize(sentences), normalize=False).float().clone()
    if embeddings.shape[1] != TEXT_DIM:
        raise WeightsError(f"CLIP {model} gives embeddings of length {embeddings.shape[1]}; DFPIR needs {TEXT_DIM}")
    return PromptBank(tuple(keys), tuple(sentences), embeddings)
