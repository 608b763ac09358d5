import pytest
import torch
from synthetic_clip import small_clip
from synthetic_weights import tiny_network

from models.errors import WeightsError
from models.prompts import (
    PUBLISHED_SENTENCES,
    PromptBank,
    clip_bank,
    orthogonal_bank,
    prompt_permutations,
)


def test_the_orthogonal_bank_is_orthogonal_with_the_published_sentences():
    bank = orthogonal_bank()
    assert dict(zip(bank.keys, bank.sentences, strict=True)) == PUBLISHED_SENTENCES
    assert torch.equal(bank.embeddings @ bank.embeddings.T, 512 * torch.eye(7))


def test_permutations_are_those_of_the_plain_blocks_and_differ_between_prompts():
    network, bank = tiny_network(), orthogonal_bank()
    permutations = prompt_permutations(network, bank.embeddings)
    assert {name: order.shape for name, order in permutations.items()} == {
        "encoder_shuffle_channel1": (7, 16),
        "encoder_shuffle_channel2": (7, 32),
        "encoder_shuffle_channel3": (7, 64),
        "latent_shuffle_channel": (7, 128),
    }
    for name, order in permutations.items():
        assert torch.equal(order, network.get_submodule(name).permutations(bank.embeddings))
        assert len({tuple(row) for row in order.tolist()}) == 7


def test_an_unknown_key_is_named_with_the_known_ones():
    with pytest.raises(KeyError, match=r"no prompt for snow; this model knows noise15, .*, lowlight"):
        orthogonal_bank().indices(["rain", "snow"])


def test_a_bank_that_does_not_fit_together_is_refused():
    embeddings = torch.zeros(2, 512)
    with pytest.raises(ValueError, match="one sentence and one embedding per key"):
        PromptBank(("a",), ("A",), embeddings)
    with pytest.raises(ValueError, match="must differ"):
        PromptBank(("a", "a"), ("A", "B"), embeddings)
    with pytest.raises(ValueError, match="float32"):
        PromptBank(("a", "b"), ("A", "B"), embeddings.double())


def test_a_bank_from_clip_weights_holds_what_clip_encodes(tmp_path):
    open_clip, network, path = small_clip(tmp_path)
    bank = clip_bank(path, model="small-clip")
    assert bank.keys == tuple(PUBLISHED_SENTENCES)
    assert (bank.embeddings.shape, bank.embeddings.dtype) == ((7, 512), torch.float32)
    with torch.no_grad():
        rain = network.encode_text(open_clip.tokenize([PUBLISHED_SENTENCES["rain"]]))[0]
    assert torch.allclose(bank.embeddings[3], rain, atol=1e-5)


def test_missing_or_foreign_clip_weights_are_refused(tmp_path):
    _, _, path = small_clip(tmp_path)
    with pytest.raises(WeightsError, match="no such file"):
        clip_bank(tmp_path / "absent.pt")
    torch.save({"text.weight": torch.zeros(3)}, path)
    with pytest.raises(WeightsError, match="does not hold the weights of CLIP small-clip"):
        clip_bank(path, model="small-clip")
