"""Every fault that an audit is for, done to a copy of a real run, is found, and nothing else is."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from synthetic_classifier import write_tiny_classifier
from synthetic_weights import write_tiny_model
from tiny_runs import write_pictures
from typer.testing import CliRunner

from jobs import audit
from jobs.cli import app
from jobs.errors import UsageError
from jobs.places import sole_driver
from pipeline.sink import MANIFEST_SCHEMA, ManifestError, RunDirectory, read_rows

NAMES = ["a.png", "b.png", "folder/c.jpg", "folder/d.png"]
pytestmark = pytest.mark.usefixtures("in_this_process")
runner = CliRunner()


@dataclass(frozen=True)
class Run:
    """A finished run of its own, and what it was made from."""

    source: Path
    out: Path
    options: tuple[str, ...]

    def restore(self, *more: str) -> None:
        """Goes on with it."""
        result = runner.invoke(app, ["restore", str(self.source), str(self.out), *self.options, *more])
        assert result.exit_code == 0, result.output

    def audit(self, *more: str) -> tuple[int, dict[str, Any]]:
        """Exit code and what `--json` prints."""
        result = runner.invoke(app, ["audit", str(self.out), "--json", *more])
        return result.exit_code, json.loads(result.stdout)

    def kinds(self, *more: str) -> list[tuple[str, str]]:
        """Kind and subject of all that is found, after which the exit code is 1."""
        code, found = self.audit(*more)
        assert code == (1 if found["findings"] else 0)
        return sorted((finding["kind"], finding["subject"]) for finding in found["findings"])

    def edit(self, change: Callable[[pa.Table], pa.Table]) -> None:
        """Rewrites the manifest's parts."""
        for part in RunDirectory(self.out).parts():
            table = change(pq.read_table(part))
            pq.write_table(table.cast(MANIFEST_SCHEMA), part)

    def set(self, path: str, **values: object) -> None:
        """Rewrites columns of one image's row."""

        def change(table: pa.Table) -> pa.Table:
            rows = [row | (values if row["relative_path"] == path else {}) for row in table.to_pylist()]
            return pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA)

        self.edit(change)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("finished")
    model, classifier = write_tiny_model(folder / "model.safetensors"), write_tiny_classifier(folder / "c.safetensors")
    options = ["--model", model, "--classifier", classifier, "--label", "rain", "--engine", "local", "--device", "cpu"]
    write_pictures(folder / "photographs", NAMES)
    run = Run(folder / "photographs", folder / "out", tuple(map(str, [*options, "--dtype", "float32"])))
    run.restore()
    return run


@pytest.fixture
def run(finished: Run, tmp_path: Path) -> Run:
    """A copy that lies elsewhere, of which a test may break what it likes but the inputs."""
    return Run(finished.source, shutil.copytree(finished.out, tmp_path / "moved"), finished.options)


@pytest.fixture
def own(finished: Run, tmp_path: Path) -> Run:
    """A run with inputs that a test may change."""
    write_pictures(tmp_path / "photographs", NAMES)
    run = Run(tmp_path / "photographs", tmp_path / "out", finished.options)
    run.restore()
    return run


def test_a_finished_run_holds_wherever_it_lies(run: Run) -> None:
    code, found = run.audit("--sources")
    assert (code, found["findings"]) == (0, [])
    assert (found["planned"], found["rows"], found["outputs"], found["sources"]) == (4, 4, 4, 4)
    assert found["counts"] == {"restored": 4, "copied": 0, "abstained": 0, "failed": 0, "quarantined": 0}
    assert found["output_bytes"] == sum((run.out / "images" / name).stat().st_size for name in NAMES)
    shown = runner.invoke(app, ["audit", str(run.out)])
    assert shown.stderr == ""  # no bar, and no empty line of one, where it would be no use
    assert shown.exit_code == 0
    assert "everything holds" in shown.stdout
    assert "4 of 4 planned images" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 80


def test_rows_to_review_are_counted(run: Run) -> None:
    run.set("a.png", warnings=["one"], suspicious=True)
    run.set("b.png", warnings=["one", "two"], suspicious=False)
    run.set("folder/c.jpg", warnings=[], suspicious=True)
    run.set("folder/d.png", warnings=[], suspicious=None)
    code, found = run.audit()
    assert (code, found["with_warnings"], found["suspicious"]) == (0, 2, 2)


def test_what_rows_and_job_say_is_shown_as_it_is(run: Run) -> None:
    """Markup of rich ended in a traceback."""
    run.set("a.png", status="[/]", label="[/b]\x1b[31m")
    path = RunDirectory(run.out).job_path
    path.write_text(json.dumps(json.loads(path.read_text()) | {"run_id": "[/]\x1b[31m"}))
    shown = runner.invoke(app, ["audit", str(run.out)])
    assert shown.exit_code == 1
    assert "1 [/]" in shown.stdout
    assert "1 [/b]\\x1b[31m" in shown.stdout
    assert "[/]\\x1b[31m, configuration" in shown.stdout
    assert "\x1b" not in shown.stdout


def test_rows_that_all_count_are_not_copied(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a million images they are a gigabyte."""
    tables: list[pa.Table] = []
    whole, shared = audit.read_rows, audit._shared

    def noted(table: pa.Table) -> pa.Table:
        tables.append(table)
        return table

    monkeypatch.setattr(audit, "read_rows", lambda *given, **more: noted(whole(*given, **more)))
    monkeypatch.setattr(audit, "_shared", lambda counting: shared(noted(counting)))
    assert run.kinds() == []
    assert tables[0] is tables[1]


def test_an_audit_needs_no_library_of_networks(run: Run) -> None:
    """Importing torch takes seconds and half a gigabyte; a manifest is read without it, too."""
    code = (
        "import sys; from pipeline.sink import read_manifest; from jobs.cli import app; "
        "assert read_manifest(sys.argv[1]).num_rows; app(['audit', sys.argv[1]], standalone_mode=False); "
        "assert not {'torch', 'timm', 'models'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run.out)], capture_output=True, text=True)
    assert done.stderr == ""
    assert "everything holds" in done.stdout
    assert done.returncode == 0


def test_an_audit_changes_nothing(run: Run) -> None:
    def state() -> dict[str, tuple[int, int]]:
        return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in run.out.rglob("*")}

    before = state()
    run.audit("--sources")
    assert state() == before


def test_a_flipped_bit_is_found_by_contents_alone(run: Run) -> None:
    path = run.out / "images" / "folder" / "c.jpg"
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    assert run.kinds() == [("output_differs", "folder/c.jpg")]
    assert run.kinds("--quick") == []


def test_a_cut_and_a_missing_result_are_found_by_sizes(run: Run) -> None:
    images = run.out / "images"
    os.truncate(images / "a.png", 100)
    (images / "b.png").unlink()
    assert run.kinds("--quick") == [("output_differs", "a.png"), ("output_missing", "b.png")]
    shown = runner.invoke(app, ["audit", str(run.out), "--quick"])
    assert "1 output_differs, 1 output_missing" in " ".join(shown.stdout.split())
    assert "output_differs: a.png:" in shown.stdout


def test_a_pipe_in_the_place_of_a_result_is_not_waited_for(run: Run) -> None:
    result = run.out / "images" / "a.png"
    result.unlink()
    os.mkfifo(result)
    assert run.kinds() == [("output_missing", "a.png")]


def test_a_file_that_no_row_names_is_found(run: Run) -> None:
    (run.out / "images" / "folder" / "stranger.png").write_bytes(b"x")
    (run.out / "images" / f".a.png.{'0' * 16}.partial").write_bytes(b"what a killed worker leaves")
    assert run.kinds() == [("not_in_manifest", "images/folder/stranger.png")]


def test_images_without_a_row_are_found(run: Run) -> None:
    run.edit(lambda table: table.filter(pc.not_equal(table["relative_path"], "b.png")))
    assert run.kinds() == [("no_row", "b.png"), ("not_in_manifest", "images/b.png")]
    for part in RunDirectory(run.out).parts():
        part.unlink()
    assert [kind for kind, _ in run.kinds()] == ["no_row"] * 4 + ["not_in_manifest"] * 4


def test_a_row_that_stands_twice_is_found(run: Run) -> None:
    part = RunDirectory(run.out).parts()[0]
    shutil.copy(part, part.with_name(part.name.replace("-", "-0")))
    names = pq.read_table(part)["relative_path"].to_pylist()
    assert run.kinds() == [("double_row", name) for name in sorted(names)]


def test_earlier_revisions_are_looked_at_too(own: Run) -> None:
    write_pictures(own.source, ["a.png"], side=32)
    own.restore()
    first = max(RunDirectory(own.out).parts(), key=lambda part: int(pq.read_table(part).num_rows))
    kept = pq.read_table(first)
    is_superseded = pc.equal(kept["relative_path"], "a.png")
    pq.write_table(pa.concat_tables([kept, kept.filter(is_superseded)]), first)
    assert own.kinds() == [("double_row", "a.png")]
    rows = [row | ({"revision": -1} if row["relative_path"] == "a.png" else {}) for row in kept.to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA), first)
    assert own.kinds() == [("not_planned", "a.png")]
    pq.write_table(kept, first)
    shutil.copy(own.out / "plan" / "00000.parquet", own.out / "plan" / "00002.parquet")
    assert {("inconsistent", name) for name in NAMES} <= set(own.kinds())


def test_a_row_that_nobody_planned_is_found(run: Run) -> None:
    run.set("a.png", image_id="0" * 32)
    assert run.kinds() == [("no_row", "a.png"), ("not_planned", "a.png")]
    run.set("b.png", revision=1)
    assert ("not_planned", "b.png") in run.kinds()


@pytest.mark.parametrize("column", ["run_id", "config_digest", "weights_sha256"])
def test_a_row_of_another_run_is_found(run: Run, column: str) -> None:
    run.set("a.png", **{column: "another"})
    assert run.kinds() == [("other_run", "a.png")]
    run.set("a.png", **{column: None})
    assert run.kinds() == [("other_run", "a.png")]


@pytest.mark.parametrize("value", [5, ["a"], None])
def test_weights_of_no_text_are_found(run: Run, value: object) -> None:
    path = run.out / "job.json"
    job = json.loads(path.read_text())
    job["config"]["weights_sha256"] = value
    path.write_text(json.dumps(job))
    assert set(run.kinds()) == {("inconsistent", "job.json"), *(("other_run", name) for name in NAMES)}


def test_a_configuration_that_was_edited_is_found(run: Run) -> None:
    job = json.loads((run.out / "job.json").read_text())
    job["config"]["label"] = "another"
    (run.out / "job.json").write_text(json.dumps(job))
    assert run.kinds() == [("inconsistent", "job.json")]


@pytest.mark.parametrize(
    "values",
    [
        {"status": "perfect"},
        {"output_uri": None},
        {"output_sha256": None},
        {"status": "failed"},
        {"error_class": "missing"},
        {"prompt": None},
        {"prompt": "haze"},
        {"label": None},
        {"status": "copied"},
        {"status": "abstained", "prompt": None},
        {"source_sha256": None},
        {"source_bytes": None},
        {"relative_path": "other.png"},
        {"source_uri": "file:///other.png"},
        {"source_uri": None},
    ],
)
def test_a_row_that_contradicts_itself_is_found(run: Run, values: dict[str, object]) -> None:
    run.set("a.png", **values)
    assert ("inconsistent", values.get("relative_path", "a.png")) in run.kinds()


def test_a_copy_of_what_is_not_clean_is_found(run: Run) -> None:
    digest = read_rows(run.out, columns=["source_sha256"])["source_sha256"][0].as_py()
    run.set("a.png", status="copied", prompt=None, source_sha256=digest, output_sha256=digest)
    assert ("inconsistent", "a.png") in run.kinds("--quick")
    run.set("a.png", label="clean")
    assert run.kinds("--quick") == []


def test_two_rows_that_name_each_others_results_are_found(run: Run) -> None:
    rows = {row["relative_path"]: row for row in read_rows(run.out, columns=MANIFEST_SCHEMA.names).to_pylist()}
    for path, other in (("a.png", "b.png"), ("b.png", "a.png")):
        run.set(path, **{name: rows[other][name] for name in ("output_uri", "output_bytes", "output_sha256")})
    assert run.kinds("--sources") == [("inconsistent", "a.png"), ("inconsistent", "b.png")]


def test_a_result_in_another_format_is_called_after_its_image(finished: Run, tmp_path: Path) -> None:
    source = tmp_path / "photographs"
    write_pictures(source, ["a.png", "a.png.jpg", "folder/b.png"])
    run = Run(source, tmp_path / "out", finished.options)
    run.restore("--format", "jpeg")
    assert (run.out / "images" / "a.png.restored.jpg").exists()
    assert run.kinds() == []


def test_a_result_outside_the_run_is_found(run: Run) -> None:
    (run.out / "job.json").stat()
    for uri in ("images/../job.json", "job.json", "/etc/hostname"):
        run.set("a.png", output_uri=uri)
        assert ("inconsistent", "a.png") in run.kinds()


@pytest.mark.parametrize("uri", ["s3://bucket/a.png", "file:///a%00.png", "a.png"])
def test_an_input_that_no_file_can_be_is_missing(run: Run, uri: str) -> None:
    run.set("a.png", source_uri=uri)
    assert ("source_missing", "a.png") in run.kinds("--sources")


def test_a_flipped_bit_of_a_part_changes_no_row_unnoticed(run: Run) -> None:
    part = RunDirectory(run.out).parts()[0]
    data, rows = part.read_bytes(), read_rows(run.out, columns=MANIFEST_SCHEMA.names)
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    refused = 0
    for place in range(4, footer, 41):
        part.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        try:
            assert read_rows(run.out, columns=MANIFEST_SCHEMA.names).equals(rows), place
        except ManifestError:
            refused += 1
    assert refused > 50


def test_a_flipped_bit_of_a_column_that_is_not_looked_at_is_found(run: Run) -> None:
    part = RunDirectory(run.out).parts()[0]
    data = part.read_bytes()
    columns = pq.ParquetFile(part).metadata.row_group(0)
    reasons = columns.column(
        MANIFEST_SCHEMA.names.index("decision_reason") + len(MANIFEST_SCHEMA.field("probabilities").type) - 1
    )
    assert reasons.path_in_schema == "decision_reason"
    last = reasons.dictionary_page_offset + reasons.total_compressed_size - 1
    part.write_bytes(data[:last] + bytes([data[last] ^ 1]) + data[last + 1 :])
    result = runner.invoke(app, ["audit", str(run.out)])
    assert (result.exit_code, part.name in result.stderr) == (2, True), result.output
    assert run.audit("--quick")[0] == 0


def test_a_damaged_name_of_a_column_is_told(run: Run) -> None:
    for part in (RunDirectory(run.out).parts()[0], run.out / "plan" / "00000.parquet"):
        data = part.read_bytes()
        part.write_bytes(data.replace(b"relative_path", b"relative\xff\xfeath"))
        result = runner.invoke(app, ["audit", str(run.out)])
        assert (result.exit_code, part.name in result.stderr) == (2, True), result.exception
        part.write_bytes(data)


def test_a_folder_that_cannot_be_listed_is_not_taken_for_empty(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    listed, scanned = os.listdir, os.scandir

    for name in ("manifest", "plan", "images"):

        def refuse(real: Callable[..., Any], path: Any, closed: str = name) -> Any:
            if Path(path) == run.out / closed:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return real(path)

        with monkeypatch.context() as patch:
            patch.setattr(os, "listdir", partial(refuse, listed))
            patch.setattr(os, "scandir", partial(refuse, scanned))
            result = runner.invoke(app, ["audit", str(run.out)])
            assert (result.exit_code, f"{name}: Permission denied" in result.stderr) == (2, True)
            if name != "images":
                command = ["restore", str(run.source), str(run.out), *run.options]
                result = runner.invoke(app, command)
                assert (result.exit_code, f"{name}: Permission denied" in result.stderr) == (2, True)
    assert run.kinds() == []


def test_a_plan_that_has_images_twice_is_found(run: Run) -> None:
    shutil.copy(run.out / "plan" / "00000.parquet", run.out / "plan" / "00001.parquet")
    assert run.kinds() == [("inconsistent", name) for name in NAMES]


def test_a_link_to_a_folder_among_the_results_is_found(run: Run) -> None:
    (run.out / "images" / "stranger").symlink_to(run.source)
    assert run.kinds() == [("not_in_manifest", "images/stranger")]


@pytest.mark.parametrize("change", [{"config": None}, {"run_id": None}, {"config_digest": 3}, {"config": []}])
def test_a_job_of_other_types_is_refused(run: Run, change: dict[str, object]) -> None:
    path = run.out / "job.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    result = runner.invoke(app, ["audit", str(run.out)])
    assert (result.exit_code, "is not a job of dfpir" in result.stderr) == (2, True)


def test_two_images_with_one_result_are_found(run: Run) -> None:
    run.set("a.png", output_uri="images/b.png")
    assert ("output_shared", "images/b.png") in run.kinds()


def test_changed_inputs_are_found_if_asked_for(own: Run) -> None:
    data = bytearray((own.source / "a.png").read_bytes())
    data[-1] ^= 1
    (own.source / "a.png").write_bytes(data)
    (own.source / "folder" / "c.jpg").unlink()
    assert own.kinds() == []
    assert own.kinds("--sources") == [("source_differs", "a.png"), ("source_missing", "folder/c.jpg")]


def test_lost_and_damaged_results_are_made_again_once_their_parts_are_removed(own: Run) -> None:
    (own.out / "images" / "a.png").unlink()
    (own.out / "images" / "folder" / "c.jpg").write_bytes(b"damaged")
    assert own.kinds() == [("output_differs", "folder/c.jpg"), ("output_missing", "a.png")]
    for part in RunDirectory(own.out).parts():
        if {"a.png", "folder/c.jpg"} & set(pq.read_table(part)["relative_path"].to_pylist()):
            part.unlink()
    own.restore()
    assert own.kinds("--sources") == []


def test_earlier_revisions_are_no_fault(own: Run) -> None:
    write_pictures(own.source, ["a.png"], side=32)
    own.restore()
    code, found = own.audit("--sources")
    assert (code, found["findings"], found["superseded"], found["rows"]) == (0, [], 1, 4)


def test_failures_and_skipped_copies_are_no_fault(own: Run, tmp_path: Path) -> None:
    (own.source / "broken.png").write_bytes(b"no picture")
    own.restore("--max-failed-fraction", "1")
    code, found = own.audit()
    assert (code, found["counts"]["failed"], found["outputs"]) == (0, 1, 4)
    options = [option for option in own.options if option not in ("--label", "rain")]
    skipping = Run(own.source, tmp_path / "skipping", (*options, "--clean", "skip", "--min-confidence", "1"))
    skipping.restore("--max-failed-fraction", "1")
    code, found = skipping.audit()
    assert (code, found["findings"], found["outputs"]) == (0, [], 0)


def test_a_run_in_work_is_left_alone(run: Run) -> None:
    with (run.out / ".dfpir.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = runner.invoke(app, ["audit", str(run.out)])
    assert result.exit_code == 2
    assert "is working on" in result.stderr


def test_no_call_may_begin_while_files_are_looked_at(own: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    look, refused = audit._fault, []

    def during(*arguments: Any, **options: Any) -> Any:
        with pytest.raises(UsageError, match="another process is working on"), sole_driver(own.source, own.out):
            pytest.fail("a call has begun")
        refused.append(arguments)
        return look(*arguments, **options)

    monkeypatch.setattr(audit, "_fault", during)
    assert own.kinds() == []
    assert len(refused) == 4


def test_what_is_no_run_is_refused(run: Run, tmp_path: Path) -> None:
    for place in (tmp_path / "nowhere", run.source):
        result = runner.invoke(app, ["audit", str(place)])
        assert (result.exit_code, "holds no run" in result.stderr) == (2, True)
    RunDirectory(run.out).parts()[0].write_bytes(b"not Parquet")
    result = runner.invoke(app, ["audit", str(run.out)])
    assert (result.exit_code, "cannot be read as a manifest part" in result.stderr) == (2, True)
