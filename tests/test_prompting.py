"""Which label leads to which prompt, and the reasons that people read."""

import subprocess
import sys

import pytest

from classifier.base import Prediction
from classifier.labels import LABELS, Degradation
from models.prompts import PUBLISHED_SENTENCES
from pipeline.prompting import (
    NOISE_CUT_POINTS_255,
    decide,
    decide_forced,
    noise_prompt,
    parse_label,
    prompts_for,
)
from pipeline.records import Status

ALL = tuple(PUBLISHED_SENTENCES)
THREE_TASKS = ALL[:5]


def prediction(label, confidence=0.97, sigma=23.0):
    others = (1 - confidence) / (len(LABELS) - 1)
    probabilities = {one: confidence if one == label else others for one in LABELS}
    return Prediction(
        label=Degradation(label),
        confidence=confidence,
        margin=confidence - others,
        threshold=0.5,
        probabilities=probabilities,
        noise_sigma_255=sigma,
    )


def test_noise_goes_by_its_sigma():
    decision = decide(prediction("noise"), prompts=ALL)
    assert (decision.status, decision.prompt) == (Status.RESTORED, "noise25")
    assert decision.reason == "noise with probability 0.97; estimated sigma 23.0 leads to prompt noise25"


@pytest.mark.parametrize("label", ["rain", "haze", "blur", "lowlight"])
def test_other_damage_has_the_prompt_of_its_name(label):
    decision = decide(prediction(label), prompts=ALL)
    assert (decision.status, decision.prompt) == (Status.RESTORED, label)
    assert decision.reason == f"{label} with probability 0.97: restored under prompt {label}"


def test_clean_is_kept():
    decision = decide(prediction("clean", 0.99), prompts=ALL)
    assert (decision.status, decision.prompt) == (Status.COPIED, None)
    assert decision.reason == "clean with probability 0.99: kept as it was"


def test_damage_without_a_prompt_is_left_for_review():
    decision = decide(prediction("other"), prompts=ALL)
    assert (decision.status, decision.prompt) == (Status.ABSTAINED, None)
    assert "damage without a prompt" in decision.reason


@pytest.mark.parametrize("label", list(Degradation))
def test_unsure_is_abstained_whatever_the_label(label):
    decision = decide(prediction(label, 0.41), prompts=ALL)
    assert (decision.status, decision.prompt) == (Status.ABSTAINED, None)
    assert decision.reason == f"best guess {label} only 0.41, below the threshold 0.5"


def test_a_reason_does_not_contradict_itself():
    decision = decide(prediction("rain", confidence=0.49999), prompts=ALL, min_confidence=0.5)
    assert decision.reason == "best guess rain only 0.49, below the threshold 0.5"
    decision = decide(prediction("rain", confidence=0.9985), prompts=ALL, min_confidence=0.999)
    assert decision.reason == "best guess rain only 0.99, below the threshold 0.999"
    below, above = (decide(prediction("noise", sigma=sigma), prompts=ALL).reason for sigma in (18.96, 19.04))
    assert below.endswith("estimated sigma 18.9 leads to prompt noise15")
    assert above.endswith("estimated sigma 19.0 leads to prompt noise25")


def test_no_number_is_not_sure_enough():
    decision = decide(prediction("rain", confidence=float("nan")), prompts=ALL, min_confidence=0.5)
    assert decision.status is Status.ABSTAINED


def test_of_one_tone_nothing_is_restored_and_what_is_clean_stays_so():
    for label, status in (("lowlight", Status.ABSTAINED), ("clean", Status.COPIED)):
        assert decide(prediction(label), prompts=ALL, is_flat=True).status is status


def test_given_confidence_replaces_the_thresholds_both_ways():
    unsure = prediction("haze", 0.41)
    assert decide(unsure, prompts=ALL, min_confidence=0.4).status is Status.RESTORED
    sure = decide(prediction("haze", 0.9), prompts=ALL, min_confidence=0.95)
    assert sure.status is Status.ABSTAINED
    assert sure.reason == "best guess haze only 0.90, below the threshold 0.95"
    assert decide(unsure, prompts=ALL, min_confidence=0.41).status is Status.RESTORED


@pytest.mark.parametrize("label", ["blur", "lowlight"])
def test_prompt_that_the_model_lacks_abstains(label):
    decision = decide(prediction(label), prompts=THREE_TASKS)
    assert (decision.status, decision.prompt) == (Status.ABSTAINED, None)
    assert f"the model has no prompt {label}" in decision.reason
    forced = decide_forced(label, sigma_255=None, estimated_sigma_255=1.0, prompts=THREE_TASKS)
    assert forced.status is Status.ABSTAINED


def test_cut_points_part_the_noise_prompts():
    low, high = NOISE_CUT_POINTS_255
    keys = [noise_prompt(sigma) for sigma in (0, low - 1e-6, low, high - 1e-6, high, 255)]
    assert keys == ["noise15", "noise15", "noise25", "noise25", "noise50", "noise50"]


def test_every_prompt_of_the_paper_is_reached_by_a_label():
    assert {key for label in Degradation for key in prompts_for(label)} == set(ALL)


def test_forced_noise_goes_by_the_given_sigma_else_by_the_estimated():
    given = decide_forced("noise", sigma_255=50.0, estimated_sigma_255=3.0, prompts=ALL)
    assert (given.status, given.label, given.prompt) == (Status.RESTORED, Degradation.NOISE, "noise50")
    assert given.reason == "noise as given by --label; given sigma 50 leads to prompt noise50"
    estimated = decide_forced("noise", sigma_255=None, estimated_sigma_255=3.0, prompts=ALL)
    assert estimated.prompt == "noise15"
    assert "estimated sigma 3.0 " in estimated.reason
    with pytest.raises(ValueError, match="auto"):
        decide_forced("auto", sigma_255=None, estimated_sigma_255=3.0, prompts=ALL)


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("auto", ("auto", None)),
        ("noise", ("noise", None)),
        ("noise:25", ("noise", 25.0)),
        ("noise:12.5", ("noise", 12.5)),
        ("lowlight", ("lowlight", None)),
    ],
)
def test_labels_are_read(text, choice):
    assert parse_label(text) == choice


@pytest.mark.parametrize("text", ["", "snow", "Noise", "clean", "other", "snow:3"])
def test_unknown_labels_name_the_valid_ones(text):
    with pytest.raises(ValueError, match=r"choose auto, noise\[:SIGMA\], rain, haze, blur, lowlight"):
        parse_label(text)


@pytest.mark.parametrize("text", ["noise:", "noise:x", "noise:-1", "noise:256", "noise:nan", "noise:inf", "rain:3"])
def test_bad_numbers_say_what_is_expected(text):
    with pytest.raises(ValueError, match="noise:25"):
        parse_label(text)


def test_training_gets_the_noise_prompt_without_pyarrow():
    code = "import sys, pipeline.prompting; sys.exit('pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
