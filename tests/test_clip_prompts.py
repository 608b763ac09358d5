import pytest
import torch
from synthetic_clip import as_archive, small_clip

from models.errors import WeightsError
from models.prompts import PUBLISHED_SENTENCES, THREE_TASKS, THREE_TASKS_SIMPLE
from pipeline.clip_prompts import clip_bank


def test_a_bank_from_clip_weights_holds_what_clip_encodes(tmp_path):
    open_clip, network, path = small_clip(tmp_path)
    bank = clip_bank(str(path), model="small-clip")
    assert bank.keys == tuple(PUBLISHED_SENTENCES)
    assert (bank.embeddings.shape, bank.embeddings.dtype) == ((7, 512), torch.float32)
    with torch.no_grad():
        rain = network.encode_text(open_clip.tokenize([PUBLISHED_SENTENCES["rain"]]))[0]
    assert torch.allclose(bank.embeddings[3], rain, atol=1e-5)


def test_a_bank_of_three_tasks_offers_neither_blur_nor_low_light(tmp_path):
    _, _, path = small_clip(tmp_path)
    whole, part = clip_bank(path, model="small-clip"), clip_bank(path, THREE_TASKS, model="small-clip")
    assert part.keys == ("noise15", "noise25", "noise50", "rain", "haze")
    assert part.sentences == whole.sentences[:5]
    assert torch.allclose(part.embeddings, whole.embeddings[:5], atol=1e-5)


def test_a_bank_of_other_sentences_has_their_embeddings(tmp_path):
    open_clip, network, path = small_clip(tmp_path)
    bank = clip_bank(path, THREE_TASKS_SIMPLE, model="small-clip")
    assert (bank.keys, bank.sentences) == (tuple(THREE_TASKS), ("Noise", "Noise", "Noise", "Rain", "Haze"))
    with torch.no_grad():
        assert torch.allclose(bank.embeddings[3], network.encode_text(open_clip.tokenize(["Rain"]))[0], atol=1e-5)


def test_an_archive_as_openai_publishes_them_gives_the_same_bank(tmp_path):
    _, network, path = small_clip(tmp_path)
    banks = [clip_bank(each, model="small-clip") for each in (path, as_archive(network, tmp_path / "archive.pt"))]
    assert torch.equal(banks[0].embeddings, banks[1].embeddings)


def test_missing_or_foreign_clip_weights_are_refused(tmp_path):
    _, _, path = small_clip(tmp_path)
    with pytest.raises(WeightsError, match="no such file"):
        clip_bank(tmp_path / "absent.pt")
    torch.save({"text.weight": torch.zeros(3)}, path)
    with pytest.raises(WeightsError, match="cannot be loaded as CLIP small-clip"):
        clip_bank(path, model="small-clip")


def test_embeddings_of_another_length_are_refused(tmp_path):
    _, _, path = small_clip(tmp_path, "narrow-clip", embed_dim=64)
    with pytest.raises(WeightsError, match="embeddings of length 64; DFPIR needs 512"):
        clip_bank(path, model="narrow-clip")
