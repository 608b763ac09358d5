"""DFPIR's prompts as CLIP encodes them: for released checkpoints, which carry none, and for trainings as published."""

from collections.abc import Mapping
from pathlib import Path

import torch

from classifier.clip_weights import OPENAI, load_clip
from classifier.errors import ClassifierWeightsError
from models.dfpir import TEXT_DIM
from models.errors import WeightsError
from models.prompts import PUBLISHED_SENTENCES, PromptBank


def clip_bank(
    checkpoint_path: str | Path, sentences: Mapping[str, str] = PUBLISHED_SENTENCES, *, model: str = OPENAI
) -> PromptBank:
    """Sentences as CLIP's text tower encodes them: float32, not normalised; nothing is downloaded.

    The authors' three-task scripts encode in half precision on a GPU, whereby some channels change places with their
    neighbours. Which do hangs on the GPU, and half precision on another device is as far from theirs as float32 is.

    Args:
        checkpoint_path: weights of a CLIP model, tensors or a TorchScript archive as OpenAI publishes them
            (`classifier.clip_weights.load_clip` says what they are trusted with).
        sentences: by key, those that the network was trained under: `models.prompts.THREE_TASKS` for the paper's three
            tasks, `THREE_TASKS_SIMPLE` for the checkpoint of simple prompts.
        model: open_clip's name of it; the published prompts come from OpenAI's ViT-B/32.

    Raises:
        WeightsError: open_clip is not installed, or the file is missing or does not fit the model.
    """
    try:
        network, tokenize = load_clip(Path(checkpoint_path), model)
    except ClassifierWeightsError as error:
        raise WeightsError(str(error)) from error
    with torch.inference_mode():
        embeddings = network.encode_text(tokenize(list(sentences.values())), normalize=False).float().clone()
    if embeddings.shape[1] != TEXT_DIM:
        raise WeightsError(f"CLIP {model} gives embeddings of length {embeddings.shape[1]}; DFPIR needs {TEXT_DIM}")
    return PromptBank(tuple(sentences), tuple(sentences.values()), embeddings)
