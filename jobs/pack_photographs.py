"""Packs a folder of photographs for training elsewhere: `python -m jobs.pack_photographs --help`."""

import argparse
import io
import zipfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from jobs.datasets import read_rgb
from jobs.errors import UsageError
from jobs.training_data import photographs_in
from jobs.training_loop import run_as_command

QUALITIES = range(95, 49, -5)


def shrunk(path: Path, longest_px: int) -> Image.Image:
    """A photograph with a longest side of at most so many pixels; raises UsageError if it cannot be read."""
    picture = Image.fromarray(read_rgb(path))
    picture.thumbnail((longest_px, longest_px), Image.Resampling.LANCZOS)
    return picture


def encoded(picture: Image.Image, quality: int) -> bytes:
    """A picture as JPEG, 4:4:4."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality, subsampling=0, optimize=True)
    return buffer.getvalue()


def pack(folder: Path, target: Path, *, megabytes: float, longest_px: int) -> int:
    """Writes the photographs of a folder into a zip file under their names, and returns the JPEG quality.

    It is the highest of `QUALITIES` that keeps the file below so many megabytes. The suffix of names stays, whatever
    it is, so that the same photographs are held out.

    Raises:
        UsageError: there are no photographs, one cannot be read, they do not fit, or `target` cannot be written.
    """
    pictures = {path.name: shrunk(path, longest_px) for path in photographs_in([folder])}
    if not pictures:
        raise UsageError(f"there are no photographs in {folder}")
    for quality in QUALITIES:
        files = {name: encoded(picture, quality) for name, picture in pictures.items()}
        # A file's entries in a zip file take twice its name and 100 bytes.
        if sum(len(data) + 2 * len(name) + 100 for name, data in files.items()) > megabytes * 1e6:
            continue
        try:
            with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
                for name, data in files.items():
                    archive.writestr(name, data)
        except OSError as error:
            raise UsageError(f"{target} cannot be written: {error.strerror}") from error
        return quality
    raise UsageError(f"{len(pictures)} photographs do not fit into {megabytes} MB; make --longest-px smaller")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("target", type=Path, help="file (.zip) to write; unpack it where the training runs")
    parser.add_argument("--megabytes", type=float, default=20.0)
    parser.add_argument("--longest-px", type=int, default=1000, help="larger photographs are shrunk to this")
    arguments = parser.parse_args(argv)
    target, sizes = arguments.target, {"megabytes": arguments.megabytes, "longest_px": arguments.longest_px}

    def work() -> None:
        quality = pack(arguments.folder, target, **sizes)
        print(f"{target}: {target.stat().st_size / 1e6:.1f} MB, JPEG quality {quality}")

    run_as_command(work)


if __name__ == "__main__":
    main()
