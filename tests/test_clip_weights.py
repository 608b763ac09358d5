import logging
import pickle

import pytest
import torch
from safetensors.torch import save_file
from synthetic_clip import as_archive, small_clip

from classifier.clip_weights import load_clip
from classifier.errors import ClassifierWeightsError


class Whatever:
    """What no file of tensors holds."""


def test_an_archive_as_openai_publishes_them_is_loaded_strictly_and_silently(tmp_path, caplog, recwarn):
    _, network, _ = small_clip(tmp_path)
    path = as_archive(network.half(), tmp_path / "archive.pt")
    caplog.clear()
    logging.disable(logging.INFO)
    try:
        loaded, _ = load_clip(path, "small-clip")
        assert logging.root.manager.disable == logging.INFO  # as the program around has it
    finally:
        logging.disable(logging.NOTSET)
    for name, value in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.float()), name
    assert loaded.visual.proj.dtype == torch.float32
    assert not loaded.training
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == []
    assert [str(warning.message) for warning in recwarn if "jit" in str(warning.message)] == []
    network.visual.proj = None
    with pytest.raises(ClassifierWeightsError, match=r"Missing key.*visual\.proj"):
        load_clip(as_archive(network, path), "small-clip")


@pytest.mark.parametrize("name", ["hf-hub:laion/CLIP-ViT-B-32", "local-dir:{here}", "nonsense"])
def test_only_names_that_open_clip_lists_are_models(tmp_path, name):
    _, _, path = small_clip(tmp_path)
    (tmp_path / "open_clip_config.json").write_text((tmp_path / "small-clip.json").read_text())
    with pytest.raises(ClassifierWeightsError, match="open_clip knows no model"):
        load_clip(path, name.format(here=tmp_path))


def test_a_file_named_like_published_weights_is_read_and_nothing_is_fetched(tmp_path, monkeypatch):
    open_clip, _, path = small_clip(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        open_clip.factory, "get_pretrained_cfg", lambda model, tag: {"url": ""} if tag == "openai" else {}
    )
    path.rename("openai")
    load_clip((tmp_path / "openai").relative_to(tmp_path), "small-clip")


def test_faults_are_told_in_a_line_with_what_to_do(tmp_path):
    _, _, path = small_clip(tmp_path)
    said = {}
    for name, content in {"tensors": {"text.weight": torch.zeros(3)}, "code": {"a": Whatever()}, "empty": {}}.items():
        torch.save(content, path)
        with pytest.raises(ClassifierWeightsError, match=r"clip\.pt cannot be loaded as CLIP small-clip: .") as found:
            load_clip(path, "small-clip")
        said[name] = str(found.value).split("small-clip: ")[1]
    assert "Missing key" in said["tensors"]
    assert said["tensors"].endswith("named by `python -m jobs.calibrate_clip ... --architecture`")
    assert len(said["tensors"]) < 500
    assert said["code"].startswith("it holds more than tensors, or is cut short (Unsupported global")
    assert "weights_only" not in said["code"]
    path.write_bytes(pickle.dumps(Whatever()))
    with pytest.raises(ClassifierWeightsError, match="small-clip: it holds more than tensors"):
        load_clip(path, "small-clip")


def test_what_is_no_file_of_weights_is_told_in_a_sentence(tmp_path):
    _, network, path = small_clip(tmp_path)
    tensors = tmp_path / "clip.safetensors"
    save_file(network.state_dict(), tensors)
    load_clip(tensors, "small-clip")
    whole = [path.read_bytes(), as_archive(network, path).read_bytes(), tensors.read_bytes()]
    cut = [content[: len(content) // 2] for content in whole]
    for file, content in zip((path, path, tensors, path, path), (*cut, b"", b"ephemeral"), strict=True):
        file.write_bytes(content)
        with pytest.raises(ClassifierWeightsError) as found:
            load_clip(file, "small-clip")
        assert str(found.value) == f"{file} holds no weights that can be read, or is cut short"
    with pytest.raises(ClassifierWeightsError, match=r"is a folder; name the file of CLIP weights$"):
        load_clip(tmp_path, "small-clip")


@pytest.mark.parametrize("change", [{"text": {"width": 32}}, {"vision": {"width": 128}}, {"embed_dim": 64}])
def test_weights_of_another_width_lead_to_the_name_of_their_model(tmp_path, change):
    _, network, path = small_clip(tmp_path, "other-clip", **change)
    small_clip(tmp_path)
    torch.save(network.state_dict(), path)
    with pytest.raises(ClassifierWeightsError, match=r"another model of open_clip is named by .*--architecture`$"):
        load_clip(path, "small-clip")
