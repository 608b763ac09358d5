"""CLIP weights for tests."""

import json
import warnings

import pytest
import torch
from torch import nn


def small_clip(tmp_path, name="small-clip", vision=(), text=(), **changes):
    """Registers a small CLIP architecture with open_clip and writes random weights for it.

    `vision`, `text` and `changes` are merged into its configuration. Returns open_clip, the network and the file.
    """
    open_clip = pytest.importorskip("open_clip", reason="open_clip_torch is not installed")
    config = {
        "embed_dim": 512,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16} | dict(vision),
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1} | dict(text),
    } | changes
    (tmp_path / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / f"{name}.json")
    torch.manual_seed(0)
    network = open_clip.create_model(name)
    torch.save(network.state_dict(), tmp_path / "clip.pt")
    return open_clip, network.eval(), tmp_path / "clip.pt"


class Holder(nn.Module):
    def forward(self, pixels):
        return pixels


def as_archive(network, path):
    """Writes a network's weights as OpenAI publishes them: a traced module of their names, with numbers beside them."""
    archive = Holder()
    for name, value in network.state_dict().items():
        *parents, last = name.split(".")
        place = archive
        for parent in parents:
            if parent not in dict(place.named_children()):
                place.add_module(parent, Holder())
            place = place.get_submodule(parent)
        place.register_parameter(last, nn.Parameter(value, requires_grad=False))
    for name, number in (("input_resolution", 32), ("context_length", 77), ("vocab_size", 49408)):
        archive.register_buffer(name, torch.tensor(number))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such archives are out of date
        torch.jit.trace(archive, torch.zeros(1)).save(path)
    return path
