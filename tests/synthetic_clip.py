"""CLIP weights for tests."""

import json

import pytest
import torch


def small_clip(tmp_path):
    """Registers a small CLIP architecture with open_clip and writes random weights for it."""
    open_clip = pytest.importorskip("open_clip", reason="open_clip_torch is not installed")
    config = {
        "embed_dim": 512,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
    }
    (tmp_path / "small-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "small-clip.json")
    torch.manual_seed(0)
    network = open_clip.create_model("small-clip")
    torch.save(network.state_dict(), tmp_path / "clip.pt")
    return open_clip, network.eval(), tmp_path / "clip.pt"
