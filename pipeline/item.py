"""One image on its way through a worker: what it holds in memory, and the facts that become its row."""

import errno
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from classifier.view import Views
from models.memory import is_out_of_memory
from pipeline.batching import is_device_lost
from pipeline.images import DecodedImage, ImageFault, Pixels, to_uint8
from pipeline.records import ImageRef, Outcome, Stage, Status, printable
from pipeline.sink import OtherRunError

OF_ITS_NAME = frozenset(
    {
        errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY,
        errno.ELOOP, errno.ENOENT, errno.EFBIG,
    }
)  # fmt: skip
"""What one result alone cannot be written for: its name or size, or what stands in its place.

For anything else (a folder that is full, read-only, closed or gone, a process with too many open files) no other
result can be written either.
"""


FIGURES_OF_RESULT = frozenset(
    {"psnr_db", "ssim", "change_rmse_255", "clipped_fraction", "suspicious", "clean_probability_after"}
)


class SourceGoneError(Exception):
    """The folder of source images cannot be reached any more."""


def is_of_machine(error: Exception, stage: Stage) -> bool:
    """Whether the next image would fare no better: results cannot be written, the source or the GPU is gone."""
    if isinstance(error, SourceGoneError | OtherRunError) or is_device_lost(error):
        return True
    return stage is Stage.WRITE and isinstance(error, OSError) and error.errno not in OF_ITS_NAME


@dataclass(eq=False)
class Item:
    """An image in work. `facts` are columns of the manifest, by name."""

    ref: ImageRef
    facts: dict[str, Any]
    warnings: list[str] = field(default_factory=list)
    status: Status | None = None
    """None until it is decided; `restored` before it is, until something fails."""
    data: bytes = b""
    image: DecodedImage | None = None
    view: NDArray[np.uint8] | None = None
    """The picture as classifier and metrics see it: H x W x 3 uint8."""
    is_flat: bool = False
    """Whether the picture is of one tone or of a few flat ones."""
    looked_at: Views | None = None
    """What the classifier is to be asked about: of the picture, once it is restored of the result."""
    reference: NDArray[np.uint8] | None = None
    restored: Pixels | None = None

    @property
    def has_failed(self) -> bool:
        """Whether a stage has failed: later ones leave the item alone."""
        return self.status is Status.FAILED

    def decoded(self) -> DecodedImage:
        """The decoded image; only after the decode stage."""
        assert self.image is not None
        return self.image

    def seen(self) -> NDArray[np.uint8]:
        """The picture in eight bits, H x W x 3; only after the decode stage."""
        if self.view is None:
            self.view = to_uint8(self.decoded().visible)
        return self.view

    def result_seen(self) -> NDArray[np.uint8]:
        """The restored picture in eight bits, H x W x 3; only after the restore stage."""
        assert self.restored is not None
        return to_uint8(self.restored)

    def drop_pixels(self) -> None:
        """Only the row is still needed, and what the classifier is to be asked about."""
        self.data, self.image, self.view, self.reference, self.restored = b"", None, None, None, None

    def add_ms(self, stage: Stage, milliseconds: float) -> None:
        """Adds to the time spent on this image in a stage."""
        name = f"{stage}_ms"
        self.facts[name] = self.facts.get(name, 0.0) + milliseconds

    def fail(self, stage: Stage, error: Exception) -> None:
        """Turns an exception into the row's fault; figures of a result that nobody gets go."""
        self.status = Status.FAILED
        for name in FIGURES_OF_RESULT & self.facts.keys():
            del self.facts[name]
        if isinstance(error, ImageFault):
            stage, error_class, message = error.stage, error.error_class, str(error)
        elif is_out_of_memory(error):
            width, height = (self.facts.get(side) for side in ("width", "height"))
            alone = f"for this {width} x {height} image alone" if width else "while this image was read"
            error_class, message = "out_of_memory", f"memory ran out {alone}" + (f": {error}" if str(error) else "")
        elif isinstance(error, OSError):
            error_class = "name_too_long" if error.errno == errno.ENAMETOOLONG else type(error).__name__
            name = error.filename2 or error.filename  # the former is the final one of a file that was to be renamed
            message = f"{error.strerror or error}" + (f": {name}" if name else "")
        else:
            error_class, message = type(error).__name__, str(error) or type(error).__name__
        self.facts.update(stage=stage, error_class=error_class, error_message=printable(message))

    @contextmanager
    def stage(self, stage: Stage) -> Iterator[None]:
        """The boundary of a stage: times it, and turns what it raises into a `failed` row.

        Raises what is no image's fault (`is_of_machine`), so that the work stops instead of failing all that is left.
        """
        started = time.perf_counter()
        try:
            yield
        except Exception as error:
            if is_of_machine(error, stage):
                raise
            self.fail(stage, error)
        finally:
            self.add_ms(stage, (time.perf_counter() - started) * 1000)

    def outcome(self) -> Outcome:
        """The finished row."""
        assert self.status is not None
        return Outcome(
            image_id=self.ref.image_id,
            source_uri=self.ref.uri,
            relative_path=self.ref.relative_path,
            source_modified=self.ref.modified,
            revision=self.ref.revision,
            status=self.status,
            warnings=tuple(map(printable, self.warnings)),
            **({"finished_at": datetime.now(UTC)} | self.facts),
        )
