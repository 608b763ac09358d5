from pathlib import Path

import pytest

from pipeline.records import Outcome, Stage, Status, to_table
from pipeline.report import Summary, Tally, summarise


def outcome(name: str, status: Status, **more: object) -> Outcome:
    return Outcome(
        image_id=name, shard_id="0", source_uri=name, relative_path=name, status=status, run_id="r",
        config_digest="d", code_version="0", **more,
    )  # type: ignore[arg-type]  # fmt: skip


def summary(outcomes: list[Outcome], fresh: set[str], elapsed_s: float = 2.0) -> Summary:
    tally = Tally()
    tally.add([outcome for outcome in outcomes if outcome.image_id in fresh])
    return summarise(
        to_table(outcomes), run_dir=Path("out"), run_id="r", planned=len(outcomes), fresh=tally,
        elapsed_s=elapsed_s, vanished=0,
    )  # fmt: skip


ROWS = [
    outcome(
        "a", Status.RESTORED, label="noise", width=1000, height=1000,
        psnr_input_db=20.0, psnr_db=30.0, ssim_input=0.5, ssim=0.9, restore_ms=500.0,
    ),
    outcome("b", Status.COPIED, label="clean", width=1000, height=500, psnr_input_db=40.0, psnr_db=40.0),
    outcome(
        "c", Status.FAILED, stage=Stage.RESTORE, error_class="E", error_message="m", psnr_input_db=10.0, ssim_input=0.1
    ),
    outcome("d", Status.RESTORED, label="noise"),
]  # fmt: skip


def test_counts_cover_every_status_and_sum_to_the_rows() -> None:
    result = summary(ROWS, set())
    assert result.counts == {"restored": 2, "copied": 1, "abstained": 0, "failed": 1, "quarantined": 0}
    assert result.labels == {"noise": 2, "clean": 1}
    assert result.failed_fraction == pytest.approx(0.25)
    assert [(f.relative_path, f.stage, f.error_class, f.message) for f in result.failures] == [
        ("c", "restore", "E", "m")
    ]


def test_means_count_every_reference_and_a_failure_as_its_input() -> None:
    result = summary(ROWS, set())
    assert result.psnr_input_db == pytest.approx((20 + 40 + 10) / 3)
    assert result.psnr_db == pytest.approx((30 + 40 + 10) / 3)
    assert result.ssim_input == pytest.approx((0.5 + 0.1) / 2)
    assert result.ssim == pytest.approx((0.9 + 0.1) / 2)


def test_rates_are_those_of_this_call() -> None:
    result = summary(ROWS, {"a", "b"})
    assert (result.images_per_s, result.megapixels_per_s) == pytest.approx((1.0, 0.75))
    assert result.done_before == 2
    assert result.stage_s["restore"] == pytest.approx(0.5)


def test_an_empty_manifest_gives_zeros_and_nulls() -> None:
    result = summary([], set(), elapsed_s=0.0)
    assert (result.images_per_s, result.failed_fraction, result.psnr_db, result.ssim) == (0.0, 0.0, None, None)
