"""Runs over a source that changes, ended at any image: the next call makes of them what one call would have made."""

import hashlib
import os
import shutil
import tempfile
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import ClassVar

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from in_this_process import InThisProcess, Killed
from PIL import Image
from tiny_runs import TinyWeights

from jobs.audit import audit
from jobs.config import RestoreOptions
from jobs.places import sole_driver
from jobs.restore import prepare, run
from pipeline.records import Outcome
from pipeline.sink import read_manifest

NAMES = ["a.png", "a.jpg", "b.png", "deep/a.png", "deep/er/c.png"]


class Histories(RuleBasedStateMachine):
    weights: ClassVar[TinyWeights]

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="histories-"))
        self.source, self.out = self.folder / "source", self.folder / "out"
        self.source.mkdir()
        self.clock = 1_700_000_000
        self.pictures: dict[str, bool] = {}
        """Whether the file of this name is one that can be read."""

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    @initialize(
        label=st.sampled_from(["auto", "rain"]),
        clean=st.sampled_from(["copy", "skip"]),
        extension=st.sampled_from(["same", "png"]),
    )
    def options_are_chosen(self, label: str, clean: str, extension: str) -> None:
        self.options = {"label": label, "clean": clean, "format": extension}
        self.options |= {"engine": "local", "device": "cpu", "dtype": "float32"}
        self.options |= {"model": str(self.weights.model), "classifier": str(self.weights.classifier)}

    @rule(name=st.sampled_from(NAMES), seed=st.integers(0, 9), is_whole=st.sampled_from([True, True, True, False]))
    def a_file_comes_or_changes(self, name: str, seed: int, is_whole: bool) -> None:
        pixels = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)
        buffer = BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG" if name.endswith(".png") else "JPEG")
        path = self.source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(buffer.getvalue() if is_whole else buffer.getvalue()[:100])
        self.clock += 1
        os.utime(path, (self.clock, self.clock))
        self.pictures[name] = is_whole

    @precondition(lambda self: self.pictures)
    @rule(data=st.data())
    def a_file_vanishes(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.pictures)))
        (self.source / name).unlink()
        del self.pictures[name]

    @precondition(lambda self: self.pictures)
    @rule(most=st.integers(1, 4), kills=st.booleans())
    def a_run_is_ended(self, most: int, kills: bool) -> None:
        with suppress(Killed):
            self.restore(InThisProcess(most=most, kills=kills))

    @precondition(lambda self: self.pictures)
    @rule(retries=st.booleans())
    def a_run_comes_to_its_end(self, retries: bool) -> None:
        self.restore(InThisProcess(), retry_failed=retries)
        rows = {row["relative_path"]: row for row in read_manifest(self.out).to_pylist()}
        for name, is_whole in self.pictures.items():
            row = rows[name]
            assert (row["status"] == "failed") != is_whole, row["error_message"]
            assert row["source_sha256"] == hashlib.sha256((self.source / name).read_bytes()).hexdigest()
            if row["output_uri"] is not None and row["status"] != "restored":
                assert (self.out / row["output_uri"]).read_bytes() == (self.source / name).read_bytes()
        found = audit(self.out, contents=True, sources=True, watch=lambda checks, _: checks).findings
        gone = {name for name, row in rows.items() if name not in self.pictures and row["source_sha256"] is not None}
        assert {(each.kind, each.subject) for each in found} == {("source_missing", name) for name in gone}
        assert self.restore(InThisProcess()) == 0, "nothing is left to do"

    def restore(self, runner: InThisProcess, *, retry_failed: bool = False) -> int:
        """What the command does; returns how many images were done."""
        told: list[Outcome] = []
        with sole_driver(self.source, self.out):
            job = prepare(self.source, self.out, RestoreOptions(**self.options, retry_failed=retry_failed))
            run(job, runner, on_outcomes=told.extend)
        return len(told)


def test_runs_that_are_ended_and_a_source_that_changes(tiny_weights: TinyWeights) -> None:
    Histories.weights = tiny_weights
    run_state_machine_as_test(
        Histories,
        settings=settings(
            max_examples=25, stateful_step_count=12, deadline=None, suppress_health_check=[HealthCheck.too_slow]
        ),
    )


def test_what_an_ended_call_left_of_images_without_a_row_goes_and_all_else_stays(tiny_weights: TinyWeights) -> None:
    history = Histories()
    history.weights = tiny_weights
    history.options_are_chosen("rain", "copy", "png")
    for name in ("a.jpg", "b.png"):
        history.a_file_comes_or_changes(name, 0, True)
    history.a_run_is_ended(1, True)
    images = history.out / "images"
    assert (images / "a.jpg.png").exists()
    own = {"note.txt", "c.jpg.png", os.fsdecode(b"caf\xe9.png")}
    for name in own:
        (images / name).touch()
    (history.source / "a.jpg").unlink()
    history.restore(InThisProcess())
    assert {path.name for path in images.iterdir()} == own | {"b.png"}
    (images / "a.jpg").touch()  # which has its row by now
    history.a_file_comes_or_changes("deep/a.png", 0, True)
    history.restore(InThisProcess())
    assert {path.name for path in images.iterdir()} == own | {"a.jpg", "b.png", "deep"}
    history.teardown()
