"""The file in which the checked labels of a split are kept, so that the second start reads one file.

Plain arrays in an npz (no pickle): nothing in it is executed. Each image has the size and modification time of its
files, so what has changed is read again.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from utils.images import is_image
from utils.packed import PackedRows, offsets_of
from utils.paths import written_at_once

CACHE_VERSION = 2


@dataclass
class LabelTable:
    """What is known of n different images and their label files.

    Attributes:
        images: n paths.
        stamps: (n, 4) int64, size and modification time in ns of the image, then of the label file (-1, -1: none).
        sizes: (n, 2) int64, width and height as seen, after EXIF rotation; 0 where the image cannot be decoded.
        labels: per image (n_i, 5) float32: class, normalised xywh.
        corrupt: position -> why the image cannot be used.
        problems: position -> bad label lines.
    """

    images: list[str]
    stamps: np.ndarray
    sizes: np.ndarray
    labels: PackedRows
    corrupt: dict[int, str] = field(default_factory=dict)
    problems: dict[int, list[str]] = field(default_factory=dict)


def cache_candidates(
    path_spec: str | Path | Sequence[str | Path], place: Path, ending: str = ".labels.cache"
) -> list[Path]:
    """Where the cache of a split may lie, best place first: beside ``place``, or in the user's cache folder."""
    specs = [path_spec] if isinstance(path_spec, (str, Path)) else list(path_spec)
    key = hashlib.sha256("\n".join(os.path.abspath(spec) for spec in specs).encode()).hexdigest()[:12]
    first = Path(specs[0])
    if first.is_file() and not is_image(first):
        place = first
    name = f"{place.stem}{ending}" if len(specs) == 1 else f"{place.stem}-{key}{ending}"
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return [place.absolute().with_name(name), home / "yolov5_qat" / f"{place.stem}-{key}{ending}"]


def check_writable(folder: Path) -> None:
    """Makes a folder for cache files.

    Raises:
        OSError: it cannot be made or written to, or is marked read-only.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not folder.stat().st_mode & 0o222:
        # The system would let root write here; whoever took the write bits away meant it.
        raise PermissionError(f"{folder} is marked read-only")


def save_cache(file: Path, table: LabelTable) -> None:
    """Writes a table: first to a temporary file, then renamed.

    Raises:
        OSError: the folder cannot be written to, or is marked read-only.
    """
    texts = {"images": table.images, "corrupt": table.corrupt, "problems": table.problems}
    arrays = {
        "version": np.array(CACHE_VERSION),
        "texts": np.frombuffer(json.dumps(texts).encode(), np.uint8),
        "stamps": table.stamps,
        "sizes": table.sizes,
        "counts": table.labels.counts,
        "rows": table.labels.rows,
    }
    check_writable(file.parent)
    with written_at_once(file) as stream:
        np.savez(stream, **arrays)


def load_cache(file: Path) -> LabelTable | None:
    """The table of a cache file; None where there is none, or one that this version did not write."""
    try:
        with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as arrays:
            if int(arrays["version"]) != CACHE_VERSION:
                return None
            texts = json.loads(arrays["texts"].tobytes())
            labels = PackedRows(arrays["rows"], offsets_of(arrays["counts"]))
            stamps, sizes = arrays["stamps"], arrays["sizes"]
        corrupt, problems = ({int(at): what for at, what in texts[key].items()} for key in ("corrupt", "problems"))
        table = LabelTable(texts["images"], stamps, sizes, labels, corrupt, problems)
        return table if _is_consistent(table) else None
    except Exception:  # of whatever kind a damaged file may cause: the labels are then read anew
        return None


def _is_consistent(table: LabelTable) -> bool:
    """Whether all parts are of the kind and length that the others imply; a cut or foreign file's may not be."""
    length = len(table.images)
    return (
        (table.stamps.shape, table.sizes.shape) == ((length, 4), (length, 2))
        and (table.stamps.dtype, table.sizes.dtype, table.labels.rows.dtype) == (np.int64, np.int64, np.float32)
        and len(table.labels) == length
        and bool((table.labels.counts >= 0).all())
        and table.labels.rows.shape == (table.labels.offsets[-1], 5)
        and all(0 <= position < length for position in (*table.corrupt, *table.problems))
    )
