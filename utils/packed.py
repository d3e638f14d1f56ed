"""Many small arrays or texts in one large one, so that a hundred thousand of them are a few allocations.

A list of small objects costs more in headers than in content, and reading an object writes its reference count: worker
processes that were forked would soon hold copies of the pages that they only read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np


def offsets_of(counts: np.ndarray) -> np.ndarray:
    """Where each of n parts with so many elements begins, and where the last one ends: (n + 1,) int64."""
    offsets = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets


class PackedRows(Sequence):
    """A sequence of arrays (n_i, columns), kept as the rows of one array.

    Attributes:
        rows: (sum of n_i, columns).
        offsets: (length + 1,) int64, where each item's rows begin, and the end.

    Items are views and may not be written to unless nothing else reads them.
    """

    def __init__(self, rows: np.ndarray, offsets: np.ndarray) -> None:
        self.rows, self.offsets = rows, offsets

    @classmethod
    def of(cls, arrays: Sequence[np.ndarray], columns: int) -> PackedRows:
        """Packs copies of arrays (n_i, columns) as float32."""
        rows = np.concatenate([np.zeros((0, columns), np.float32), *arrays])
        return cls(rows, offsets_of(np.array([len(array) for array in arrays], np.int64)))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        begin, end = _bounds(self.offsets, index)
        return self.rows[begin:end]

    @property
    def counts(self) -> np.ndarray:
        """(length,) rows of each item."""
        return np.diff(self.offsets)

    def take(self, order: np.ndarray) -> PackedRows:
        """A copy of the items with these indices, in this order."""
        counts = self.counts[order]
        offsets = offsets_of(counts)
        shifts = np.repeat(self.offsets[:-1][order] - offsets[:-1], counts)
        return PackedRows(self.rows[np.arange(offsets[-1]) + shifts], offsets)

    def owner(self, row: int) -> int:
        """The index of the item that has a row of ``rows``."""
        return int(np.searchsorted(self.offsets, row, "right")) - 1


class PackedTexts(Sequence):
    """A sequence of texts, kept as one array of bytes; file names that are not valid UTF-8 survive."""

    def __init__(self, content: np.ndarray, offsets: np.ndarray) -> None:
        self.content, self.offsets = content, offsets

    @classmethod
    def of(cls, texts: Iterable[str]) -> PackedTexts:
        """Packs texts."""
        encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
        content = np.frombuffer(b"".join(encoded), np.uint8)
        return cls(content, offsets_of(np.array([len(part) for part in encoded], np.int64)))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        begin, end = _bounds(self.offsets, index)
        return self.content[begin:end].tobytes().decode("utf-8", "surrogateescape")


def _bounds(offsets: np.ndarray, index: int) -> tuple[int, int]:
    length = len(offsets) - 1
    if not -length <= index < length:
        raise IndexError(index)
    index %= length
    return offsets[index], offsets[index + 1]
