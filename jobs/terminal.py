"""What commands show in a terminal, faults among it."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TypeVar

import typer
from rich.console import Console

from jobs.errors import InterruptedBySignalError, RunError, TrainingError, UsageError
from jobs.text import harmless


class _Messages(Console):
    def on_broken_pipe(self) -> None:
        """Nobody reads them any more, as behind a `tee` that the same Ctrl-C has ended; rich would end the process."""
        self.quiet = True


messages = _Messages(stderr=True, highlight=False, emoji=False)
results = Console(highlight=False, emoji=False)
T = TypeVar("T")


@contextmanager
def faults_explained() -> Iterator[None]:
    """Wrong usage, unusable places: exit code 2; a run that broke off: 1; a signal: 128 and its number."""
    fault: Exception
    try:
        yield
    except UsageError as error:
        code, fault = 2, error
    except InterruptedBySignalError as error:
        code, fault = 128 + error.signal_number, error
    except (RunError, TrainingError) as error:
        code, fault = 1, error
    except OSError as error:
        code, fault = 2, UsageError(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except KeyboardInterrupt:
        code, fault = 130, UsageError("interrupted")
    else:
        return
    text = "\n".join(map(harmless, str(fault).split("\n")))
    messages.print(f"dfpir: {text}", markup=False, soft_wrap=True)
    raise typer.Exit(code) from fault


def watched(items: Iterable[T], what: str, total: int) -> Iterable[T]:
    """The items, with a bar on a terminal and with nothing elsewhere, where it would leave an empty line."""
    from rich.progress import track

    return track(items, what, total=total, console=messages, transient=True) if messages.is_terminal else items


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Says on a terminal what is being done, for as long as it takes: of a million images a minute."""
    with messages.status(what) if messages.is_terminal else nullcontext():
        yield
