import errno
import logging
import math
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from classifier.labels import Degradation
from jobs import train_restorer, training_state
from jobs.errors import InterruptedBySignalError, TrainingError, UsageError
from jobs.restorer_samples import Ahead, Batch, Batches, ReadyBatch, Sources
from jobs.train_restorer import (
    PORTABLE,
    Training,
    initialise,
    plain_l1,
    relative_l1,
    train,
)
from jobs.training_config import ConfigError, Data, Pairs, Phase, RestorerTraining, read_config
from jobs.training_data import is_validation
from jobs.training_diary import Diary
from jobs.training_loop import prefetch
from jobs.training_prompts import prompt_bank
from jobs.training_state import CHECKPOINT, found_state
from models.dfpir import DFPIR, DFPIRConfig
from models.prompts import orthogonal_bank
from models.registry import resolve
from models.weights import load_checkpoint, save_checkpoint
from pipeline.degradations import MotionBlur
from pipeline.synthesis import from_uint8, to_uint8, well_exposed

CPU = torch.device("cpu")
COMPACT = read_config(RestorerTraining, Path(__file__).parents[1] / "configs" / "compact.toml")
TINY = DFPIRConfig(
    dim=8, num_blocks=(1, 1, 1, 1), num_refinement_blocks=1, ffn_expansion_factor=1.5, unshuffle_factor=2
)

EVERYTHING = {label: 1.0 for label in Degradation if label not in (Degradation.CLEAN, Degradation.OTHER)}


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
def quick_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_restorer, "VALIDATION_PX", 32)
    monkeypatch.setattr(train_restorer, "VALIDATION_PATCHES", 1)


def tiny(folder: Path, **more: object) -> RestorerTraining:
    phase = Phase(start=0.0, patch_px=32, batch=2, tasks=EVERYTHING)
    options: dict[str, object] = {
        "data": Data(clean=(folder,)), "phases": (phase,), "model": TINY, "steps": 4, "initialisation": "identity",
        "loss": "relative", "learning_rate": 2e-3, "betas": (0.9, 0.98), "clip_norm": 2.0,
    }  # fmt: skip
    return RestorerTraining(**(options | more))  # type: ignore[arg-type]


def test_a_fresh_network_is_the_identity_and_tells_prompts_apart() -> None:
    torch.manual_seed(0)
    network = DFPIR(COMPACT.model)
    initialise(network)
    image, bank = torch.rand(1, 3, 32, 32), orthogonal_bank()
    with torch.no_grad():
        assert torch.equal(network(image, bank.embeddings[:1]), image)
        orders = [network.latent_shuffle_channel.permutations(bank.embeddings[i : i + 1]) for i in range(7)]
    assert len({tuple(order[0].tolist()) for order in orders}) == 7


def test_samples_are_eight_bit_and_carry_the_prompt_of_their_damage(photographs: Path) -> None:
    sources = Sources.load(Data(clean=(photographs,))).part(validation=False)
    rng = np.random.default_rng(0)
    prompts = set()
    for _ in range(12):
        for label in EVERYTHING:
            sample = sources.draw(rng, label=label, side_px=32, jpeg_share=0.5)
            assert isinstance(sample.degraded, np.ndarray)
            assert sample.degraded.dtype == sample.clean.dtype == np.uint8
            assert sample.prompt.rstrip("0123456789") == label
            prompts.add(sample.prompt)
    assert prompts == set(orthogonal_bank().keys)


def test_low_light_is_to_become_what_a_longer_exposure_shows(photographs: Path) -> None:
    sources = Sources.load(Data(clean=(photographs,))).part(validation=False)
    draw = partial(sources.draw, side_px=32, jpeg_share=0.0)
    for seed in range(10):
        taken, lifted = (
            draw(np.random.default_rng(seed), label=label).clean for label in (Degradation.RAIN, Degradation.LOWLIGHT)
        )
        assert np.array_equal(lifted, to_uint8(well_exposed(from_uint8(taken))))


def test_what_a_gpu_makes_of_recipes_is_what_loaders_make_of_them(photographs: Path) -> None:
    phase = Phase(start=0.0, patch_px=64, batch=40, tasks=EVERYTHING)
    config = tiny(photographs, phases=(phase,), jpeg_share=0.2)
    sources = Sources.load(config.data).part(validation=False)
    made, left = (Batches(sources, config, slice(None), as_recipe=flag)[3, phase] for flag in (False, True))
    assert not made.recipes
    assert 20 <= len(left.recipes) < 40  # sensor noise and JPEG are made where they are drawn
    first, second = made.to(CPU), left.to(CPU)
    assert first.prompts == second.prompts
    assert torch.equal(first.clean, second.clean)
    levels = (first.degraded - second.degraded).abs() * 255
    assert levels.max() < 1.01  # rounded to eight bits, of numbers that differ by rounding
    assert (levels > 0.5).float().mean() < 1e-3


def test_batches_come_in_order_whether_prepared_or_not(photographs: Path) -> None:
    phase = Phase(start=0.0, patch_px=32, batch=2, tasks=EVERYTHING)
    config = tiny(photographs, phases=(phase,))
    made = Batches(Sources.load(config.data).part(validation=False), config, slice(None))
    wanted = [made[step, phase].names for step in range(4)]
    ahead = Ahead((made[step, phase] for step in range(4)), CPU)
    found = [ahead.take().names]
    for _ in range(2):
        ahead.prepare()
        found.append(ahead.take().names)
    found.append(ahead.take().names)
    assert found == wanted


def test_a_batch_that_cannot_be_made_spares_the_step_before() -> None:
    def broken() -> Iterator[Batch]:
        raise UsageError("the photograph is gone")
        yield

    ahead = Ahead(broken(), CPU)
    ahead.prepare()
    with pytest.raises(UsageError, match="the photograph is gone"):
        ahead.take()


def test_blur_comes_along_few_paths_first(photographs: Path) -> None:
    phase = Phase(start=0.0, patch_px=32, batch=24, tasks={Degradation.BLUR: 1.0})
    config = tiny(photographs)

    def recipes(paths: int) -> list[MotionBlur]:
        sources = Sources.load(config.data).part(validation=False)
        found = [
            sample.degraded for sample in sources.batch(config, replace(phase, blur_paths=paths), 0, as_recipe=True)
        ]
        return [recipe for recipe in found if isinstance(recipe, MotionBlur)]

    few, more, all_new = ({recipe.path.tobytes() for recipe in recipes(paths)} for paths in (3, 200, 0))
    assert len(few) == 3
    assert len(more) > 15
    assert len(all_new) == 24
    assert len({recipe.seed for recipe in recipes(3)}) == 24  # noise is new
    assert few <= {recipe.path.tobytes() for recipe in recipes(4)}


def test_samples_do_not_depend_on_the_order_in_which_a_configuration_names_tasks(photographs: Path) -> None:
    config = tiny(photographs)
    sources = Sources.load(config.data).part(validation=False)
    turned = replace(config.phases[0], tasks=dict(reversed(config.phases[0].tasks.items())))
    for step in range(4):
        first, second = (sources.batch(config, phase, step) for phase in (config.phases[0], turned))
        assert [sample.prompt for sample in first] == [sample.prompt for sample in second]


def test_other_work_is_done_between_gradient_and_update(photographs: Path, tmp_path: Path) -> None:
    config = tiny(photographs)
    training = Training(config, tmp_path, CPU)
    batch = Sources.load(config.data).part(validation=False).batch(config, config.phases[0], 0)
    before = {name: p.detach().clone() for name, p in training.trained.items()}
    seen = []

    def look() -> None:
        unchanged = all(torch.equal(p, before[name]) for name, p in training.trained.items())
        seen.append((unchanged, any(p.grad is not None and p.grad.any() for p in training.trained.values())))

    training.learn(Batch.of(batch).to(CPU), look)
    assert seen == [(True, True)]
    assert any(not torch.equal(p, before[name]) for name, p in training.trained.items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.usefixtures("quick_validation")
def test_a_gpu_learns_the_same_with_and_without_loaders(photographs: Path, tmp_path: Path) -> None:
    config = tiny(photographs, steps=3)
    train(config, tmp_path / "between", device="cuda")
    train(config, tmp_path / "ahead", device="cuda", loaders=2)
    first, second = averages(tmp_path / "between"), averages(tmp_path / "ahead")
    close = [torch.isclose(first[key].float(), second[key].float(), atol=1e-4).float().mean() for key in first]
    assert float(torch.stack(close).mean()) > 0.98


def test_noise_may_be_of_the_published_strengths_alone(photographs: Path) -> None:
    sources = Sources.load(Data(clean=(photographs,), noise_sigmas_255=(15.0, 50.0))).part(validation=False)
    rng = np.random.default_rng(0)
    for _ in range(12):
        sample = sources.draw(rng, label=Degradation.NOISE, side_px=64, jpeg_share=0.0)
        assert isinstance(sample.degraded, np.ndarray)
        inside = (sample.clean > 115) & (sample.clean < 140)
        spread = float((sample.degraded.astype(float) - sample.clean)[inside].std())
        assert inside.sum() < 100 or abs(spread - int(sample.prompt.removeprefix("noise"))) < 6
        assert sample.prompt in ("noise15", "noise50")


def test_pairs_are_used_for_their_label_alone_in_the_share_asked_for(photographs: Path, tmp_path: Path) -> None:
    degraded = tmp_path / "degraded"
    degraded.mkdir()
    for path in photographs.iterdir():
        Image.new("RGB", (200, 200), "green").save(degraded / path.name)
    pairs = (Pairs(Degradation.RAIN, degraded, photographs),)
    rng = np.random.default_rng(0)

    def share_of_pairs(label: Degradation, **options: object) -> float:
        sources = Sources.load(Data(pairs=pairs, **options)).part(validation=False)  # type: ignore[arg-type]
        drawn = [sources.draw(rng, label=label, side_px=32, jpeg_share=0.0).degraded for _ in range(60)]
        flat = [np.ptp(cast(np.ndarray, image).reshape(-1, 3), axis=0).max() == 0 for image in drawn]
        return float(np.mean(flat))

    assert share_of_pairs(Degradation.RAIN) == 1
    assert 0.05 < share_of_pairs(Degradation.RAIN, clean=(photographs,), pair_share=0.25) < 0.5
    assert share_of_pairs(Degradation.HAZE, clean=(photographs,)) == 0
    with pytest.raises(UsageError, match="neither clean photographs nor pairs for haze"):
        share_of_pairs(Degradation.HAZE)


def test_the_relative_loss_weighs_images_by_their_relative_error() -> None:
    clean = torch.zeros(2, 3, 4, 4)
    restored = torch.stack([torch.full((3, 4, 4), 0.5), torch.full((3, 4, 4), 0.05)]).requires_grad_()
    relative_l1(restored, clean).backward()
    weak, strong = (float(restored.grad[i].sum()) for i in range(2))  # type: ignore[index]
    assert 8 < strong / weak < 11
    assert float(plain_l1(restored, clean).detach()) == pytest.approx(0.275)


def averages(out: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(out / CHECKPOINT, weights_only=True)["average"]
    return found


def break_at(step: int) -> Callable[..., float]:
    whole = Training.learn

    def learn(self: Training, batch: ReadyBatch, *meanwhile: Callable[[], None]) -> float:
        if self.step == step:
            raise KeyboardInterrupt
        return whole(self, batch, *meanwhile)

    return learn


@pytest.mark.usefixtures("quick_validation")
def test_a_resumed_training_equals_an_unbroken_one(photographs: Path, tmp_path: Path) -> None:
    phases = tuple(Phase(start=s, patch_px=p, batch=2, tasks=EVERYTHING) for s, p in ((0.0, 32), (0.5, 48)))
    config = tiny(photographs, phases=phases)
    train(config, tmp_path / "whole", threads=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "learn", break_at(2))
        patch.setattr("jobs.training_loop.SAVE_EVERY_S", 0.0)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "parts", threads=1)
    assert train(config, tmp_path / "parts", threads=1).step == 4
    first, second = averages(tmp_path / "whole"), averages(tmp_path / "parts")
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.usefixtures("quick_validation")
def test_samples_made_ahead_by_other_processes_change_nothing(photographs: Path, tmp_path: Path) -> None:
    config = tiny(photographs, steps=3)
    train(config, tmp_path / "between", threads=1)
    train(config, tmp_path / "ahead", threads=1, loaders=2)
    first, second = averages(tmp_path / "between"), averages(tmp_path / "ahead")
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_loader_processes_share_the_photographs(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though Python would begin them anew and send each the photographs, as it does from 3.14 on."""
    config = tiny(photographs)
    samples = Batches(Sources.load(config.data), config, slice(None))
    monkeypatch.setattr(Batches, "__reduce__", lambda self: pytest.fail("the photographs are sent"))
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        (made,) = prefetch(samples, [(0, config.phases[0])], loaders=1)
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert isinstance(made, Batch)


@pytest.mark.usefixtures("quick_validation")
def test_a_compiled_training_gives_what_a_plain_one_does(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without its C++ backend, which takes minutes: the graph is taken from the network and run operator by operator.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    config = tiny(photographs, steps=2)
    plain = train(config, tmp_path / "plain", threads=1)
    compiled = train(config, tmp_path / "compiled", threads=1, compiled=True)
    assert compiled.learner is not compiled.network
    first, second = averages(tmp_path / "plain"), averages(tmp_path / "compiled")
    assert first.keys() == second.keys()
    close = [torch.isclose(first[key].float(), second[key].float(), atol=1e-4).float().mean() for key in first]
    assert float(torch.stack(close).mean()) > 0.99
    assert plain.step == compiled.step == 2


def test_a_network_that_cannot_be_compiled_is_told_plainly(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(graph: object, inputs: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    with pytest.raises(TrainingError, match=r"(?s)cannot be compiled here, try without --compile.*no compiler"):
        train(tiny(photographs), tmp_path, threads=1, compiled=True)


@pytest.mark.usefixtures("quick_validation")
def test_a_call_ends_after_its_minutes_and_the_next_goes_on(photographs: Path, tmp_path: Path) -> None:
    config = tiny(photographs, steps=2)
    assert train(config, tmp_path / "out", threads=1, max_minutes=0.0).step == 0
    assert not (tmp_path / "out" / "samples").exists()  # nothing to validate
    assert train(config, tmp_path / "out", threads=1).step == 2
    assert train(config, tmp_path / "out", threads=1).step == 2
    assert (tmp_path / "out" / "samples" / "step-0000002.png").exists()


@pytest.mark.usefixtures("quick_validation")
def test_ctrl_c_ends_a_training_with_a_checkpoint_and_the_next_call_goes_on(photographs: Path, tmp_path: Path) -> None:
    train(tiny(photographs), tmp_path / "whole", threads=1)
    learn = Training.learn

    def learn_and_interrupt(training: Training, batch: ReadyBatch, *meanwhile: Callable[[], None]) -> float:
        if training.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return learn(training, batch, *meanwhile)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "learn", learn_and_interrupt)
        with pytest.raises(InterruptedBySignalError, match="ended by SIGINT; the same command goes on"):
            train(tiny(photographs), tmp_path / "cut", threads=1)
    assert torch.load(tmp_path / "cut" / CHECKPOINT, weights_only=True)["step"] == 3
    assert not (tmp_path / "cut" / "samples").exists()  # who asks for the end waits for no validation
    assert train(tiny(photographs), tmp_path / "cut", threads=1).step == 4
    first, second = averages(tmp_path / "whole"), averages(tmp_path / "cut")
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.usefixtures("quick_validation")
def test_ctrl_c_leaves_the_processes_that_make_samples_alone(photographs: Path, tmp_path: Path) -> None:
    learn = Training.learn

    def learn_and_interrupt(training: Training, batch: ReadyBatch, *meanwhile: Callable[[], None]) -> float:
        if training.step == 1:  # a terminal sends SIGINT to all of its processes
            loaders = multiprocessing.active_children()
            assert loaders
            for each in loaders:
                os.kill(cast(int, each.pid), signal.SIGINT)
        return learn(training, batch, *meanwhile)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "learn", learn_and_interrupt)
        assert train(tiny(photographs, steps=8), tmp_path, threads=1, loaders=1).step == 8


@pytest.mark.usefixtures("quick_validation")
@pytest.mark.parametrize("loaders", [0, 1])
def test_a_photograph_that_cannot_be_read_any_more_ends_a_training_with_a_checkpoint(
    photographs: Path, tmp_path: Path, loaders: int
) -> None:
    config = tiny(photographs, data=Data(clean=(photographs,), on_disk=True), steps=6)
    whole, learn = {path: path.read_bytes() for path in photographs.iterdir()}, Training.learn

    def learn_and_spoil(training: Training, batch: ReadyBatch, *meanwhile: Callable[[], None]) -> float:
        for path in whole:
            path.write_bytes(b"no image")
        return learn(training, batch, *meanwhile)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "learn", learn_and_spoil)
        with pytest.raises(
            TrainingError, match=r"^cannot read .*photo-\d+\.png: .*, at step [1-5]; last good"
        ) as caught:
            train(config, tmp_path / "out", threads=1, loaders=loaders)
    step = torch.load(tmp_path / "out" / CHECKPOINT, weights_only=True)["step"]
    assert f"at step {step};" in str(caught.value)
    lost = next(path for path in whole if not is_validation(path.name))
    for path in whole.keys() - {lost}:
        path.write_bytes(whole[path])
    assert train(config, tmp_path / "out", threads=1).step == 6
    log = (tmp_path / "out" / "training.log").read_text()
    assert f"skipped a photograph: cannot read {lost}" in log
    assert "the photographs are not those of the checkpoint: it had" in log


def test_a_training_that_cannot_begin_leaves_its_folder_empty(photographs: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere is not a folder"):
        train(tiny(photographs / "nowhere"), tmp_path / "out", threads=1)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.usefixtures("quick_validation")
def test_a_portable_checkpoint_goes_on_elsewhere_in_half_precision(photographs: Path, tmp_path: Path) -> None:
    config = tiny(photographs)
    here, there = tmp_path / "here", tmp_path / "there"
    train(config, here, threads=1)
    there.mkdir()
    (there / PORTABLE).write_bytes((here / PORTABLE).read_bytes())
    # Of the tiny network most is guidance, which is in it once.
    assert (there / PORTABLE).stat().st_size < (here / CHECKPOINT).stat().st_size / 2

    def of_another_library(*arguments: Any) -> Any:
        """Which draws other random numbers on the way."""
        torch.rand(7)
        return found_state(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_restorer, "found_state", of_another_library)
        resumed = Training(config, there, CPU)
    assert resumed.step == 4
    wanted = averages(here)
    for key, value in resumed.average.state_dict().items():
        assert torch.allclose(value, wanted[key], rtol=1e-3, atol=1e-4), key
        if "linear_layer" in key:
            assert torch.equal(value, wanted[key]), key
            assert torch.equal(resumed.network.state_dict()[key], wanted[key]), key


@pytest.mark.parametrize("name", [CHECKPOINT, PORTABLE])
def test_a_checkpoint_that_cannot_be_taken_up_is_named(photographs: Path, tmp_path: Path, name: str) -> None:
    config = tiny(photographs)
    Training(config, tmp_path, CPU).save()
    if name == PORTABLE:
        (tmp_path / CHECKPOINT).unlink()
    whole = (tmp_path / name).read_bytes()
    state = torch.load(tmp_path / name, weights_only=True)
    advice = "go on from portable.pt" if name == CHECKPOINT else "begin anew"

    def check() -> None:
        with pytest.raises(UsageError, match=f"{name} is damaged or no such checkpoint; move it away to {advice}: "):
            Training(config, tmp_path, CPU)

    for content in (b"", b"no checkpoint", whole[: len(whole) // 2]):
        (tmp_path / name).write_bytes(content)
        check()
    other_weights = {"output.weight": torch.zeros(3)}
    cut = {name: tensor for name, tensor in state["network"].items() if name != "output.weight"}
    for spoilt in (
        {"weights": 3},
        3,
        state | {"network": other_weights},
        state | {"network": cut},
        state | {"average": 3},
        {field: value for field, value in state.items() if field != "prompts"},
    ):
        torch.save(spoilt, tmp_path / name)
        check()


@pytest.mark.usefixtures("quick_validation")
def test_a_portable_checkpoint_of_a_training_that_is_over_becomes_a_whole_one(
    photographs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny(photographs)
    train(config, tmp_path / "here", threads=1)
    wanted = averages(tmp_path / "here")
    (tmp_path / "there").mkdir()
    shutil.copy(tmp_path / "here" / PORTABLE, tmp_path / "there")
    with caplog.at_level("INFO"):
        train(config, tmp_path / "there", threads=1)
    assert "the training is over" in caplog.text
    found = averages(tmp_path / "there")
    assert any("linear_layer" in key for key in found)
    for key, value in found.items():
        assert torch.allclose(value, wanted[key], rtol=1e-3, atol=1e-4), key


@pytest.mark.usefixtures("quick_validation")
def test_a_portable_checkpoint_is_all_that_a_training_goes_on_from(photographs: Path, tmp_path: Path) -> None:
    train(tiny(photographs, seed=1), tmp_path / "first", threads=1)
    config = tiny(photographs, start_from=tmp_path / "first" / CHECKPOINT)
    begun = Training(config, tmp_path / "here", CPU)
    begun.save()
    (tmp_path / "here" / CHECKPOINT).unlink()
    (tmp_path / "first" / CHECKPOINT).unlink()
    for network in (
        Training(config, tmp_path / "here", CPU).average,
        Training(tiny(photographs, start_from=tmp_path / "here" / PORTABLE), tmp_path / "third", CPU).network,
    ):
        for key, value in network.state_dict().items():
            wanted = begun.average.state_dict()[key]
            assert torch.equal(value, wanted if "linear_layer" in key else wanted.half().float()), key


@pytest.mark.usefixtures("quick_validation")
def test_a_training_may_start_from_anothers_average(photographs: Path, tmp_path: Path) -> None:
    train(tiny(photographs), tmp_path / "first", threads=1)
    second = tiny(photographs, start_from=tmp_path / "first" / CHECKPOINT, seed=1)
    begun = Training(second, tmp_path / "second", CPU)
    wanted = averages(tmp_path / "first")
    assert begun.step == 0
    assert all(torch.equal(value, wanted[key]) for key, value in begun.network.state_dict().items())


def test_a_training_may_start_from_a_models_weights(photographs: Path, tmp_path: Path) -> None:
    begun = Training(tiny(photographs, model=COMPACT.model, start_from=Path("dfpir-compact")), tmp_path, CPU)
    wanted = load_checkpoint(resolve("dfpir-compact").path).network.state_dict()
    assert begun.step == 0
    assert all(torch.equal(value, wanted[key]) for key, value in begun.network.state_dict().items())


def test_weights_of_another_network_are_not_started_from(photographs: Path, tmp_path: Path) -> None:
    torch.save({"average": {"weight": torch.zeros(3)}}, tmp_path / "other.pt")
    with pytest.raises(UsageError, match=r"other\.pt is of another network: .*DFPIR"):
        Training(tiny(photographs, start_from=tmp_path / "other.pt"), tmp_path, CPU)
    torch.save({"average": None}, tmp_path / "other.pt")
    with pytest.raises(UsageError, match=r"other\.pt is of another network: .*NoneType"):
        Training(tiny(photographs, start_from=tmp_path / "other.pt"), tmp_path, CPU)
    whole = (tmp_path / "other.pt").read_bytes()
    for content in (b"no checkpoint", b"a", b"", whole[: len(whole) // 2], whole.replace(b"average", b"\xff" * 7)):
        (tmp_path / "spoilt.pt").write_bytes(content)
        with pytest.raises(UsageError, match=r"start_from .*spoilt\.pt is no checkpoint"):
            Training(tiny(photographs, start_from=tmp_path / "spoilt.pt"), tmp_path, CPU)
    with pytest.raises(UsageError, match=r"dfpir-compact is .*dim=24.*model is .*dim=8"):
        Training(tiny(photographs, start_from=Path("dfpir-compact")), tmp_path, CPU)
    other = replace(COMPACT.model, kept_fraction=0.5)  # of the same shapes
    with pytest.raises(UsageError, match=r"dfpir-compact is .*, the configuration's model is "):
        Training(tiny(photographs, model=other, start_from=Path("dfpir-compact")), tmp_path, CPU)
    with pytest.raises(UsageError, match=r"start_from: .*neither a weights file nor a shipped model"):
        Training(tiny(photographs, start_from=Path("nowhere.safetensors")), tmp_path, CPU)


@pytest.mark.usefixtures("quick_validation")
def test_another_configuration_is_refused_with_the_fields_that_differ(photographs: Path, tmp_path: Path) -> None:
    train(tiny(photographs, steps=1), tmp_path / "out", threads=1)
    with pytest.raises(ConfigError, match=r"learning_rate: was 0\.002, is now 0\.001"):
        train(tiny(photographs, steps=1, learning_rate=1e-3), tmp_path / "out", threads=1)


@pytest.mark.usefixtures("quick_validation")
def test_a_loss_that_is_no_number_stops_with_step_batch_and_checkpoint(photographs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(tiny(photographs), out, threads=1, max_minutes=0.0)
    before = (out / CHECKPOINT).read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train_restorer.LOSSES, "relative", lambda restored, clean: restored.sum() * math.nan)
        with pytest.raises(TrainingError, match=r"loss nan.*step 0, batch photo-\d+\.png \(\w+\).*checkpoint\.pt"):
            train(tiny(photographs), out, threads=1)
    assert (out / CHECKPOINT).read_bytes() == before


@pytest.mark.usefixtures("quick_validation")
@pytest.mark.parametrize("fault", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_full_memory_ends_a_training_with_its_step_and_checkpoint(
    photographs: Path, tmp_path: Path, fault: Exception
) -> None:
    train(tiny(photographs), tmp_path, threads=1, max_minutes=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "learn", Mock(side_effect=fault))
        with pytest.raises(TrainingError, match=r"memory is full at step 0; last good checkpoint: .*checkpoint\.pt"):
            train(tiny(photographs), tmp_path, threads=1)
        patch.setattr(Training, "learn", Mock(side_effect=RuntimeError("another fault")))
        with pytest.raises(RuntimeError, match="another fault"):
            train(tiny(photographs), tmp_path, threads=1)
    assert train(tiny(photographs), tmp_path, threads=1).step == 4


@pytest.mark.parametrize("room", [100, 100_000], ids=["none", "a part"])
def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path: Path, room: int) -> None:
    path = tmp_path / CHECKPOINT
    training_state.save_atomically({"step": 1}, path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        said = r"could not be written, last good checkpoint: .*checkpoint\.pt: \[Errno 27\] File too large"
        with pytest.raises(TrainingError, match=said):
            training_state.save_atomically({"step": 2, "weights": torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("device", "message"),
    [
        pytest.param(
            "cuda",
            "--device cuda: no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has one"),
        ),
        ("gpu0", "--device gpu0: expected cpu"),
    ],
)
def test_a_device_that_is_not_there_is_told_before_anything_is_written(
    photographs: Path, tmp_path: Path, device: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        train(tiny(photographs), tmp_path / "out", device=device)
    assert not (tmp_path / "out").exists()


def test_the_command_of_a_bare_host_tells_faults_plainly(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("stepz = 3")
    command = [sys.executable, "-m", "jobs.train_restorer", str(tmp_path / "c.toml"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "unknown key stepz" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("quick_validation")
def test_training_lowers_the_loss_on_noise(photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noisy = Data(clean=(photographs,), noise_sigmas_255=(40.0,))
    phase = Phase(start=0.0, patch_px=32, batch=4, tasks={Degradation.NOISE: 1.0})
    losses = []
    whole = Training.learn

    def recorded(self: Training, batch: ReadyBatch, *meanwhile: Callable[[], None]) -> float:
        losses.append(whole(self, batch, *meanwhile))
        return losses[-1]

    monkeypatch.setattr(Training, "learn", recorded)
    train(tiny(photographs, data=noisy, phases=(phase,), steps=80, learning_rate=5e-3), tmp_path / "out", threads=1)
    assert len(losses) == 80
    assert np.mean(losses[-20:]) < np.mean(losses[:20]) - 0.1


def test_a_label_is_drawn_apart_from_its_sample(photographs: Path, tmp_path: Path) -> None:
    """Were both drawn from the same numbers, the first sample of a batch would be a pair always or never."""
    degraded = tmp_path / "degraded"
    degraded.mkdir()
    for path in photographs.iterdir():
        Image.new("RGB", (200, 200), "green").save(degraded / path.name)
    phase = Phase(start=0.0, patch_px=32, batch=1, tasks={Degradation.NOISE: 0.5, Degradation.RAIN: 0.5})
    config = tiny(photographs, phases=(phase,))
    mixed = Data(clean=(photographs,), pairs=(Pairs(Degradation.RAIN, degraded, photographs),))
    batches = Batches(Sources.load(mixed).part(validation=False), config, slice(None))
    rainy = [batch.degraded for step in range(80) if (batch := batches[step, phase]).prompts == ("rain",)]
    green = [len(pixels.flatten(0, 2).unique(dim=0)) == 1 for pixels in rainy]
    assert 0.2 < np.mean(green) < 0.8


def test_prompts_that_a_task_needs_are_asked_for(photographs: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"prompts: .*no such file"):
        Training(tiny(photographs, prompts="clip:nowhere.pt"), tmp_path, CPU)
    with pytest.raises(UsageError, match=r"start_from .*nowhere\.pt is no checkpoint"):
        Training(tiny(photographs, start_from=Path("nowhere.pt")), tmp_path, CPU)


def test_a_training_keeps_the_prompts_that_it_began_with(photographs: Path, tmp_path: Path) -> None:
    bank = orthogonal_bank()
    file, here, there = tmp_path / "bank.safetensors", tmp_path / "here", tmp_path / "there"
    save_checkpoint(file, DFPIR(TINY), bank, licence="CC0-1.0", provenance={})
    config = tiny(photographs, prompts=str(file))
    Training(config, here, CPU).save()
    save_checkpoint(file, DFPIR(TINY), replace(bank, embeddings=bank.embeddings.flip(0)), licence="x", provenance={})
    assert not torch.equal(prompt_bank(str(file)).embeddings, bank.embeddings)
    assert torch.equal(Training(config, here, CPU).embeddings, bank.embeddings)
    there.mkdir()
    (there / PORTABLE).write_bytes((here / PORTABLE).read_bytes())
    file.unlink()
    assert torch.equal(Training(config, there, CPU).embeddings, bank.embeddings)


def test_weights_of_other_prompts_are_no_start(photographs: Path, tmp_path: Path) -> None:
    bank = orthogonal_bank()
    other = replace(bank, embeddings=bank.embeddings.flip(0))
    file = tmp_path / "other.safetensors"
    save_checkpoint(file, DFPIR(TINY), other, licence="CC0-1.0", provenance={})
    Training(tiny(photographs, prompts=str(file)), tmp_path / "first", CPU).save()
    for source in (file, tmp_path / "first" / CHECKPOINT):
        with pytest.raises(UsageError, match=r"trained under other embeddings of its prompts than orthogonal; name"):
            Training(tiny(photographs, start_from=source), tmp_path / "second", CPU)
        Training(tiny(photographs, start_from=source, prompts=str(file)), tmp_path / "third", CPU)


@pytest.mark.usefixtures("quick_validation")
def test_a_process_that_makes_samples_and_dies_ends_a_training_with_its_last_checkpoint(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, here = Batches.__getitem__, os.getpid()

    def fatal(self: Batches, place: tuple[int, Phase]) -> Any:
        if os.getpid() != here and place[0] == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return made(self, place)

    monkeypatch.setattr(Batches, "__getitem__", fatal)
    with pytest.raises(TrainingError, match=r"a process that makes samples ended at step \d.*try fewer --loaders"):
        train(tiny(photographs), tmp_path, threads=1, loaders=1)


def test_banks_are_told_by_name() -> None:
    assert torch.equal(prompt_bank("orthogonal").embeddings, orthogonal_bank().embeddings)
    assert prompt_bank("dfpir-compact").keys == orthogonal_bank().keys


def test_logs_that_the_disk_has_no_room_for_do_not_end_a_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    sheet = np.zeros((8, 8, 3), np.float32)
    with caplog.at_level(logging.INFO, logger="training"), closing(Diary(tmp_path)) as diary:
        assert diary.board is not None
        monkeypatch.setattr(diary.board, "add_scalar", full)
        diary.step(50, loss=0.5, rate=1e-3, seconds=1.0, progress=0.1)
        assert "no more logs for TensorBoard" in caplog.text
        diary.step(100, loss=0.25, rate=1e-3, seconds=2.0, progress=0.2)
        monkeypatch.setattr(Image.Image, "save", full)
        diary.validation(100, "as usual", {"PSNR": 30.0}, sheet)
    assert "step 100, 0.0 min, 20.0 %, loss 0.2500" in caplog.text
    assert caplog.text.count("No space left") == 2


@pytest.mark.usefixtures("quick_validation")
def test_a_folder_has_one_training_at_a_time(photographs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with closing(Diary(out)), pytest.raises(UsageError, match="another training is working on"):
        train(tiny(photographs), out, threads=1)
    assert list(out.iterdir()) == []
    assert train(tiny(photographs), out, threads=1, max_minutes=0.0).step == 0
