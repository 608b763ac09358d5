import errno
import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from synthetic_weights import GOLDEN, TINY, golden_state, tiny_network, write_tiny_model

from models.dfpir import DFPIR, DFPIRConfig
from models.errors import WeightsError
from models.prompts import orthogonal_bank, prompt_permutations
from models.registry import SHIPPED_DIR, list_models, resolve, write_card
from models.released import infer_config
from models.restorer import load_restorer
from models.weights import (
    bank_beside,
    file_sha256,
    load_checkpoint,
    load_prompt_bank,
    save_checkpoint,
    save_prompt_bank,
)


@pytest.fixture
def own(tmp_path) -> Path:
    return write_tiny_model(tmp_path / "tiny.safetensors")


@pytest.fixture
def released(tmp_path) -> Path:
    """A checkpoint as the authors release them: under `state_dict`, keys as a parallel training leaves them."""
    path = tmp_path / "dfpir.pth.tar"
    state = {f"module.{key}": value for key, value in tiny_network(unshuffle_factor=1).state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state}, path)
    save_prompt_bank(bank_beside(path), orthogonal_bank())
    return path


def rewrite(path, *, metadata=None, tensors=None):
    """Changes entries of a safetensors file; None removes one."""
    with safe_open(path, framework="pt") as stream:
        held = dict(stream.metadata())
        found = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
    held = {key: value for key, value in (held | (metadata or {})).items() if value is not None}
    found = {key: value for key, value in (found | (tensors or {})).items() if value is not None}
    safetensors.torch.save_file(found, path, held)


def resave(path, change):
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


# Our own format


def test_what_was_saved_comes_back_rounded_to_float16_with_exact_guidance(own):
    network, checkpoint = tiny_network(), load_checkpoint(own)
    assert checkpoint.network.config == TINY
    for key, value in checkpoint.network.state_dict().items():
        exact = network.state_dict()[key]
        assert value.dtype == torch.float32
        assert torch.equal(value, exact if "linear_layer" in key else exact.half().float()), key
    assert not checkpoint.network.latent_shuffle_channel.linear_layer1.weight.requires_grad
    assert (checkpoint.licence, checkpoint.provenance) == ("Apache-2.0", {"training": "random weights"})
    assert checkpoint.sha256 == file_sha256(own)
    bank = orthogonal_bank()
    assert (checkpoint.prompts.keys, checkpoint.prompts.sentences) == (bank.keys, bank.sentences)
    assert torch.equal(checkpoint.prompts.embeddings, bank.embeddings)
    for block, order in prompt_permutations(network, bank.embeddings).items():
        assert torch.equal(checkpoint.prompts.permutations[block], order)


def test_weights_that_cannot_be_written_leave_the_previous_ones_alone(tmp_path, monkeypatch):
    path = write_tiny_model(tmp_path / "tiny.safetensors")
    before = path.read_bytes()

    def full(self, data):
        self.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, tiny_network(), orthogonal_bank(), licence="MIT", provenance={})
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before


def test_weights_may_be_read_by_whom_other_files_may(own, tmp_path):
    (tmp_path / "other").touch()
    assert own.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_weights_take_the_room_of_their_precision(own):
    with safe_open(own, framework="pt") as stream:
        dtypes = {key: stream.get_tensor(key).dtype for key in stream.keys()}  # noqa: SIM118
    for key, dtype in dtypes.items():
        if key.startswith("prompts.permutations."):
            assert dtype == torch.int32
        else:
            exact = "linear_layer" in key or key == "prompts.embeddings"
            assert dtype == (torch.float32 if exact else torch.float16), key


def test_saving_does_not_touch_the_network(tmp_path):
    network = tiny_network().to(torch.bfloat16)
    save_checkpoint(tmp_path / "a.safetensors", network, orthogonal_bank(), licence="MIT", provenance={})
    assert {value.dtype for value in network.state_dict().values()} == {torch.bfloat16}
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_windows_come_back_and_those_of_no_use_are_refused(tmp_path):
    network, path = tiny_network(), tmp_path / "windowed.safetensors"
    save = partial(save_checkpoint, path, network, orthogonal_bank(), licence="CC0-1.0", provenance={})
    save(windows_px={"rain": 256, "noise25": 384})
    assert load_checkpoint(path).windows_px == {"rain": 256, "noise25": 384}
    for windows_px in ({"snow": 256}, {"rain": 32}, {"rain": 260}, {"rain": 256.0}, {"rain": None}):
        with pytest.raises(WeightsError, match=r"a window of .* px for (snow|rain)"):
            save(windows_px=windows_px)
    save()
    assert load_checkpoint(path).windows_px == {}


def test_weights_that_float16_cannot_hold_are_not_saved(tmp_path):
    network = tiny_network()
    with torch.no_grad():
        network.output.weight[0] = 1e6
    with pytest.raises(WeightsError, match=r"not finite: network\.output\.weight"):
        save_checkpoint(tmp_path / "a.safetensors", network, orthogonal_bank(), licence="MIT", provenance={})
    assert not list(tmp_path.iterdir())


KEY = "network.output.weight"
DEEP = "[" * 100_000 + "]" * 100_000
"""More brackets than Python follows."""


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ({"format": None}, None, "lacks 'format' in its metadata"),
        ({"format": "other"}, None, "format 'other', not 'dfpir-weights'"),
        ({"format_version": "2"}, None, "format version 2; this release reads 1"),
        ({"architecture": "restormer"}, None, "unknown architecture 'restormer'; known: 'dfpir'"),
        ({"config": None}, None, "lacks 'config'"),
        ({"config": "{"}, None, "'config' in its metadata is not JSON"),
        ({"config": DEEP}, None, "'config' in its metadata is not JSON"),
        ({"config": f'{{"dim": {"9" * 5000}}}'}, None, "'config' in its metadata is not JSON"),
        ({"config": '{"num_refinement_blocks": [1]}'}, None, "cannot be built"),
        ({"config": "[]"}, None, "'config' in its metadata is a list, not a dict"),
        ({"config": '{"width": 3}'}, None, "not one of DFPIR.*width"),
        ({"config": '{"heads": [1, 2]}'}, None, "not one of DFPIR.*four entries"),
        ({"config": '{"dim": 8.0}'}, None, "describes a network that cannot be built.*8.0"),
        ({"config": '{"ffn_expansion_factor": 0}'}, None, "describes a network that cannot be built"),
        ({"config": '{"num_refinement_blocks": 999999999}'}, None, "1000000023 blocks, of 194 tensors"),
        ({"prompts": "[]"}, {"prompts.embeddings": torch.zeros(0, 512)}, "a prompt bank needs a prompt"),
        ({"prompts": "[{}]"}, None, "its prompts are not usable"),
        ({"prompts": '[{"key": "rain", "sentence": "Rain"}]'}, None, "one sentence and one embedding per key"),
        ({"licence": None}, None, "lacks 'licence'"),
        ({"provenance": None}, None, "lacks 'provenance'"),
        (None, {KEY: None}, r"missing keys: output\.weight$"),
        (None, {"network.extra.weight": torch.zeros(2)}, r"unexpected keys: extra\.weight$"),
        (None, {KEY: torch.zeros(2, 2)}, r"wrong shapes: output\.weight is \(2, 2\), not \(12, 16, 3, 3\)"),
        (None, {KEY: torch.full((12, 16, 3, 3), torch.nan)}, r"not finite: output\.weight"),
        (None, {KEY: torch.ones(12, 16, 3, 3, dtype=torch.bool)}, "no plain floating-point numbers: output"),
        (None, {KEY: torch.ones(12, 16, 3, 3).to(torch.float8_e4m3fn)}, "no plain floating-point numbers: output"),
        (None, {"prompts.embeddings": None}, r"missing key: prompts\.embeddings"),
        (None, {"prompts.embeddings": torch.full((7, 512), torch.inf)}, r"not finite: prompts\.embeddings"),
        (None, {"prompts.permutations.latent_shuffle_channel": None}, "missing keys: prompts.permutations.latent"),
        (None, {"prompts.permutations.latent_shuffle_channel": torch.zeros(7, 128)}, "no permutations of 128"),
        (None, {"stray": torch.zeros(1)}, "unexpected keys: stray"),
    ],
)  # fmt: skip
def test_every_fault_of_the_content_is_named(own, metadata, tensors, message):
    rewrite(own, metadata=metadata, tensors=tensors)
    with pytest.raises(WeightsError, match=message) as error:
        load_checkpoint(own)
    assert str(own) in str(error.value)


def test_every_fault_of_the_keys_is_named_at_once(own):
    rewrite(own, tensors={KEY: None, "network.a": torch.zeros(1), "network.patch_embed.proj.weight": torch.zeros(8)})
    with pytest.raises(WeightsError, match=r"missing keys: output\.weight; unexpected keys: a; wrong shapes: patch_em"):
        load_checkpoint(own)


def test_guidance_layers_of_another_network_are_refused_naming_the_block(own):
    other = tiny_network(seed=1).encoder_shuffle_channel2.linear_layer3.weight
    rewrite(own, tensors={"network.encoder_shuffle_channel2.linear_layer3.weight": other})
    with pytest.raises(WeightsError, match="channel orders stored for block encoder_shuffle_channel2"):
        load_checkpoint(own)


def test_channels_that_tie_to_rounding_may_be_stored_in_either_order(tmp_path):
    network, path = tiny_network(), tmp_path / "tied.safetensors"
    layer = network.encoder_shuffle_channel1.linear_layer3
    layer.weight[5], layer.bias[5] = layer.weight[2], layer.bias[2]
    save_checkpoint(path, network, orthogonal_bank(), licence="MIT", provenance={})
    name = "prompts.permutations.encoder_shuffle_channel1"
    order = load_checkpoint(path).prompts.permutations["encoder_shuffle_channel1"].clone()
    swapped = order.clone()
    swapped[order == 2], swapped[order == 5] = 5, 2
    rewrite(path, tensors={name: swapped.int()})
    assert torch.equal(load_checkpoint(path).prompts.permutations["encoder_shuffle_channel1"], swapped)


def test_a_cut_or_foreign_file_is_refused(own):
    content = own.read_bytes()
    for damaged in (content[: len(content) // 2], content[:4], b"", b"\x89PNG" * 100):
        own.write_bytes(damaged)
        with pytest.raises(WeightsError, match="not a safetensors file, or is cut short"):
            load_checkpoint(own)


def test_a_missing_file_and_an_unknown_suffix_are_refused(tmp_path):
    with pytest.raises(WeightsError, match="no such weights file"):
        load_checkpoint(tmp_path / "absent.safetensors")
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"ending in \.safetensors"):
        load_checkpoint(tmp_path / "weights.bin")


def test_a_wrong_hash_is_refused_naming_both(own):
    found, registered = file_sha256(own), "0" * 64
    with pytest.raises(WeightsError, match=f"{found}, but {registered} is registered"):
        load_checkpoint(own, expected_sha256=registered)


# Released checkpoints


def test_a_released_checkpoint_gives_the_same_network(released):
    checkpoint = load_checkpoint(released)
    network = tiny_network(unshuffle_factor=1)
    assert checkpoint.network.config == network.config
    image, prompts = torch.rand(1, 3, 16, 16), orthogonal_bank().embeddings[:1]
    with torch.inference_mode():
        assert torch.equal(checkpoint.network(image, prompts), network(image, prompts))
    assert set(checkpoint.prompts.permutations) == set(prompt_permutations(network, prompts))


def test_numbers_that_released_checkpoints_keep_of_an_earlier_attention_are_left_out(released):
    expected = load_checkpoint(released).network.state_dict()
    blocks = [f"encoder_shuffle_channel{level}" for level in (1, 2, 3)] + ["latent_shuffle_channel"]
    kept = {f"module.{block}.select_attn.attn{i}": torch.rand(1) for block in blocks for i in (1, 2, 3)}
    resave(released, lambda content: content["state_dict"].update(kept))
    found = load_checkpoint(released).network.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_another_bank_beside_a_released_checkpoint_is_another_model(released):
    first = load_checkpoint(released).sha256
    assert first == load_checkpoint(released).sha256 == load_checkpoint(released, orthogonal_bank()).sha256
    assert first != file_sha256(released)
    bank = orthogonal_bank()
    save_prompt_bank(bank_beside(released), replace(bank, embeddings=bank.embeddings.flip(0)))
    assert load_checkpoint(released).sha256 != first


def test_the_bank_of_a_released_checkpoint_may_be_given(released):
    bank_beside(released).unlink()
    assert load_checkpoint(released, orthogonal_bank()).prompts.keys == orthogonal_bank().keys
    with pytest.raises(WeightsError, match=r"carries no prompts.*dfpir\.prompts\.safetensors.*clip_bank"):
        load_checkpoint(released)


def test_a_bank_is_refused_for_weights_that_carry_their_own(own):
    with pytest.raises(WeightsError, match="carries its own prompts"):
        load_checkpoint(own, orthogonal_bank())


@pytest.mark.parametrize(
    "config",
    [
        DFPIRConfig(),
        TINY,
        DFPIRConfig(dim=24, num_blocks=(1, 2, 2, 2), num_refinement_blocks=1, ffn_expansion_factor=2.0),
        replace(TINY, dim=12, heads=(2, 2, 3, 4), ffn_expansion_factor=1.37, shuffle_expansion=3, unshuffle_factor=4),
    ],
)
def test_the_configuration_is_read_from_shapes(config):
    with torch.device("meta"):
        shapes = DFPIR(config).state_dict()
    found = infer_config(Path("a.pth.tar"), shapes)
    with torch.device("meta"):
        again = DFPIR(found).state_dict()
    assert {key: value.shape for key, value in again.items()} == {key: value.shape for key, value in shapes.items()}
    assert replace(found, ffn_expansion_factor=1) == replace(config, ffn_expansion_factor=1)
    assert found.ffn_expansion_factor == pytest.approx(config.ffn_expansion_factor, abs=0.01)


def test_the_published_keys_give_the_published_configuration():
    record = json.loads((GOLDEN / "dfpir_5d.json").read_text())
    assert infer_config(Path("dfpir_5d.pth.tar"), golden_state(record["keys"])) == DFPIRConfig(
        **{key: tuple(value) if isinstance(value, list) else value for key, value in record["config"].items()}
    )


def wrapped(checkpoint, prefix):
    """The state dict of a network of which the released one is a part."""
    return {key.replace("module.", prefix): value for key, value in checkpoint["state_dict"].items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("state_dict"), "expected an entry state_dict.*found epoch"),
        (lambda c: c["state_dict"].pop("module.output.weight"), r"missing keys: output\.weight$"),
        (lambda c: c["state_dict"].pop("module.patch_embed.proj.weight"), r"missing keys: patch_embed\.proj\.weight$"),
        (lambda c: c["state_dict"].update(extra=torch.zeros(1)), "unexpected keys: extra$"),
        (
            lambda c: c["state_dict"].update({"module.latent_shuffle_channel.select_attn.attn5": torch.zeros(1)}),
            r"unexpected keys: latent_shuffle_channel\.select_attn\.attn5$",
        ),
        (lambda c: c["state_dict"].update({"module.output.weight": torch.zeros(1)}), r"output\.weight is \(1,\), not"),
        (lambda c: c["state_dict"]["module.output.weight"].fill_(torch.nan), r"not finite: output\.weight"),
        (lambda c: c["state_dict"].update(note="text"), "no tensors: note"),
        (
            lambda c: c.update(state_dict=wrapped(c, "net.")),
            r"all keys of state_dict begin with 'net\.'; save its tens",
        ),
        (lambda c: c.update(state_dict=wrapped(c, "net.") | {"loss": torch.zeros(1)}), "missing keys: .*unexpected"),
        (lambda c: c["state_dict"].update({"module.latent.0.attn.temperature": torch.zeros(7, 1, 1)}), "fit no DFPIR"),
        (lambda c: c["state_dict"].update({"latent.999999999.x": torch.zeros(1)}), "1000000004 blocks, of 195 tensors"),
        (lambda c: c["state_dict"].update({f"latent.{'9' * 5000}.x": torch.zeros(1)}), "fit no DFPIR"),
    ],
)
def test_every_fault_of_a_released_checkpoint_is_named(released, change, message):
    resave(released, change)
    with pytest.raises(WeightsError, match=message) as error:
        load_checkpoint(released)
    assert str(released) in str(error.value)


class _Payload:
    """Writes a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_a_checkpoint_is_not_run(released, tmp_path):
    torch.save({"state_dict": {}, "payload": _Payload(tmp_path / "ran")}, released)
    with pytest.raises(
        WeightsError, match=r"tensors only.* not loaded \(Unsupported global: GLOBAL \w+ .*\)\. If it comes"
    ) as caught:
        load_checkpoint(released)
    assert "Please" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_with_more_than_tensors_is_told_how_to_be_saved_again(released):
    resave(released, lambda content: content.update(best_psnr_db=np.float64(31.2)))
    with pytest.raises(WeightsError, match=r'save its weights alone, as \{"state_dict": tensors by name\}$'):
        load_checkpoint(released)


def test_a_cut_or_foreign_released_checkpoint_is_refused(released):
    content = released.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"\x89PNG" * 100, b"(", b"junk bytes here"):
        released.write_bytes(damaged)
        with pytest.raises(WeightsError, match="cut short"):
            load_checkpoint(released)


# Banks


def test_a_bank_survives_saving(tmp_path):
    bank = orthogonal_bank()
    save_prompt_bank(tmp_path / "bank.safetensors", bank)
    loaded = load_prompt_bank(tmp_path / "bank.safetensors")
    assert (loaded.keys, loaded.sentences) == (bank.keys, bank.sentences)
    assert torch.equal(loaded.embeddings, bank.embeddings)


def test_a_faulty_bank_is_refused(tmp_path, own):
    with pytest.raises(WeightsError, match="no such file"):
        load_prompt_bank(tmp_path / "absent.safetensors")
    with pytest.raises(WeightsError, match="format 'dfpir-weights', not 'dfpir-prompts'"):
        load_prompt_bank(own)
    path = tmp_path / "bank.safetensors"
    save_prompt_bank(path, orthogonal_bank())
    rewrite(path, tensors={"embeddings": torch.full((7, 512), torch.nan)})
    with pytest.raises(WeightsError, match="not finite: embeddings"):
        load_prompt_bank(path)
    rewrite(path, tensors={"embeddings": None, "vectors": torch.zeros(7, 512)})
    with pytest.raises(WeightsError, match="embeddings alone, not vectors"):
        load_prompt_bank(path)


# Registry


def test_a_card_makes_a_shipped_model_that_loads_by_name(own):
    card = write_card(own, description="for tests", quality={"noise_gain_db": 1.5})
    assert card == own.with_suffix(".json")
    spec = resolve("tiny", own.parent).spec
    assert (spec.name, spec.file, spec.sha256) == ("tiny", own, file_sha256(own))
    assert spec.parameters == sum(p.numel() for p in tiny_network().parameters())
    assert (spec.prompts, spec.size_multiple, spec.licence) == (orthogonal_bank().keys, 16, "Apache-2.0")
    assert (spec.description, spec.quality) == ("for tests", {"noise_gain_db": 1.5})
    assert list_models(own.parent)[0] == spec


def test_a_shipped_model_of_another_hash_is_refused(own, monkeypatch):
    write_card(own, description="for tests", quality={})
    monkeypatch.setattr("models.restorer.resolve", lambda name: resolve(name, own.parent))
    assert load_restorer("tiny").name == "tiny"
    write_tiny_model(own, seed=1)
    with pytest.raises(WeightsError, match="is registered for it"):
        load_restorer("tiny")
    own.unlink()
    with pytest.raises(WeightsError, match="the weights of tiny, is missing"):
        load_restorer("tiny")


def test_names_are_listed_when_one_is_unknown_and_known_models_ask_for_a_path(own):
    write_card(own, description="for tests", quality={})
    with pytest.raises(WeightsError, match=r"shipped models: tiny$"):
        resolve("huge", own.parent)
    with pytest.raises(WeightsError, match=r"dfpir-5tasks is known but not shipped: give the path"):
        resolve("dfpir-5tasks", own.parent)


def test_a_damaged_card_is_refused(own):
    own.with_suffix(".json").write_text("{}")
    with pytest.raises(WeightsError, match=r"tiny\.json is not a model's card: KeyError"):
        list_models(own.parent)


def test_shipped_weights_are_those_of_their_cards():
    shipped = [spec for spec in list_models() if spec.file is not None and spec.file.parent == SHIPPED_DIR]
    if not shipped:
        pytest.skip("no weights are shipped in this checkout")
    for spec in shipped:
        checkpoint = load_checkpoint(spec.file, expected_sha256=spec.sha256)
        assert checkpoint.prompts.keys == spec.prompts
        assert sum(p.numel() for p in checkpoint.network.parameters()) == spec.parameters
