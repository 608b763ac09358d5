import json

import numpy as np
import pytest
import torch
from synthetic_weights import GOLDEN, golden_state, tiny_network

from models import build_model, orthogonal_bank
from models.dfpir import DFPIR, DFPIRConfig, channel_order, keep_largest
from models.inference import InferenceDFPIR


@pytest.fixture(scope="module")
def published() -> DFPIR:
    record = json.loads((GOLDEN / "dfpir_5d.json").read_text())
    network = build_model("dfpir", **record["config"]).eval()
    assert sum(p.numel() for p in network.parameters()) == record["parameters"]
    assert {key: list(value.shape) for key, value in network.state_dict().items()} == record["keys"]
    network.load_state_dict(golden_state(record["keys"]))
    return network


@pytest.mark.parametrize("name", ["dfpir_5d", "dfpir_5d_batch2"])
def test_outputs_are_those_of_the_released_code(published, name):
    arrays = {key: torch.from_numpy(value) for key, value in np.load(GOLDEN / f"{name}.npz").items()}
    with torch.inference_mode():
        output = published(arrays["image"], arrays["text_embedding"])
    difference = (output - arrays["output"]).abs()
    assert difference.max() <= 2e-3, f"max {difference.max():.2e}, mean {difference.mean():.2e}"


def test_channel_order_is_descending_and_stable():
    assert channel_order(torch.tensor([0.5, 2.0, 0.5, -1.0])).tolist() == [1, 0, 2, 3]


def test_keep_largest_keeps_the_given_share_of_each_row():
    logits = torch.arange(10.0)[torch.randperm(10, generator=torch.Generator().manual_seed(0))].expand(3, 10)
    kept = keep_largest(logits, 0.9)
    assert torch.equal(kept.isinf(), logits == 0)
    assert torch.equal(keep_largest(logits, 1.0), logits)


def test_no_gradient_reaches_the_guidance_layers():
    network = tiny_network()
    network(torch.rand(1, 3, 16, 16), torch.randn(1, 512)).sum().backward()
    without = {name for name, p in network.named_parameters() if p.grad is None}
    assert without
    assert all("linear_layer1" in name or "linear_layer3" in name for name in without)


def test_the_prompt_changes_the_result_through_its_order_only():
    network = tiny_network()
    image, prompt = torch.rand(1, 3, 32, 32), torch.randn(1, 512)
    with torch.inference_mode():
        first, other = network(image, prompt), network(image, -prompt)
        for block in network.modules():
            if hasattr(block, "linear_layer3"):
                block.linear_layer3.weight *= 3
                block.linear_layer3.bias *= 3
        same_order = network(image, prompt)
    assert (first - other).abs().max() > 1e-3
    assert torch.equal(first, same_order)


@pytest.mark.parametrize("factor", [1, 2])
def test_sides_are_multiples_of_the_size_multiple(factor):
    network = tiny_network(unshuffle_factor=factor)
    side = network.config.size_multiple
    assert side == 8 * factor
    with torch.inference_mode():
        assert network(torch.rand(1, 3, side, 3 * side), torch.randn(1, 512)).shape == (1, 3, side, 3 * side)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"num_blocks": (1, 1, 1)}, "four entries"),
        ({"kept_fraction": 0.0}, "kept_fraction"),
        ({"unshuffle_factor": 0}, "at least 1"),
        ({"dim": 10, "heads": (4, 4, 4, 4)}, "level 1 has 10 channels, not divisible by 4 heads"),
    ],
)
def test_a_configuration_out_of_range_is_refused(field, message):
    with pytest.raises(ValueError, match=message):
        DFPIRConfig(**field)


def test_an_unknown_architecture_is_refused_naming_the_known_one():
    with pytest.raises(ValueError, match="known: 'dfpir'"):
        build_model("restormer")


# Ablations


def outputs(**changes):
    torch.manual_seed(0)
    network = DFPIR(DFPIRConfig(dim=8, num_blocks=(1, 1, 1, 1), num_refinement_blocks=1, **changes))
    torch.manual_seed(1)
    image, embedding = torch.rand(1, 3, 16, 16), torch.randn(2, 512)
    return network, [network(image, embedding[i : i + 1]) for i in range(2)]


def test_trained_guidance_changes_the_gradient_and_nothing_else():
    _, expected = outputs()
    network, found = outputs(trained_guidance=True)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(expected, found, strict=True))
    found[0].square().mean().backward()
    guidance = [p.grad for name, p in network.named_parameters() if "linear_layer" in name]
    assert len(guidance) == 16
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in guidance)


def test_without_channel_perturbation_the_prompt_changes_nothing():
    _, (first, second) = outputs(channel_perturbation=False)
    assert torch.equal(first, second)
    _, (first, second) = outputs(attention_perturbation=False)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("field", ["channel_perturbation", "attention_perturbation"])
def test_the_inference_form_refuses_what_it_does_not_compute(field):
    network, _ = outputs(**{field: False})
    with pytest.raises(ValueError, match="without DGCPM or CAAPM is an ablation"):
        InferenceDFPIR(network, orthogonal_bank())
