"""Packs a folder of photographs for training elsewhere: `python -m jobs.pack_photographs --help`."""

import argparse
import csv
import io
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from PIL import Image

from jobs.datasets import read_rgb
from jobs.errors import UsageError
from jobs.training_data import photographs_in
from jobs.training_loop import run_as_command

QUALITIES = range(95, 49, -5)
OTHERS = "photographs"
"""Folder of what a list names no other for; configurations expect clean photographs there."""


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


def read_folders(path: Path) -> dict[str, str]:
    """Folders by file name, from a table with the columns `file` and `folder` and tabs between; UsageError if none."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            found = {row["file"]: row["folder"] for row in csv.DictReader(file, delimiter="\t")}
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except (KeyError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no table with the columns file and folder, and tabs between") from error
    if wrong := [folder for folder in found.values() if not folder or Path(folder).name != folder]:
        raise UsageError(f"{path}: {wrong[0]!r} is no name of a folder")
    return found


def pack(
    folder: Path, target: Path, *, megabytes: float, longest_px: int, folders: Mapping[str, str] | None = None
) -> int:
    """Writes the photographs of a folder into a zip file under their names, and returns the JPEG quality.

    It is the highest of `QUALITIES` that keeps the file below so many megabytes. The suffix of names stays, whatever
    it is, so that the same photographs are held out. With `folders` each comes into the folder given for its name,
    or into `OTHERS`.

    Raises:
        UsageError: there are no photographs, one cannot be read, they do not fit, or `target` cannot be written.
    """
    if longest_px < 1:
        raise UsageError(f"--longest-px is from 1 up, not {longest_px}")
    paths = photographs_in([folder])
    if not paths:
        raise UsageError(f"there are no photographs in {folder}")
    if folders is not None and (missing := sorted(folders.keys() - {path.name for path in paths})):
        raise UsageError(f"of the files to be sorted {len(missing)} are not in {folder}, {missing[0]} among them")

    def place(name: str) -> str:
        return name if folders is None else f"{folders.get(name, OTHERS)}/{name}"

    if odd := [path.name for path in paths if path.name.encode(errors="ignore").decode() != path.name]:
        raise UsageError(f"a zip file holds no such name: {odd[0]!r} is not UTF-8")
    pictures = {place(path.name): shrunk(path, longest_px) for path in paths}
    for quality in QUALITIES:
        files = {name: encoded(picture, quality) for name, picture in pictures.items()}
        # A file's entries in a zip file take twice its name and 100 bytes.
        if sum(len(data) + 2 * len(name) + 100 for name, data in files.items()) > megabytes * 1e6:
            continue
        partial = target.with_name(f"{target.name}.partial")
        try:
            with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
                for name, data in files.items():
                    archive.writestr(name, data)
            partial.replace(target)
        except OSError as error:
            raise UsageError(f"{target} cannot be written: {error.strerror}") from error
        finally:
            with suppress(OSError):
                partial.unlink()
        return quality
    raise UsageError(f"{len(pictures)} photographs do not fit into {megabytes} MB; make --longest-px smaller")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("target", type=Path, help="file (.zip) to write; unpack it where the training runs")
    parser.add_argument("--megabytes", type=float, default=20.0)
    parser.add_argument("--longest-px", type=int, default=1000, help="larger photographs are shrunk to this")
    folders_help = f"table (.tsv) of files and the folders that they come into; all others come into {OTHERS}/"
    parser.add_argument("--folders", type=Path, help=folders_help)
    arguments = parser.parse_args(argv)
    target, sizes = arguments.target, {"megabytes": arguments.megabytes, "longest_px": arguments.longest_px}

    def work() -> None:
        folders = read_folders(arguments.folders) if arguments.folders is not None else None
        quality = pack(arguments.folder, target, folders=folders, **sizes)
        print(f"{target}: {target.stat().st_size / 1e6:.1f} MB, JPEG quality {quality}")

    run_as_command(work)


if __name__ == "__main__":
    main()
