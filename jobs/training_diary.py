"""What a training writes for people."""

import fcntl
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jobs.errors import UsageError
from pipeline.synthesis import FloatImage, to_uint8

log = logging.getLogger("training")
LOG_EVERY = 50
"""Steps between two lines of the log."""


class Diary:
    """Writes `training.log`, logs for TensorBoard where that is installed, and sheets of samples.

    It holds the folder against a second training. Nothing is written before there is something to say, so that a
    training that cannot begin leaves its folder empty.
    """

    def __init__(self, out: Path) -> None:
        self.out, self.losses = out, list[float]()
        self._folder = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(self._folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._folder)
            raise UsageError(f"another training is working on {out}; wait for it, or end it") from error
        self.file = logging.FileHandler(out / "training.log", encoding="utf-8", delay=True)
        self.file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        log.addHandler(self.file)
        log.setLevel(logging.INFO)

    @cached_property
    def board(self) -> Any:
        """TensorBoard's writer, or None."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            log.info("TensorBoard is not installed: its logs are not written")
            return None
        return SummaryWriter(str(self.out / "tensorboard"))

    def close(self) -> None:
        """Ends the log, and lets go of the folder."""
        fcntl.flock(self._folder, fcntl.LOCK_UN)  # processes that make samples still have it open
        os.close(self._folder)
        log.removeHandler(self.file)
        self.file.close()
        if vars(self).get("board") is not None:
            with suppress(OSError):
                self.board.close()

    def step(self, step: int, *, loss: float, rate: float, seconds: float, progress: float) -> None:
        """Notes a step, and every fiftieth the mean loss since the last time."""
        self.losses.append(loss)
        if step % LOG_EVERY:
            return
        mean = float(np.mean(self.losses))
        log.info("step %d, %.1f min, %.1f %%, loss %.4f", step, seconds / 60, 100 * progress, mean)
        self.losses.clear()
        with self._without_full_disk():
            if self.board is not None:
                self.board.add_scalar("loss", mean, step)
                self.board.add_scalar("learning rate", rate, step)

    def validation(self, step: int, line: str, values: Mapping[str, float], sheet: FloatImage) -> None:
        """Notes a line for the log, values for TensorBoard, and a sheet of samples, H x W x 3 in [0, 1], for both."""
        log.info("validation: %s", line)
        with self._without_full_disk():
            folder = self.out / "samples"
            folder.mkdir(exist_ok=True)
            Image.fromarray(to_uint8(sheet)).save(folder / f"step-{step:07d}.png")
            if self.board is not None:
                for name, value in values.items():
                    self.board.add_scalar(name, value, step)
                self.board.add_image("samples", sheet, step, dataformats="HWC")
                self.board.flush()

    @contextmanager
    def _without_full_disk(self) -> Iterator[None]:
        """Goes without what cannot be written: only checkpoints are worth the end of a training."""
        try:
            yield
        except OSError as error:
            log.warning("no more logs for TensorBoard, and perhaps no sheet of samples: %s", error)
            self.board = None
