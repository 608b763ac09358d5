import pytest
import torch
from synthetic_weights import tiny_network

from models.prompts import (
    PUBLISHED_SENTENCES,
    PromptBank,
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


def test_banks_are_told_apart_as_objects_and_described_in_a_line():
    bank = orthogonal_bank()
    assert bank != orthogonal_bank()
    assert {bank: "a key"}[bank]
    assert "Rain degradation" in repr(bank)
    assert "tensor" not in repr(bank)
