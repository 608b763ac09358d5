import pytest

from pipeline.batching import batches


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (0, [["a1"], ["a2"], ["a3"], ["b1"]]),
        (1, [["a1"], ["a2"], ["a3"], ["b1"]]),
        (2, [["a1", "a2"], ["a3"], ["b1"]]),
        (9, [["a1", "a2", "a3"], ["b1"]]),
    ],
)
def test_batches_have_one_key_and_no_more_than_there_is_room_for(limit: int, expected: list[list[str]]) -> None:
    assert list(batches(["a1", "b1", "a2", "a3"], key=lambda name: name[0], limit=lambda _: limit)) == expected
