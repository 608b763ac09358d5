import subprocess
import sys

import pytest

from pipeline import watchdog
from pipeline.watchdog import Watchdog

# A sleep of the C library that keeps Python's lock, as a codec that hangs may.
HANGS = "ctypes.PyDLL(None).sleep(60)"
LIVES = "[(time.sleep(0.2), dog.headway()) for _ in range(12)]"


def run(body: str) -> subprocess.CompletedProcess[str]:
    code = f"import ctypes, time\nfrom pipeline.watchdog import Watchdog\n{body}\nprint('lived')"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False)


def test_a_process_that_hangs_with_the_interpreter_locked_ends_and_says_where() -> None:
    ended = run(f"with Watchdog(1.0) as dog:\n    {HANGS}")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "Timeout (0:00:01)" in ended.stderr
    assert 'File "<string>", line 4' in ended.stderr


def test_the_timer_is_set_anew_when_it_would_end_much_earlier_or_later(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, timers = [1000.0], []
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback_later", lambda after, **_: timers.append(after))
    with Watchdog(100.0) as dog:
        for after_s, pixels, expected in [
            (0.0, 0, [100.0]), (0.9, 0, [100.0]), (0.2, 0, [100.0, 100.0]), (0.5, 100_000, [100.0, 100.0, 220.0]),
            (0.5, 0, [100.0, 100.0, 220.0, 100.0]), (0.5, 0, [100.0, 100.0, 220.0, 100.0]),
        ]:  # fmt: skip
            clock[0] += after_s
            dog.headway(pixels=pixels)
            assert timers == expected
    with dog:
        assert len(timers) == 5


@pytest.mark.parametrize(
    "body",
    [
        f"with Watchdog(2.0) as dog:\n    {LIVES}",
        "with Watchdog(0.5) as dog:\n    dog.headway(pixels=100_000)\n    time.sleep(1.5)",
        "with Watchdog(0.5):\n    pass\ntime.sleep(1.5)",
    ],
    ids=["headway", "many pixels", "nothing to watch"],
)
def test_a_process_with_headway_time_allowed_or_nothing_to_do_lives(body: str) -> None:
    ended = run(body)
    assert (ended.returncode, ended.stdout.strip()) == (0, "lived"), ended.stderr
