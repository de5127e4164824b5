"""Texts -> the bytes of their UTF-8, as one uint8 array: no vocabulary, every language, the machinery of images.

A text longer than `length` bytes is cut there, also inside a character; a shorter one is followed by PAD. A byte 0 in a
text becomes a space, and an empty text is one space: so PAD is never part of a text, and no text is nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from distrobust.errors import DataError

PAD = 0
LENGTH = 256  # bytes, where nothing else is said
NULL_TEXT = "text is null, wanted a string (an empty one is allowed); remove the row"


def to_tokens(texts: Sequence[bytes | None], length: int, where: Callable[[int], str]) -> NDArray[np.uint8]:
    """(len(texts), length) uint8. where: names the place of `texts[i]` for the DataError that a null raises."""
    tokens = np.full((len(texts), length), PAD, dtype=np.uint8)
    for i, text in enumerate(texts):
        if text is None:
            raise DataError(f"{where(i)}: {NULL_TEXT}")
        kept = np.frombuffer((text or b" ")[:length].replace(b"\0", b" "), dtype=np.uint8)
        tokens[i, : len(kept)] = kept
    return tokens
