import json

import numpy as np
import pytest
import torch
from synthetic_weights import GOLDEN, golden_state, tiny_network

from models import bands, build_model, passes
from models.inference import InferenceDFPIR
from models.prompts import PromptBank, orthogonal_bank


@pytest.fixture(scope="module")
def published():
    record = json.loads((GOLDEN / "dfpir_5d.json").read_text())
    network = build_model("dfpir", **record["config"]).eval()
    network.load_state_dict(golden_state(record["keys"]))
    return network


@pytest.mark.parametrize("name", ["dfpir_5d", "dfpir_5d_batch2"])
def test_golden_outputs_of_the_released_code(published, name):
    arrays = {key: torch.from_numpy(value) for key, value in np.load(GOLDEN / f"{name}.npz").items()}
    keys = tuple(f"prompt{i}" for i in range(len(arrays["text_embedding"])))
    network = InferenceDFPIR(published, PromptBank(keys, keys, arrays["text_embedding"]))
    with torch.inference_mode():
        output = network(arrays["image"], torch.arange(len(keys)))
    difference = (output - arrays["output"]).abs()
    assert difference.max() <= 1e-3, f"max {difference.max():.2e}, mean {difference.mean():.2e}"


@pytest.mark.parametrize("factor", [1, 2])
def test_equals_the_plain_form_for_every_prompt_in_one_mixed_batch(factor):
    plain, bank = tiny_network(unshuffle_factor=factor), orthogonal_bank()
    image = torch.rand(7, 3, 16 * factor, 24 * factor, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = plain(image, bank.embeddings)
        found = InferenceDFPIR(plain, bank)(image, torch.arange(7))
    assert (expected - image).abs().max() > 0.05
    assert (expected - expected[[1, 2, 3, 4, 5, 6, 0]]).abs().amax(dim=(1, 2, 3)).min() > 1e-3
    assert (found - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("together", [True, False])
def test_a_batch_of_mixed_prompts_equals_singles(monkeypatch, together):
    network = InferenceDFPIR(tiny_network(3), orthogonal_bank())
    if not together:
        monkeypatch.setitem(bands.BAND_BYTES, "cpu", 4096)
    image = torch.rand(4, 3, 32, 16, generator=torch.Generator().manual_seed(2))
    prompts = torch.tensor([6, 0, 3, 0])
    with torch.inference_mode():
        batch = network(image, prompts)
        singles = [network(image[i : i + 1], prompts[i : i + 1])[0] for i in range(4)]
    assert network._fits_in_a_band(image) == together
    assert (batch - torch.stack(singles)).abs().max() <= 1e-5


@pytest.mark.parametrize("rows_px", [1, 4, 5, 31, 1000])
def test_bands_of_any_height_give_the_whole_images_result(monkeypatch, rows_px):
    plain, bank = tiny_network(4), orthogonal_bank()
    image = torch.rand(1, 3, 64, 48, generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(bands, "band_rows", lambda x, wide_channels: min(rows_px, x.shape[1]))
    with torch.inference_mode():
        expected = plain(image, bank.embeddings[[3]])
        found = InferenceDFPIR(plain, bank)(image, torch.tensor([3]))
    assert (found - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("rows_px", [1, 2, 5, 6, 7])
def test_dense_convolutions_go_by_rows_where_there_is_much(monkeypatch, rows_px):
    generator = torch.Generator().manual_seed(4)
    x, kernel = torch.randn(2, 7, 5, 8, generator=generator), torch.randn(6, 8, 3, 3, generator=generator)
    whole = passes.convolve(x, kernel)
    monkeypatch.setattr(passes, "CONVOLVED_BYTES", rows_px * 2 * 5 * 8 * 4)
    assert (passes.convolve(x, kernel) - whole).abs().max() <= 1e-5
    assert whole.shape == (2, 7, 5, 6)


def test_a_band_keeps_within_its_memory_but_has_four_rows_at_least():
    x = torch.empty(1, 512, 100, 8)
    assert bands.band_rows(x, 640) == bands.BAND_BYTES["cpu"] // (100 * 640 * 4)
    assert bands.band_rows(x.bfloat16(), 640) == bands.BAND_BYTES["cpu"] // (100 * 640 * 2)
    assert bands.band_rows(torch.empty(1).expand(1, 512, 100_000, 8), 64) == 4
    assert bands.band_rows(torch.empty(1, 3, 100, 8), 64) == 3


def test_bfloat16_stays_close_and_gives_float32():
    plain, bank = tiny_network(), orthogonal_bank()
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    prompts = torch.tensor([1, 4])
    with torch.inference_mode():
        exact = InferenceDFPIR(plain, bank)(image, prompts)
        rounded = InferenceDFPIR(plain, bank, dtype=torch.bfloat16)(image, prompts)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).square().mean().sqrt() < 0.02 * (exact - image).square().mean().sqrt() + 5e-3


def test_channel_orders_of_the_bank_are_used_when_it_has_them():
    plain, bank = tiny_network(), orthogonal_bank()
    own = InferenceDFPIR(plain, bank)
    wide = {"encoder_shuffle_channel1": 16, "encoder_shuffle_channel2": 32,
            "encoder_shuffle_channel3": 64, "latent_shuffle_channel": 128}  # fmt: skip
    orders = {name: torch.arange(channels).expand(7, -1) for name, channels in wide.items()}
    unmoved = InferenceDFPIR(plain, PromptBank(bank.keys, bank.sentences, bank.embeddings, orders))
    block = plain.latent_shuffle_channel
    x = torch.rand(1, 4, 4, 64)
    with torch.inference_mode():
        expected = block.conv_out(block.conv1x1(x.permute(0, 3, 1, 2)))[0].permute(1, 2, 0)
        folded = x[0] @ unmoved.perturb4.matrices[0].T + unmoved.perturb4.biases[0]
    assert (folded - expected).abs().max() < 1e-5
    assert (own.perturb4.matrices - unmoved.perturb4.matrices).abs().max() > 1e-2


def test_the_plain_network_is_left_as_it_is():
    plain = tiny_network()
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    InferenceDFPIR(plain, orthogonal_bank(), dtype=torch.bfloat16)
    assert all(torch.equal(value, before[key]) for key, value in plain.state_dict().items())
    assert any(p.requires_grad for p in plain.parameters())
