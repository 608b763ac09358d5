import re
from pathlib import Path

from pipeline.records import MANIFEST_SCHEMA

ROOT = Path(__file__).parent.parent


def test_every_manifest_column_is_documented_and_no_other() -> None:
    text = (ROOT / "docs" / "manifest.md").read_text(encoding="utf-8")
    first_cells = re.findall(r"^\| (`[^|]*) \|", text, flags=re.MULTILINE)
    documented = {name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)}
    assert documented == set(MANIFEST_SCHEMA.names)


def test_the_lock_file_holds_no_addresses() -> None:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    assert lines
    assert [line for line in lines if "://" in line or line.startswith("-")] == []
