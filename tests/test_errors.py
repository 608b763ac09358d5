import pickle
import signal

import pytest

from jobs.errors import InterruptedBySignalError


@pytest.mark.parametrize("goes_on", [True, False])
def test_an_interruption_says_the_same_in_another_process(goes_on: bool) -> None:
    error = InterruptedBySignalError(signal.SIGTERM, goes_on=goes_on)
    there = pickle.loads(pickle.dumps(error))
    assert (str(there), there.signal_number) == (str(error), signal.SIGTERM)
    assert ("goes on" in str(error)) is goes_on
