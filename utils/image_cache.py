"""The decoded and scaled images of a data set, in memory or in a file, so that later epochs need not decode them.

One array holds all pixels. Its size follows from the images' sizes, so what it takes is known and said before it is
taken, and forked worker processes share it.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np

from utils.errors import UserError
from utils.label_cache import check_writable
from utils.labels import READERS
from utils.log import LOGGER
from utils.memory import available_memory
from utils.packed import offsets_of
from utils.paths import written_at_once
from utils.progress import progress
from utils.threads import ThreadPool

FILE_VERSION = 1
DIGEST_BYTES = 32
LARGEST_SHARE = 0.8  # of the free memory or disk space; the rest is for batches, the network and other programs
BLOCK = 64  # images that are decoded ahead of what has been stored

Read = Callable[[int], np.ndarray]


class ImageCache:
    """Images (height, width, 3) uint8 by their index; they may not be written to."""

    def __init__(self, content: np.ndarray, shapes: np.ndarray, file: Path | None = None) -> None:
        self.content, self.shapes, self.file = content, shapes, file
        self.offsets = image_offsets(shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, index: int) -> np.ndarray:
        begin, end = self.offsets[index], self.offsets[index + 1]
        return self.content[begin:end].reshape(*self.shapes[index], 3)

    def __getstate__(self) -> dict:
        """Worker processes that are not forked map the file themselves instead of being sent its content."""
        return self.__dict__ | ({"content": None} if self.file else {})

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state
        if self.file:
            self.content = np.load(self.file, mmap_mode="r", allow_pickle=False)


def image_offsets(shapes: np.ndarray) -> np.ndarray:
    """Where each of n images of shapes (n, 2) begins in the array, and where the last one ends: (n + 1,) bytes."""
    return offsets_of(3 * np.asarray(shapes, np.int64).prod(1))


def cache_in_memory(shapes: np.ndarray, read: Read, prefix: str, copies: int = 1) -> ImageCache | None:
    """Reads all images into memory, or returns None and says why if they need too much of it.

    Args:
        shapes: (n, 2) height, width of each image.
        read: the image of an index; called from several threads.
        copies: how many processes will hold the images.
    """
    needed, available = int(image_offsets(shapes)[-1]), available_memory()
    times = f"{copies} x " if copies > 1 else ""
    takes = f"{len(shapes)} images need {times}{megabytes(needed)} of memory"
    if available is not None and copies * needed > LARGEST_SHARE * available:
        LOGGER.warning(
            f"{prefix}: not cached: {takes}, {megabytes(available)} are free, of which {LARGEST_SHARE:.0%} may be "
            "taken. Every image is decoded anew; '--cache disk' decodes once, or use a smaller --imgsz."
        )
        return None
    free = "" if available is None else f" of {megabytes(available)} that are free"
    LOGGER.info(f"{prefix}: caching: {takes}{free}")
    cache = ImageCache(np.empty(needed, np.uint8), np.asarray(shapes))
    for index, image in enumerate(_read_all(shapes, read, prefix)):
        cache[index][:] = image
    return cache


def cache_on_disk(
    files: Sequence[Path], digest: bytes, shapes: np.ndarray, read: Read, prefix: str
) -> ImageCache | None:
    """Maps a file of all images, writing it first if there is none of ``digest``; None, said why, if it cannot be.

    Args:
        files: where the file (.npy, bytes) may lie, best place first.
        digest: of everything that the images depend on, 32 bytes; see ``digest_of``.
    """
    shapes = np.asarray(shapes)
    for file in files:
        if (content := open_file(file, digest, shapes)) is not None:
            LOGGER.info(f"{prefix}: {len(shapes)} images, {megabytes(len(content))}, are read from {file}")
            return ImageCache(content, shapes, file)
    needed, reasons = int(image_offsets(shapes)[-1]) + DIGEST_BYTES, []
    for file in files:
        try:
            check_writable(file.parent)
            free = shutil.disk_usage(file.parent).free
            if needed > LARGEST_SHARE * free:
                reasons.append(f"{megabytes(free)} are free in {file.parent}")
                continue
            LOGGER.info(f"{prefix}: caching: {len(shapes)} images, {megabytes(needed)}, in {file}")
            _write_file(file, digest, shapes, read, prefix)
        except OSError as error:
            reasons.append(f"{file.parent} cannot be written to ({error.strerror or error})")
            continue
        return ImageCache(np.load(file, mmap_mode="r", allow_pickle=False), shapes, file)
    LOGGER.warning(
        f"{prefix}: not cached: {len(shapes)} images need {megabytes(needed)} of disk space, but {'; '.join(reasons)}; "
        f"{LARGEST_SHARE:.0%} of what is free may be taken. Every image is decoded anew."
    )
    return None


def digest_of(paths: Sequence[str], stamps: np.ndarray, shapes: np.ndarray, *settings: object) -> bytes:
    """A hash of what cached images depend on: which files, their sizes and times, how they are scaled and by what."""
    digest = hashlib.sha256(repr((FILE_VERSION, cv2.__version__, *settings)).encode())
    digest.update("\n".join(paths).encode("utf-8", "surrogateescape"))
    for numbers in (stamps, shapes):
        digest.update(np.ascontiguousarray(numbers, np.int64).tobytes())
    return digest.digest()


def open_file(file: Path, digest: bytes, shapes: np.ndarray) -> np.ndarray | None:
    """The mapped bytes of a cache file; None if there is none, or if it is not the one that ``digest`` describes."""
    try:
        content = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    fits = isinstance(content, np.memmap) and content.dtype == np.uint8
    fits = fits and content.shape == (image_offsets(shapes)[-1] + DIGEST_BYTES,)
    return content if fits and content[-DIGEST_BYTES:].tobytes() == digest else None


def _write_file(file: Path, digest: bytes, shapes: np.ndarray, read: Read, prefix: str) -> None:
    """Written as a stream, because a full disk would end a process that writes through a mapping."""
    length = int(image_offsets(shapes)[-1]) + DIGEST_BYTES
    with written_at_once(file) as stream:
        header = {"descr": "|u1", "fortran_order": False, "shape": (length,)}
        np.lib.format.write_array_header_1_0(stream, header)
        for image in _read_all(shapes, read, prefix):
            stream.write(np.ascontiguousarray(image))
        stream.write(digest)


def _read_all(shapes: np.ndarray, read: Read, prefix: str) -> Iterator[np.ndarray]:
    """All images in order, decoded by several threads a block ahead."""
    with ThreadPool(READERS) as pool, progress(label=f"{prefix}: caching images", total=len(shapes)) as bar:
        for begin in range(0, len(shapes), BLOCK):
            block = range(begin, min(begin + BLOCK, len(shapes)))
            for index, image in zip(block, pool.map(read, block), strict=True):
                if image.shape != (*shapes[index], 3):
                    raise UserError(f"{prefix}: image {index} has changed its size since the start. Start again.")
                bar.update()
                yield image


def megabytes(size: int) -> str:
    """Bytes as people read them."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
