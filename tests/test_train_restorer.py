import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from classifier.labels import Degradation
from jobs import train_restorer
from jobs.train_restorer import COMPACT, TASKS, draw_sample, initialise, relative_l1, train
from jobs.training_data import CleanPhotographs
from models.dfpir import DFPIR, DFPIRConfig
from models.prompts import orthogonal_bank


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    folder = tmp_path / "photographs"
    folder.mkdir()
    images = [data.astronaut(), data.coffee(), data.chelsea()]
    for number in range(40):
        crop = np.roll(images[number % 3], 40 * number, axis=1)[:200, :200]
        Image.fromarray(crop).save(folder / f"photo-{number}.png")
    return folder


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    config = DFPIRConfig(
        dim=8, num_blocks=(1, 1, 1, 1), num_refinement_blocks=1, ffn_expansion_factor=1.5, unshuffle_factor=2
    )
    monkeypatch.setattr(train_restorer, "COMPACT", config)
    monkeypatch.setattr(train_restorer, "validate", lambda *args, **kwargs: {})


def arguments(folder: Path, out: Path, **more: object) -> argparse.Namespace:
    defaults: dict[str, object] = {
        "data": folder, "out": out, "steps": 30, "max_minutes": 1e9, "lr": 2e-3, "seed": 0,
        "threads": 1, "save_every_s": 1e9,
    }  # fmt: skip
    return argparse.Namespace(**(defaults | more))


def test_a_fresh_network_is_the_identity_and_tells_prompts_apart() -> None:
    torch.manual_seed(0)
    network = DFPIR(COMPACT)
    initialise(network)
    image, bank = torch.rand(1, 3, 32, 32), orthogonal_bank()
    with torch.no_grad():
        assert torch.equal(network(image, bank.embeddings[:1]), image)
        orders = [network.latent_shuffle_channel.permutations(bank.embeddings[i : i + 1]) for i in range(7)]
    assert len({tuple(order[0].tolist()) for order in orders}) == 7


def test_samples_are_eight_bit_and_carry_the_prompt_of_their_damage(photographs: Path) -> None:
    clean = CleanPhotographs.load(photographs, validation=False)
    rng = np.random.default_rng(0)
    prompts = set()
    for _ in range(8):
        for label in TASKS:
            sample = draw_sample(clean, rng, label=label, side_px=32)
            assert np.allclose(sample.degraded * 255, np.rint(sample.degraded * 255), atol=1e-4)
            assert sample.prompt.rstrip("0123456789") == label
            prompts.add(sample.prompt)
    assert prompts == set(orthogonal_bank().keys)


def test_the_loss_weighs_images_by_their_relative_error() -> None:
    clean = torch.zeros(2, 3, 4, 4)
    restored = torch.stack([torch.full((3, 4, 4), 0.5), torch.full((3, 4, 4), 0.05)]).requires_grad_()
    relative_l1(restored, clean).backward()
    weak, strong = (float(restored.grad[i].sum()) for i in range(2))  # type: ignore[index]
    assert 8 < strong / weak < 11


@pytest.mark.usefixtures("tiny")
def test_a_resumed_training_equals_an_unbroken_one(photographs: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole.pt", tmp_path / "parts.pt"
    train(arguments(photographs, whole, steps=4))

    real_save, saved = train_restorer.save_atomically, []

    def save_and_break(state: dict[str, object], path: Path) -> None:
        real_save(state, path)
        saved.append(state["step"])
        if len(saved) == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_restorer, "save_atomically", save_and_break)
        with pytest.raises(KeyboardInterrupt):
            train(arguments(photographs, parts, steps=4, save_every_s=0.0))
    assert saved == [1, 2]
    train(arguments(photographs, parts, steps=4))
    first, second = (torch.load(path, weights_only=True)["average"] for path in (whole, parts))
    assert all(torch.allclose(first[key], second[key], atol=1e-6) for key in first)


@pytest.mark.usefixtures("tiny")
def test_training_lowers_the_loss_on_noise(photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    phase = train_restorer.Phase(0.0, {Degradation.NOISE: 1.0}, 32, 4)
    monkeypatch.setattr(train_restorer, "PHASES", (phase,))
    monkeypatch.setattr("pipeline.synthesis.draw_noise_sigma", lambda rng: 40.0)
    losses = []

    def recorded(restored: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        loss = relative_l1(restored, clean)
        losses.append(float(loss.detach()))
        return loss

    monkeypatch.setattr(train_restorer, "relative_l1", recorded)
    train(arguments(photographs, tmp_path / "run.pt", steps=80, lr=5e-3))
    assert len(losses) == 80
    assert np.mean(losses[-20:]) < np.mean(losses[:20]) - 0.1
