import numpy as np
import pytest

from pipeline.transparency import completed


def filled(line: str) -> str:
    """A row of letters, of which `.` are hidden, as it is completed."""
    row = np.frombuffer(line.encode(), np.uint8)
    pixels, alpha = np.repeat(row[None, :, None], 3, axis=2), np.where(row == ord("."), 0, 255)[None]
    return completed(pixels, alpha)[0, :, 0].tobytes().decode()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("abc", "abc"),
        ("...", "..."),
        (".a.", "aaa"),
        ("abc..", "abccb"),
        ("...abc....", "cbaabccbaa"),
        ("ab...c", "abbaac"),
    ],
)
def test_a_row_goes_on_mirrored_where_it_is_hidden(line: str, expected: str) -> None:
    assert filled(line) == expected


def test_rows_that_are_hidden_mirror_the_others() -> None:
    pixels = np.arange(5 * 4 * 3, dtype=np.uint16).reshape(5, 4, 3)
    alpha = np.zeros((5, 4), np.uint16)
    alpha[1:3] = 1
    assert (completed(pixels, alpha) == pixels[[1, 1, 2, 2, 1]]).all()
