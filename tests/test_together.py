"""Calls of many threads, answered in groups."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import pytest

from classifier.together import Together


class Doubling:
    """Doubles numbers, group by group, once `go` is set; is asked by one thread at a time."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.begun = threading.Semaphore(0)
        self.groups: list[list[int]] = []
        self._busy = threading.Lock()

    def __call__(self, numbers: Sequence[int]) -> list[int]:
        assert self._busy.acquire(blocking=False)
        self.groups.append(list(numbers))
        self.begun.release()
        assert self.go.wait(10)
        self._busy.release()
        if 13 in numbers:
            raise ArithmeticError("unlucky")
        return [2 * number for number in numbers]


def gathered(threads: ThreadPoolExecutor, together: Together[int, int], answer: Doubling, numbers: list[int]) -> list:
    """Futures of a first call that is under way, and of others that came meanwhile."""
    first = threads.submit(together, 1)
    assert answer.begun.acquire(timeout=10)
    futures = [first, *(threads.submit(together, number) for number in numbers)]
    while len(together._waiting) < len(numbers):
        threading.Event().wait(0.001)
    answer.go.set()
    return futures


def test_those_who_come_meanwhile_are_answered_together_and_each_gets_its_own() -> None:
    answer = Doubling()
    together = Together(answer, most=4)
    with ThreadPoolExecutor(8) as threads:
        futures = gathered(threads, together, answer, [2, 3, 4, 5, 6, 7])
        assert [future.result(timeout=10) for future in futures] == [2, 4, 6, 8, 10, 12, 14]
    assert sorted(map(len, answer.groups)) == [1, 2, 4]
    assert sorted(chain(*answer.groups)) == [1, 2, 3, 4, 5, 6, 7]


def test_what_is_raised_reaches_all_who_asked_together_and_nobody_else() -> None:
    answer = Doubling()
    together = Together(answer, most=8)
    with ThreadPoolExecutor(8) as threads:
        first, *others = gathered(threads, together, answer, [12, 13])
        assert first.result(timeout=10) == 2
        for future in others:
            with pytest.raises(ArithmeticError, match="unlucky"):
                future.result(timeout=10)
    assert together(4) == 8


def test_a_thousand_calls_from_many_threads() -> None:
    answer = Doubling()
    answer.go.set()
    together = Together(answer, most=3)
    with ThreadPoolExecutor(16) as threads:
        assert list(threads.map(together, range(20, 1020))) == list(range(40, 2040, 2))
    assert max(map(len, answer.groups)) <= 3


def test_not_even_an_end_of_the_thread_that_answers_leaves_others_waiting() -> None:
    def answer(numbers: Sequence[int]) -> list[int]:
        raise SystemExit

    together = Together(answer, most=8)
    with ThreadPoolExecutor(4) as threads:
        for future in [threads.submit(together, number) for number in range(8)]:
            with pytest.raises(SystemExit):
                future.result(timeout=10)


def test_nothing_is_an_answer_too() -> None:
    assert Together(lambda questions: [None] * len(questions), most=2)(1) is None
