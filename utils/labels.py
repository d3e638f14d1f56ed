"""Label files of a data set: finding, reading and checking them, and the cache that makes the second start quick.

A label row is ``class x y width height`` or a polygon ``class x1 y1 x2 y2 x3 y3 ...``, normalised to 0..1. Nothing of
the user's is ever rewritten: what is wrong is counted, named and left out.
"""

import hashlib
import io
import json
import os
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from utils.errors import UserError
from utils.images import IMAGE_SUFFIXES, decode_image, is_image
from utils.log import LOGGER

CACHE_VERSION = 1
MINIMUM_IMAGE_SIDE = 10  # pixels
NAMED_PROBLEMS = 5  # how many problems of a data set are written out
READERS = min(8, os.cpu_count() or 1)  # threads; OpenCV decodes outside of Python's lock


# --- which images, which labels
def list_images(path_spec: str | Path | Sequence[str | Path]) -> list[str]:
    """The image paths that a data set YAML's ``train``, ``val`` or ``test`` stands for.

    Args:
        path_spec: a folder (searched with its subfolders, sorted), a .txt list of images, an image, or a list of these.
            In a list file a line that starts with ``./`` is relative to that file; other relative lines are relative
            to the working directory or, where nothing is there, to the list file.

    Raises:
        UserError: a path does not exist, or there is no image in all of it.
    """
    specs = [path_spec] if isinstance(path_spec, (str, Path)) else list(path_spec)
    images = [image for spec in specs for image in _list_one(Path(spec))]
    if not images:
        suffixes = " ".join(sorted(IMAGE_SUFFIXES))
        raise UserError(f"{', '.join(map(str, specs))}: no images in it. Files with these suffixes count: {suffixes}")
    return images


def _list_one(path: Path) -> list[str]:
    if path.is_dir():
        found = (
            os.path.join(folder, name)
            for folder, _, names in os.walk(path, followlinks=True)
            for name in names
            if is_image(name)
        )
        return sorted(found)
    if not path.is_file():
        raise UserError(f"{path}: no such folder or list file. Check the paths in the data set's YAML.")
    if is_image(path):
        return [str(path)]
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    return [_listed_image(line.strip(), path.parent) for line in lines if line.strip() and is_image(line.strip())]


def _listed_image(line: str, folder: Path) -> str:
    if line.startswith("./"):
        return str(folder / line[2:])
    beside = folder / line
    return str(beside) if not os.path.exists(line) and beside.exists() else line


def label_path(image_path: str | Path) -> str:
    """The label file of an image: its last ``images`` folder replaced by ``labels``, its suffix by .txt."""
    path = Path(image_path)
    parts = list(path.parts)
    for position in range(len(parts) - 2, -1, -1):
        if parts[position] == "images":
            parts[position] = "labels"
            break
    return str(Path(*parts).with_suffix(".txt"))


# --- one label file
def parse_labels(text: str, file_name: str = "") -> tuple[np.ndarray, list[str]]:
    """Reads the text of a label file.

    Returns:
        Rows (n, 5) float32 of class and normalised xywh in the file's order, without duplicates, polygons reduced to
        their boxes; and one message ``file:line: what is wrong`` for every line that was left out.
    """
    rows: dict[tuple[float, ...], None] = {}
    problems = []
    for number, line in enumerate(text.splitlines(), 1):
        fields = line.split()
        if not fields:
            continue
        row = _parse_row(fields)
        if isinstance(row, str):
            problems.append(f"{file_name}:{number}: {row}")
        elif row in rows:
            problems.append(f"{file_name}:{number}: repeats an earlier line")
        else:
            rows[row] = None
    return np.array(list(rows), np.float32).reshape(-1, 5), problems


def _parse_row(fields: list[str]) -> tuple[float, ...] | str:
    """One row as (class, x, y, width, height), or what is wrong with it."""
    try:
        category, *values = map(float, fields)
    except ValueError:
        return "is not made of numbers"
    if not (category >= 0 and category.is_integer()):
        return f"class {fields[0]} is not a whole number from 0 up"
    if len(fields) == 6:
        return "has 6 fields; a box has 5 (a sixth one, a confidence, belongs into predictions only)"
    if len(fields) < 5 or len(fields) % 2 == 0:
        return f"has {len(fields)} fields; a box has 5, a polygon 1 + 2 per corner"
    # Rounded to the precision the labels are kept in, so that 1.00000001 is 1 and duplicates are found.
    values = [float(value) for value in np.array(values, np.float32)]
    if not all(0 <= value <= 1 for value in values):
        return "has a coordinate outside of 0..1 (coordinates are divided by the image's width and height)"
    if len(values) > 4:
        xs, ys = values[0::2], values[1::2]
        values = [(min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2, max(xs) - min(xs), max(ys) - min(ys)]
    if values[2] <= 0 or values[3] <= 0:
        return "is a box without extent"
    return (category, *values)


# --- all of a data set
@dataclass
class Entry:
    """What is known of one image and its label file."""

    stamp: tuple[
        int, int, int, int
    ]  # size and mtime in ns of the image, then of the label file (-1, -1: there is none)
    width: int = 0
    height: int = 0
    rows: np.ndarray = field(default_factory=lambda: np.zeros((0, 5), np.float32))
    corrupt: str = ""  # why the image cannot be used
    problems: list[str] = field(default_factory=list)  # bad label lines

    @property
    def labelled(self) -> bool:
        return self.stamp[2] >= 0


@dataclass
class LabelledImages:
    """The usable images of a data set with their labels, and the counts of what is not usable."""

    images: list[str]
    labels: list[np.ndarray]  # (n, 5) float32: class, normalised xywh
    sizes: np.ndarray  # (images, 2) int64: width, height as seen, after EXIF rotation
    missing: int = 0  # images without a label file: background
    empty: int = 0  # label files without a usable row: background too
    corrupt: int = 0  # images that cannot be used
    bad_lines: int = 0


def read_labelled_images(
    path_spec: str | Path | Sequence[str | Path], prefix: str = "", cache: bool = True
) -> LabelledImages:
    """Lists, reads and checks all images and labels of ``path_spec``; uses and renews the cache file.

    An image or label file whose size or modification time differs from the cache's is read again, the others are not.

    Raises:
        UserError: nothing there, or no image of it can be used.
    """
    images = list_images(path_spec)
    cache_files = cache_candidates(path_spec, images[0]) if cache else []
    known = next((entries for file in cache_files if (entries := load_cache(file)) is not None), {})
    entries = _renew(images, known, prefix)
    changed = len(entries) != len(known) or any(entries[image] is not known.get(image) for image in entries)
    if cache and changed:
        _save_to_first_writable(cache_files, entries)
    result = _collect(images, entries)
    _report(result, [entries[image] for image in images], images, prefix)
    if not result.images:
        raise UserError(
            f"{prefix}: none of {len(images)} images in {path_spec} can be used; the first reasons are above."
        )
    return result


def _stamp(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _renew(images: list[str], known: dict[str, Entry], prefix: str) -> dict[str, Entry]:
    """An entry for every image: the known one where the files are unchanged, else a new one."""
    entries: dict[str, Entry] = {}
    stale = []
    for image in dict.fromkeys(images):
        stamp = (*_stamp(image), *_stamp(label_path(image)))
        entry = known.get(image)
        if entry is not None and entry.stamp == stamp:
            entries[image] = entry
        else:
            stale.append((image, stamp))
    if stale:
        with ThreadPoolExecutor(READERS) as pool:
            fresh = pool.map(lambda item: read_entry(*item), stale)
            progress = tqdm(fresh, f"{prefix}: reading labels", len(stale), delay=2, leave=False)
            entries.update((image, entry) for (image, _), entry in zip(stale, progress, strict=True))
    return entries


def read_entry(image: str, stamp: tuple[int, int, int, int]) -> Entry:
    """Decodes one image and parses its label file; what is wrong is said in the entry, not raised."""
    entry = Entry(stamp)
    try:
        picture = decode_image(Path(image).read_bytes())
    except OSError as error:
        entry.corrupt = f"{image}: {error.strerror or error}"
        return entry
    if picture is None:
        entry.corrupt = f"{image}: is not an image that can be decoded"
        return entry
    entry.height, entry.width = picture.shape[:2]
    if min(entry.height, entry.width) < MINIMUM_IMAGE_SIDE:
        entry.corrupt = f"{image}: {entry.width}x{entry.height} is under {MINIMUM_IMAGE_SIDE} pixels"
    elif entry.labelled:
        file = label_path(image)
        try:
            entry.rows, entry.problems = parse_labels(Path(file).read_text("utf-8-sig", "replace"), file)
        except OSError as error:
            entry.problems = [f"{file}: {error.strerror or error}"]
    return entry


def _collect(images: list[str], entries: dict[str, Entry]) -> LabelledImages:
    usable = [image for image in images if not entries[image].corrupt]
    chosen = [entries[image] for image in usable]
    return LabelledImages(
        images=usable,
        labels=[entry.rows for entry in chosen],
        sizes=np.array([(entry.width, entry.height) for entry in chosen], np.int64).reshape(-1, 2),
        missing=sum(not entry.labelled for entry in chosen),
        empty=sum(entry.labelled and not len(entry.rows) for entry in chosen),
        corrupt=len(images) - len(usable),
        bad_lines=sum(len(entry.problems) for entry in chosen),
    )


def _report(result: LabelledImages, entries: Iterable[Entry], images: list[str], prefix: str) -> None:
    boxes = sum(map(len, result.labels))
    parts = [f"{len(result.images)} images, {boxes} boxes"]
    parts += [f"{result.missing} without a label file"] if result.missing else []
    parts += [f"{result.empty} with an empty one"] if result.empty else []
    parts += [f"{result.corrupt} unusable images left out"] if result.corrupt else []
    parts += [f"{result.bad_lines} label lines left out"] if result.bad_lines else []
    LOGGER.info(f"{prefix}: " + ", ".join(parts))
    problems = [text for entry in entries for text in ([entry.corrupt] if entry.corrupt else entry.problems)]
    for text in problems[:NAMED_PROBLEMS]:
        LOGGER.warning(f"{prefix}: left out: {text}")
    if len(problems) > NAMED_PROBLEMS:
        LOGGER.warning(f"{prefix}: ... and {len(problems) - NAMED_PROBLEMS} more")


# --- the cache
def cache_candidates(path_spec: str | Path | Sequence[str | Path], first_image: str) -> list[Path]:
    """Where the cache of a split may lie, best place first: beside its labels folder (or list file), or the user's."""
    specs = [path_spec] if isinstance(path_spec, (str, Path)) else list(path_spec)
    key = hashlib.sha256("\n".join(os.path.abspath(spec) for spec in specs).encode()).hexdigest()[:12]
    first = Path(specs[0])
    if first.is_file() and not is_image(first):
        place = first
    else:
        place = Path(label_path(os.path.join(first, "x.jpg") if first.is_dir() else first_image)).parent
    name = f"{place.stem}.labels.cache" if len(specs) == 1 else f"{place.stem}-{key}.labels.cache"
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return [place.absolute().with_name(name), home / "yolov5_qat" / f"{place.stem}-{key}.labels.cache"]


def save_cache(file: Path, entries: dict[str, Entry]) -> None:
    """Writes entries into one npz file of plain arrays (no pickle): first to a temporary file, then renamed.

    Raises:
        OSError: the folder cannot be written to, or is marked read-only.
    """
    texts = {
        "images": list(entries),
        "corrupt": [entry.corrupt for entry in entries.values()],
        "problems": [entry.problems for entry in entries.values()],
    }
    arrays = {
        "version": np.array(CACHE_VERSION),
        "texts": np.frombuffer(json.dumps(texts).encode(), np.uint8),
        "stamps": np.array([entry.stamp for entry in entries.values()], np.int64),
        "sizes": np.array([(entry.width, entry.height) for entry in entries.values()], np.int64),
        "counts": np.array([len(entry.rows) for entry in entries.values()], np.int64),
        "rows": np.concatenate([entry.rows for entry in entries.values()]),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.parent.stat().st_mode & 0o222:
        # The system would let root write here; whoever took the write bits away meant it.
        raise PermissionError(f"{file.parent} is marked read-only")
    handle, temporary = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            np.savez(stream, **arrays)
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise


def load_cache(file: Path) -> dict[str, Entry] | None:
    """The entries of a cache file; None where there is none, or one that this version did not write."""
    try:
        with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as arrays:
            if int(arrays["version"]) != CACHE_VERSION:
                return None
            texts = json.loads(arrays["texts"].tobytes())
            rows = np.split(arrays["rows"].astype(np.float32), np.cumsum(arrays["counts"])[:-1])
            stamps, sizes = arrays["stamps"].tolist(), arrays["sizes"].tolist()
        columns = zip(texts["images"], texts["corrupt"], texts["problems"], stamps, sizes, rows, strict=True)
        return {
            image: Entry(tuple(stamp), *size, rows, corrupt, problems)
            for image, corrupt, problems, stamp, size, rows in columns
        }
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None


def _save_to_first_writable(files: list[Path], entries: dict[str, Entry]) -> None:
    for file in files:
        try:
            return save_cache(file, entries)
        except OSError:
            continue
    LOGGER.warning(f"No label cache was written: neither {files[0].parent} nor {files[-1].parent} is writable.")
