"""Which image a careful attempt has in hand, on disk, so that the one that kills its process can be named.

From a shard's second attempt on, images go one at a time. Before each, its id is written here; the id is gone
once the image has been dealt with. An id found at the start of an attempt is that of an image whose process died.
"""

import json
import os
from contextlib import suppress
from pathlib import Path

DEATHS_TO_QUARANTINE = 2
"""Deaths of a process with one and the same image in hand after which that image is given up."""


class Journal:
    """One shard's journal; only the process that holds the shard's lock writes it."""

    def __init__(self, journal_dir: Path, shard_id: str) -> None:
        self._path = journal_dir / f"{shard_id}.json"
        self._in_flight: str | None = None
        self._deaths: dict[str, int] = {}
        # A machine that lost its power may leave the file empty.
        with suppress(FileNotFoundError, ValueError):
            content = json.loads(self._path.read_text(encoding="utf-8"))
            self._in_flight, self._deaths = content["in_flight"], content["deaths"]

    @property
    def is_empty(self) -> bool:
        """Whether no process has died over an image of this shard."""
        return self._in_flight is None and not self._deaths

    @property
    def has_in_flight(self) -> bool:
        """Whether an image is in hand, or was when its process died."""
        return self._in_flight is not None

    def deaths(self, image_id: str) -> int:
        """Processes that died with this image in hand."""
        return self._deaths.get(image_id, 0)

    def is_poison(self, image_id: str) -> bool:
        """Whether the image is to be quarantined."""
        return self.deaths(image_id) >= DEATHS_TO_QUARANTINE

    def count_death(self) -> str | None:
        """At the start of an attempt: the image left in hand, if any, has one more death. Returns its id."""
        image_id = self._in_flight
        if image_id is not None:
            self._deaths[image_id] = self.deaths(image_id) + 1
            self._in_flight = None
            self._write()
        return image_id

    def begin(self, image_id: str) -> None:
        """The image is in hand from now on."""
        self._in_flight = image_id
        self._write()

    def end(self) -> None:
        """No image is in hand."""
        self._in_flight = None
        try:
            self._write()
        except OSError:
            self.remove()  # a full disk is no image's fault: the next attempt must not find one in hand
            raise

    def forgive(self) -> None:
        """The image in hand did not cause the death: the machine went away, or the whole run was ended."""
        if self.has_in_flight:
            self.end()

    def remove(self) -> None:
        """The shard is done."""
        self._path.unlink(missing_ok=True)

    def _write(self) -> None:
        # No fsync: a process's death loses nothing that was written, and a machine's death counts for no image.
        temporary = self._path.with_name(f".{self._path.name}.partial")
        temporary.write_text(json.dumps({"in_flight": self._in_flight, "deaths": self._deaths}), encoding="utf-8")
        os.replace(temporary, self._path)
