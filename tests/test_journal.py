import errno
from pathlib import Path

import pytest

from pipeline.journal import Journal


def test_an_image_in_hand_at_two_deaths_is_poison(tmp_path: Path) -> None:
    for expected in (1, 2):
        Journal(tmp_path, "s").begin("a")
        journal = Journal(tmp_path, "s")
        assert not journal.is_poison("a")
        assert journal.count_death() == "a"
        assert journal.deaths("a") == expected
    assert Journal(tmp_path, "s").is_poison("a")
    assert not Journal(tmp_path, "s").is_poison("b")


def test_a_death_is_counted_once(tmp_path: Path) -> None:
    Journal(tmp_path, "s").begin("a")
    Journal(tmp_path, "s").count_death()
    again = Journal(tmp_path, "s")
    assert again.count_death() is None
    assert again.deaths("a") == 1


def test_an_image_dealt_with_has_no_death(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "s")
    journal.begin("a")
    journal.end()
    assert Journal(tmp_path, "s").count_death() is None
    assert Journal(tmp_path, "s").is_empty


def test_a_forgiven_death_counts_for_nobody_and_earlier_ones_stay(tmp_path: Path) -> None:
    Journal(tmp_path, "s").begin("a")
    Journal(tmp_path, "s").count_death()
    Journal(tmp_path, "s").begin("a")
    assert Journal(tmp_path, "s").has_in_flight
    Journal(tmp_path, "s").forgive()
    journal = Journal(tmp_path, "s")
    assert journal.count_death() is None
    assert journal.deaths("a") == 1


def test_shards_have_journals_of_their_own_and_leave_nothing_when_done(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "s")
    journal.begin("a")
    assert Journal(tmp_path, "t").is_empty
    journal.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_journal_that_a_power_cut_left_empty_is_none(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_bytes(b"")
    journal = Journal(tmp_path, "s")
    assert journal.is_empty
    journal.begin("a")
    assert Journal(tmp_path, "s").has_in_flight


def test_a_full_disk_leaves_no_image_in_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path, "s")
    journal.begin("a")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        journal.end()
    assert Journal(tmp_path, "s").count_death() is None
