from pathlib import Path

import pytest

from jobs.config import RestoreOptions, read_options
from jobs.errors import UsageError


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "options.toml"
    file.write_text('quality = 80\nmax-workers = 3\nlabel = "noise:25"\n')
    options = read_options(file, {"quality": 70, "label": None})
    assert (options.quality, options.max_workers, options.label) == (70, 3, "noise:25")


def test_defaults_hold_where_nothing_is_given() -> None:
    assert read_options(None, {"model": None}) == RestoreOptions()


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"label": "fog"}, "haze"),
        ({"label": "rain:3"}, "noise"),
        ({"quality": 0}, "--quality 0"),
        ({"tile": "12"}, "64"),
        ({"engine": "spark"}, "ray"),
        ({"max_failed_fraction": 2.0}, "--max-failed-fraction"),
    ],
)
def test_a_wrong_value_is_named_with_what_it_may_be(given: dict[str, object], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        read_options(None, given)


def test_an_unknown_key_of_the_file_is_named_with_the_known_ones(tmp_path: Path) -> None:
    file = tmp_path / "options.toml"
    file.write_text("workers = 3\n")
    with pytest.raises(UsageError, match=r"workers.*max-workers"):
        read_options(file, {})


@pytest.mark.parametrize("content", [None, "quality =", b"\xff\xfe"])
def test_an_unreadable_file_is_a_usage_error(tmp_path: Path, content: str | bytes | None) -> None:
    file = tmp_path / "options.toml"
    if content is not None:
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UsageError, match=r"options\.toml"):
        read_options(file, {})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("quality = true", "--quality true"),
        ("min-confidence = true", "--min-confidence true"),
        ('limit = "2"', '--limit "2"'),
        ('second-look = "yes"', '--second-look "yes"'),
        ('reference = ""', '--reference "": it is empty'),
        ("second-look = true\nsecond_look = false", "second-look is there twice"),
        ("quality = 2026-01-01", '--quality "2026'),
    ],
)
def test_a_value_of_another_kind_in_the_file_is_refused(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "options.toml"
    file.write_text(line)
    with pytest.raises(UsageError, match=message) as caught:
        read_options(file, {})
    assert "options.toml" in str(caught.value)


def test_values_of_every_kind_may_stand_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "options.toml"
    file.write_text('reference = "originals"\ntile = 256\nmin-confidence = 1\nsecond-look = false\nformat = "png"\n')
    options = read_options(file, {})
    assert options == RestoreOptions(
        reference=Path("originals"), tile="256", min_confidence=1.0, second_look=False, format="png"
    )


def test_an_address_without_ray_is_refused() -> None:
    with pytest.raises(UsageError, match="--address there: --engine local uses no cluster"):
        read_options(None, {"engine": "local", "address": "there"})
