"""What the bytes of an image file tell without a decoder: which format they are of, and whether they are all there."""

import itertools
import struct
import zlib
from collections.abc import Iterator
from typing import Literal

BEGINNINGS: dict[str, tuple[bytes, ...]] = {
    "JPEG": (b"\xff\xd8\xff",),
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "WEBP": (b"RIFF",),
    "TIFF": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
    "BMP": (b"BM",),
    "GIF": (b"GIF8",),
    "PPM": tuple(f"P{kind}{space}".encode() for kind in range(1, 7) for space in " \n"),
}

_LEAST_UNFINISHED, _SHORTENED_BY = 4096, 64
"""Zeros: a block of most file systems; and how many of them are tried without."""

_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""By colour type."""
_AT_ONCE = ((0, 0, 1, 1),)
_INTERLACED = (
    (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2),
)  # fmt: skip
"""First column and row of each pass of a PNG, and the steps from there."""


def format_by_beginning(beginning: bytes) -> str | None:
    """Pillow's name of the format that the first 16 bytes are those of."""
    return next((name for name, starts in BEGINNINGS.items() if beginning.startswith(starts)), None)


def is_cut_short(data: bytes, name: str) -> bool:
    """Whether a file of the format lacks the end that its beginning promises."""
    match name:
        case "JPEG":
            return b"\xff\xd9" not in data
        case "PNG":
            return b"IEND" not in data[-4096:]
        case "WEBP":
            return len(data) < 12 or len(data) < int.from_bytes(data[4:8], "little") + 8
        case "BMP":
            return len(data) < 54 or len(data) < int.from_bytes(data[2:6], "little")
        case "TIFF":
            order: Literal["little", "big"] = "little" if data.startswith(b"II") else "big"
            start = data[8:16] if data[2:4] in (b"+\0", b"\0+") else data[4:8]
            return len(data) < int.from_bytes(start, order) + 2
        case "GIF":
            return not data.rstrip(b"\0").endswith(b";")
    return False


def unfinished_end(data: bytes) -> int:
    """How many zeros a JPEG ends in that its decoder would take for pixels; 0: its end was written."""
    zeros = len(data) - len(data.rstrip(b"\0"))
    return zeros if zeros >= 16 and _end_of_picture(data) < 0 else 0


def bytes_behind_jpeg(data: bytes) -> int:
    """How many bytes follow the end of a JPEG's picture, without the zeros that they end in; 0 if it has no end."""
    end = _end_of_picture(data)
    return len(data[end + 2 :].rstrip(b"\0")) if end >= 0 else 0


def _end_of_picture(data: bytes) -> int:
    """Where a JPEG's marker of the end stands that comes after its first scan; -1 if there is none."""
    return data.find(b"\xff\xd9", _first_scan(data))


def shortened_webp(data: bytes) -> bytes | None:
    """A WebP without the last bytes of its picture, if that ends in many zeros and is not one of several frames.

    A decoder needs the zeros that a flat picture ends in by itself, and not those of an end that was never written.
    """
    place = next((place for place in _webp_chunks(data) if place[0] in (b"VP8 ", b"VP8L")), None)
    if place is None or b"ANMF" in data[: place[1]]:
        return None
    _, begin, end = place
    if end - begin - len(data[begin:end].rstrip(b"\0")) < _LEAST_UNFINISHED:
        return None
    sizes = (int.from_bytes(data[at : at + 4], "little") - _SHORTENED_BY for at in (4, begin - 4))
    whole, own = (size.to_bytes(4, "little") for size in sizes)
    return data[:4] + whole + data[8 : begin - 4] + own + data[begin : end - _SHORTENED_BY] + data[end:]


def _first_scan(data: bytes) -> int:
    """Where a JPEG's pixels begin, behind segments that may hold a whole JPEG as a thumbnail."""
    at = 2
    while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] != b"\xda":
        is_fill = data[at + 1 : at + 2] == b"\xff"  # any number of them may stand before a marker
        at += 1 if is_fill else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return at


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, begin and end of the content of each chunk of a PNG that is there as a whole, up to the last one."""
    kind, at = b"", len(BEGINNINGS["PNG"][0])
    while at + 12 <= len(data) and kind != b"IEND":
        kind, end = data[at + 4 : at + 8], at + 8 + int.from_bytes(data[at : at + 4], "big")
        yield kind, at + 8, end
        at = end + 4


def has_damaged_pixels(data: bytes) -> bool:
    """Holds a PNG's compressed pixels against their checksums, which Pillow does not."""
    view = memoryview(data)
    return any(
        kind == b"IDAT" and zlib.crc32(view[begin - 4 : end]) != int.from_bytes(data[end : end + 4], "big")
        for kind, begin, end in png_chunks(data)
    )


def lacks_rows(data: bytes) -> bool:
    """Whether the compressed pixels of a PNG end before its last row; Pillow leaves what is missing black."""
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", data[16:29])
    missing = 0
    for left, top, across, down in _INTERLACED if interlaced else _AT_ONCE:
        columns, rows = len(range(left, width, across)), len(range(top, height, down))
        if columns:
            missing += rows * (1 + (columns * depth * _PNG_CHANNELS[colour] + 7) // 8)
    view, inflater = memoryview(data), zlib.decompressobj()
    for kind, begin, end in png_chunks(data):
        compressed: bytes | memoryview = view[begin:end] if kind == b"IDAT" else b""
        while compressed and missing > 0:
            missing -= len(inflater.decompress(compressed, 2**20))
            compressed = inflater.unconsumed_tail
    return missing > 0


def png_colour(data: bytes) -> tuple[tuple[bytes, bytes], ...]:
    """A PNG's chunks about colour, which stand before its pixels; Pillow tells of some, and then in rounded numbers."""
    before = itertools.takewhile(lambda chunk: chunk[0] != b"IDAT", png_chunks(data))
    return tuple((kind, data[begin:end]) for kind, begin, end in before if kind in (b"cHRM", b"cICP", b"gAMA", b"sRGB"))


def _webp_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, begin and end of the content of each chunk of a WebP, those in its frames included."""
    place = 12
    while place + 8 <= len(data):
        kind, size = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        if kind == b"ANMF":
            place += 24  # into the frame, whose own chunks follow its size and place
        else:
            yield kind, place + 8, place + 8 + size
            place += 8 + size + size % 2


def is_lossless_webp(data: bytes) -> bool:
    """Whether the first picture in the file is stored exactly."""
    return next((kind for kind, *_ in _webp_chunks(data) if kind in (b"VP8 ", b"VP8L")), None) == b"VP8L"


def states_no_pixels(data: bytes, name: str) -> bool:
    """Whether the header says that a side is 0; Pillow takes such a file for none of its format."""
    match name:
        case "PNG":
            sides = [data[16:20], data[20:24]]
        case "BMP":
            sides = [data[18:22], data[22:26]]
        case "PPM":
            return any(int(side) == 0 for side in data[:64].split()[1:3] if side.isdigit())
        case _:
            return False
    return bytes(4) in sides
