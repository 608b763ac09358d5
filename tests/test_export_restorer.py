"""A restorer's training becomes weights to ship, with the prompts that it has come to."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from synthetic_weights import tiny_network

from classifier.labels import Degradation
from jobs import export_restorer
from jobs.training_config import Data, Pairs, Phase, RestorerTraining, as_plain
from jobs.training_prompts import to_store
from jobs.training_state import config_digest
from models.prompts import orthogonal_bank
from models.registry import resolve
from models.weights import load_checkpoint


def training_of(model, **options):
    """Noise and no rain at first, haze from the middle on, blur in the last tenth."""
    shares = ((0.0, {"noise": 1.0, "rain": 0.0}), (0.5, {"haze": 0.5}), (0.9, {"blur": 1.0}))
    phases = tuple(
        Phase(start=start, patch_px=32, batch=1, tasks={Degradation(label): share for label, share in tasks.items()})
        for start, tasks in shares
    )
    options.setdefault("data", Data(clean=(Path("photographs"),)))
    return RestorerTraining(phases=phases, model=model, **options)


@pytest.mark.parametrize(
    ("step", "sigmas", "pairs", "learnt"),
    [
        (0, (), (), "noise15 noise25 noise50"),
        (5, (), (), "noise15 noise25 noise50"),
        (6, (), (), "noise15 noise25 noise50 haze"),
        (10, (25.0,), (), "noise25 haze blur"),
        (10, (15.0, 50.0), ("noise",), "noise15 noise25 noise50 haze blur"),
    ],
)
def test_an_export_has_the_prompts_that_its_training_has_come_to(step, sigmas, pairs, learnt):
    pairs = tuple(Pairs(Degradation(label), Path("noisy"), Path("clear")) for label in pairs)
    data = Data(clean=(Path("photographs"),), noise_sigmas_255=sigmas, pairs=pairs)
    config = training_of(tiny_network().config, steps=10, data=data)
    assert export_restorer._learnt(config, {"step": step, "seconds": 1.0}) == learnt.split()


def test_an_export_has_the_prompts_that_its_training_had(tmp_path, monkeypatch):
    """And not those that the file, of which they once came, holds by now."""
    network = tiny_network()
    bank = orthogonal_bank()
    own = replace(bank, embeddings=bank.embeddings.flip(0))
    config = as_plain(training_of(network.config, steps=7))
    state = {"config": config, "average": network.state_dict(), "step": 7, "seconds": 90.0} | to_store(own)
    torch.save(state, tmp_path / "checkpoint.pt")
    (tmp_path / "p.json").write_text("{}")
    options = ["--licence", "Apache-2.0", "--provenance", tmp_path / "p.json", "--description", "new"]
    monkeypatch.setattr(sys, "argv", ["e", *map(str, [tmp_path, tmp_path / "new.safetensors", *options])])
    export_restorer.main()
    exported = load_checkpoint(tmp_path / "new.safetensors").prompts
    assert torch.equal(exported.embeddings, own.only(exported.keys).embeddings)


def test_a_training_checkpoint_is_exported_with_its_card(tmp_path, monkeypatch):
    network = tiny_network()
    training, out = tmp_path / "run", tmp_path / "shipped" / "new.safetensors"
    training.mkdir()
    out.parent.mkdir()
    config = as_plain(training_of(network.config, steps=7))
    state = {"config": config, "average": network.state_dict(), "step": 7, "seconds": 90.0} | to_store(
        orthogonal_bank()
    )
    torch.save(state, training / "checkpoint.pt")
    (tmp_path / "provenance.json").write_text('{"data": "made up"}')
    options = ["--licence", "Apache-2.0", "--provenance", tmp_path / "provenance.json", "--description", "new"]
    monkeypatch.setattr(sys, "argv", ["export_restorer", *map(str, [training, out, *options])])
    export_restorer.main()
    loaded = load_checkpoint(out)
    assert loaded.network.config == network.config
    assert torch.equal(loaded.network.output.weight, network.output.weight.half().float())
    made = {"data": "made up", "steps": 7, "training_minutes": 1.5, "config_sha256": config_digest(config)}
    assert loaded.provenance == made
    assert resolve("new", out.parent).spec.description == "new"
    assert loaded.prompts.keys == (
        "noise15",
        "noise25",
        "noise50",
        "haze",
        "blur",
    )  # what the phases never asked for is not there


@pytest.mark.parametrize(
    ("training", "provenance", "out", "said"),
    [
        ("none", "{}", "new.safetensors", "cannot read .*none/checkpoint.pt: No such file.*; give the folder"),
        ("run", None, "new.safetensors", r"cannot read .*p\.json: No such file"),
        ("run", "[", "new.safetensors", r"p\.json is not JSON"),
        ("run", "[]", "new.safetensors", r"p\.json holds no JSON object"),
        ("run", "{}", "run/checkpoint.pt", r"names end in \.safetensors; choose another name"),
        ("run", "{}", "none/new.safetensors", r"new\.safetensors and its card cannot be written"),
        ("other", "{}", "new.safetensors", r"checkpoint\.pt is no checkpoint of a restorer's training: ValueError"),
    ],
)
def test_an_export_tells_wrong_inputs_without_a_traceback(
    tmp_path, monkeypatch, training, provenance, out, said, refuses
):
    network = tiny_network()
    whole = {
        "config": as_plain(training_of(network.config, steps=7)),
        "average": network.state_dict(),
        "step": 7,
        "seconds": 90.0,
    } | to_store(orthogonal_bank())
    for name, state in (("run", whole), ("other", {"config": {}})):
        (tmp_path / name).mkdir()
        torch.save(state, tmp_path / name / "checkpoint.pt")
    if provenance is not None:
        (tmp_path / "p.json").write_text(provenance)
    options = ["--licence", "Apache-2.0", "--provenance", tmp_path / "p.json", "--description", "new"]
    monkeypatch.setattr(sys, "argv", ["export_restorer", *map(str, [tmp_path / training, tmp_path / out, *options])])
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    with refuses(said):
        export_restorer.main()
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
