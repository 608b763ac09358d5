from pathlib import Path

import pytest

from classifier.labels import Degradation
from jobs.training_config import (
    ClassifierTraining,
    ConfigError,
    RestorerTraining,
    as_plain,
    differences,
    from_plain,
    read_config,
)

CONFIGS = sorted((Path(__file__).parents[1] / "configs").rglob("*.toml"))

PAIR = '{label = "noise", degraded = "a", reference = "b"}'
SMALL = """
steps = 100
[data]
clean = ["photographs"]
[model]
num_blocks = [1, 1, 1, 1]
[[phases]]
start = 0.0
patch_px = 64
batch = 4
tasks = { noise = 2, rain = 1.0 }
[[phases]]
start = 0.5
patch_px = 128
batch = 2
tasks = { haze = 1.0 }
"""


def read(tmp_path: Path, text: str) -> RestorerTraining:
    path = tmp_path / "some.toml"
    path.write_text(text)
    return read_config(RestorerTraining, path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configurations_that_come_with_the_project_can_be_read(path: Path) -> None:
    kind = ClassifierTraining if path.stem == "classifier" else RestorerTraining
    assert read_config(kind, path).data.clean


def test_values_become_what_their_fields_say(tmp_path: Path) -> None:
    config = read(tmp_path, SMALL)
    assert config.data.clean == (Path("photographs"),)
    assert config.model.num_blocks == (1, 1, 1, 1)
    assert config.phases[0].tasks == {Degradation.NOISE: 2.0, Degradation.RAIN: 1.0}
    assert config.start_from is None


def test_a_configuration_may_extend_another(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text(SMALL)
    config = read(tmp_path, 'extends = "base.toml"\nseed = 3\n[model]\nkept_fraction = 0.5\n')
    base = read(tmp_path, SMALL)
    assert differences(as_plain(base), as_plain(config)) == [
        "model.kept_fraction: was 0.9, is now 0.5", "seed: was 0, is now 3",
    ]  # fmt: skip
    (tmp_path / "base.toml").write_text('extends = "some.toml"')
    with pytest.raises(ConfigError, match=r"some\.toml: extends itself, by way of some\.toml, base\.toml"):
        read(tmp_path, 'extends = "base.toml"')
    with pytest.raises(ConfigError, match=r"nowhere\.toml, which .*some\.toml extends: No such file"):
        read(tmp_path, 'extends = "nowhere.toml"')


def test_phases_follow_the_progress(tmp_path: Path) -> None:
    config = read(tmp_path, SMALL)
    assert [config.phase_at(config.progress(step, 0)).patch_px for step in (0, 49, 50, 99)] == [64, 64, 128, 128]
    by_time = read(tmp_path, SMALL.replace("steps = 100", "minutes = 10"))
    assert by_time.progress(10**9, 300) == 0.5


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps = 100", "steps = 100\nstep = 1", "unknown key step; known are .*steps"),
        ("steps = 100", "steps = true", "steps cannot be True"),
        ("steps = 100", "steps = 1\nminutes = 1.0", "one of steps and minutes"),
        ("steps = 100", "", "one of steps and minutes"),
        ('clean = ["photographs"]', "", "data: names neither clean photographs nor pairs"),
        ('clean = ["photographs"]', "clean = [3]", r"data.clean\[0\] cannot be 3"),
        ("patch_px = 64", "", r"phases\[0\].patch_px is missing"),
        ("patch_px = 64", "patch_px = 60", "multiple of 8, not 60"),
        ("noise = 2", "fog = 2", r"phases\[0\].tasks: 'fog' is none of noise, rain"),
        ("num_blocks = [1, 1, 1, 1]", "heads = [0, 1, 1, 1]", "model: num_blocks and heads must be at least 1"),
        ('clean = ["photographs"]', f"pairs = [{PAIR}]", "neither clean photographs nor pairs for rain"),
        (
            'clean = ["photographs"]',
            f"pairs = [{PAIR}, {PAIR}]",
            "data: there may be one folder of pairs for each label",
        ),
        (
            'clean = ["photographs"]',
            f"pairs = [{PAIR}]\nnoise_sigmas_255 = [15.0]",
            "of what is made of clean photographs, and data.clean names none",
        ),
        ("noise = 2", "clean = 2", "no prompt for clean"),
        ("start = 0.0", "start = 0.1", "the first of phases starts at 0"),
        ("num_blocks = [1, 1, 1, 1]", "num_blocks = [1, 1]", "model.num_blocks needs 4 entries, not 2"),
        ("[data]", "[data", "some.toml"),
        ("steps = 100", "steps = -1\nminutes = 1.0", "steps is from 0 up, not -1"),
        ("steps = 100", "minutes = inf", "minutes is from 0 up, not inf"),
        ("steps = 100", "steps = 1\nseed = -1", "seed is a whole number from 0"),
        ("steps = 100", "steps = 1\nlearning_rate = 0.0", "learning_rate is above 0, not 0.0"),
        ("steps = 100", "steps = 1\nlearning_rate = inf", "learning_rate is above 0, not inf"),
        ("steps = 100", "steps = 1\nlearning_rate = nan", "learning_rate is above 0, not nan"),
        ("steps = 100", "steps = 1\nwarm_up = 1.0", "warm_up is from 0 to below 1, not 1.0"),
        ("steps = 100", "steps = 1\nweight_decay = -0.1", "weight_decay is from 0 up, not -0.1"),
        ("steps = 100", "steps = 1\naverage_decay = 1.0", "average_decay is from 0 to below 1"),
        ("steps = 100", "steps = 1\nbetas = [0.9, 1.0]", "betas is from 0 to below 1, not 1.0"),
        ("steps = 100", "steps = 1\nclip_norm = -2.0", "clip_norm is from 0 up"),
        ("steps = 100", "steps = 1\njpeg_share = 1.5", "jpeg_share is from 0 to 1"),
        ("[data]", '[data]\nlabelled = { haze = ["x"] }', "data.labelled is for a classifier"),
        ("[data]", '[data]\nlabelled = { fog = ["x"] }', "data.labelled: 'fog' is none of"),
        ("[data]", "[data]\npair_share = 1.5", "data: pair_share is from 0 to 1"),
        ("[data]", "[data]\nsmallest_scale = { haze = 0 }", "data: smallest_scale is above 0, up to 1, not 0.0"),
        ("[data]", "[data]\nnoise_sigmas_255 = [15.0, -1.0]", "data: noise_sigmas_255 is from 0 up, not -1.0"),
        ("noise = 2", "noise = nan", r"phases\[0\]: tasks is from 0 up, not nan"),
        ("batch = 4", "batch = 0", r"phases\[0\]: patch_px is at least 16, batch at least 1"),
        ("start = 0.5", "start = nan", r"phases\[1\]: start is from 0 to below 1, not nan"),
        ("[model]", "[model]\ndim = 0", "dim must be even and at least 2"),
        ("[model]", "[model]\ndim = 7", "dim must be even and at least 2"),
        ("[model]", "[model]\nkept_fraction = 0.01", "keeps nothing of a head at level 1"),
        ("[model]", "[model]\nffn_expansion_factor = nan", "model needs a dim x ffn_expansion_factor"),
        ("[model]", "[model]\nnum_refinement_blocks = -1", "no negative blocks"),
        ("haze = 1.0", "haze = 0", r"phases\[1\]: tasks needs a positive share"),
        ("steps = 100", "steps = 100\nextends = 3", "extends"),
        ("steps = 100", 'steps = 100\nextends = "some.toml"', "extends itself, by way of some.toml"),
    ],
)
def test_what_is_wrong_is_said_with_file_and_key(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in SMALL
    with pytest.raises(ConfigError, match=message) as caught:
        read(tmp_path, SMALL.replace(old, new))
    assert "some.toml" in str(caught.value)


def test_too_few_samples_to_calibrate_on_are_told_before_the_training(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('steps = 1\nvalidation_samples = 41\n[data]\nclean = ["photographs"]\n')
    with pytest.raises(ConfigError, match=r"c\.toml: validation_samples are at least 42, not 41"):
        read_config(ClassifierTraining, path)


def test_a_missing_file_is_named_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_config(RestorerTraining, tmp_path / "none.toml")
    assert str(caught.value) == f"cannot read {tmp_path / 'none.toml'}: No such file or directory"


def test_a_stored_configuration_comes_back_with_defaults_for_what_is_new(tmp_path: Path) -> None:
    config = read(tmp_path, SMALL)
    stored = as_plain(config)
    assert from_plain(RestorerTraining, stored) == config
    del stored["model"]["trained_guidance"], stored["jpeg_share"]
    assert from_plain(RestorerTraining, stored) == config


def test_differences_name_the_fields(tmp_path: Path) -> None:
    old, new = (as_plain(read(tmp_path, text)) for text in (SMALL, SMALL.replace("noise = 2", "noise = 3")))
    assert differences(old, old) == []
    assert differences(old, new) == ["phases[0].tasks.noise: was 2.0, is now 3.0"]
    turned = old | {"phases": [{**phase, "tasks": dict(reversed(phase["tasks"].items()))} for phase in old["phases"]]}
    assert differences(old, turned) == []  # samples do not depend on that order
    shorter = old | {"phases": old["phases"][:1]}
    assert len(lines := differences(old, shorter)) == 1
    assert lines[0].startswith("phases: was [{")
