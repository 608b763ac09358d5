"""Packs a folder of photographs for training elsewhere: `python -m jobs.pack_photographs --help`."""

import argparse
import io
import zipfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from jobs.errors import UsageError
from jobs.training_data import SUFFIXES

QUALITIES = range(95, 49, -5)


def encoded(path: Path, *, quality: int, longest_px: int) -> bytes:
    """A photograph as JPEG, 4:4:4, shrunk to a longest side; raises what Pillow raises."""
    buffer = io.BytesIO()
    with Image.open(path) as image:
        picture = image.convert("RGB")
    picture.thumbnail((longest_px, longest_px), Image.Resampling.LANCZOS)
    picture.save(buffer, "JPEG", quality=quality, subsampling=0, optimize=True)
    return buffer.getvalue()


def pack(folder: Path, target: Path, *, megabytes: float, longest_px: int) -> int:
    """Writes the photographs of a folder into a zip file under their names, and returns the JPEG quality.

    It is the highest of `QUALITIES` that keeps the file below so many megabytes. The suffix of names stays, whatever
    it is, so that the same photographs are held out.

    Raises:
        UsageError: there are no photographs, or they do not fit.
    """
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise UsageError(f"there are no photographs in {folder}")
    for quality in QUALITIES:
        files = {path.name: encoded(path, quality=quality, longest_px=longest_px) for path in paths}
        # A file's entries in a zip file take twice its name and 100 bytes.
        if sum(len(data) + 2 * len(name) + 100 for name, data in files.items()) > megabytes * 1e6:
            continue
        with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        return quality
    raise UsageError(f"{len(paths)} photographs do not fit into {megabytes} MB; make --longest-px smaller")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("target", type=Path, help="file (.zip) to write; unpack it where the training runs")
    parser.add_argument("--megabytes", type=float, default=20.0)
    parser.add_argument("--longest-px", type=int, default=1000, help="larger photographs are shrunk to this")
    arguments = parser.parse_args(argv)
    quality = pack(arguments.folder, arguments.target, megabytes=arguments.megabytes, longest_px=arguments.longest_px)
    print(f"{arguments.target}: {arguments.target.stat().st_size / 1e6:.1f} MB, JPEG quality {quality}")


if __name__ == "__main__":
    main()
