"""Text that may be shown in a terminal."""

from collections.abc import Mapping
from unicodedata import category

_DIRECTIONS = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that turn the direction of the text after them."""


def harmless(text: str) -> str:
    """Text whose control characters, which a terminal would obey and a file's name may have, are written out."""

    def written(character: str) -> str:
        if category(character) in ("Cc", "Cs", "Zl", "Zp") or character in _DIRECTIONS:
            return character.encode("unicode_escape").decode()
        return character

    return "".join(map(written, text))


def several(count: int, name: str) -> str:
    """`1 file`, `2 files`."""
    return f"{count} {name}" if count == 1 else f"{count} {name}s"


def counted(counts: Mapping[str, int]) -> str:
    """`3 restored, 1 copied`, without what there is none of."""
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count)
