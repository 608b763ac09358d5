"""Calls of many threads answered in groups, for what costs about the same for one as for several."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Q = TypeVar("Q")
A = TypeVar("A")


@dataclass(eq=False)
class _Call(Generic[Q, A]):
    question: Q
    answers: list[A] = field(default_factory=list)
    """One, once it is there."""
    error: BaseException | None = None

    @property
    def is_open(self) -> bool:
        return not self.answers and self.error is None


class Together(Generic[Q, A]):
    """Called like a function of one question. While one group is being answered, the next one gathers."""

    def __init__(self, answer: Callable[[Sequence[Q]], Sequence[A]], *, most: int) -> None:
        """`answer` gets up to `most` questions, from one thread at a time; what it raises, all who asked get."""
        self._answer, self._most = answer, most
        self._waiting = deque[_Call[Q, A]]()
        self._lock = threading.Lock()

    def __call__(self, question: Q) -> A:
        """The answer to a question, by whichever thread comes to answer it."""
        call: _Call[Q, A] = _Call(question)
        self._waiting.append(call)
        with self._lock:
            while call.is_open:
                self._answer_some()
        if call.error is not None:
            # Without its traceback, which would keep the questions alive.
            raise call.error.with_traceback(None)
        return call.answers[0]

    def _answer_some(self) -> None:
        group = [self._waiting.popleft() for _ in range(min(self._most, len(self._waiting)))]
        try:
            answers = self._answer([call.question for call in group])
            for call, answer in zip(group, answers, strict=True):
                call.answers.append(answer)
        except BaseException as error:
            for call in group:
                call.error = error
