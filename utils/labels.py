"""Label files of a data set: finding, reading and checking them; ``label_cache`` makes the second start quick.

A label row is ``class x y width height`` or a polygon ``class x1 y1 x2 y2 x3 y3 ...``, normalised to 0..1. Nothing of
the user's is ever rewritten: what is wrong is counted, named and left out.
"""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from utils.errors import UserError
from utils.images import IMAGE_SUFFIXES, decode_image, is_cut_off, is_image
from utils.label_cache import LabelTable, cache_candidates, load_cache, save_cache
from utils.log import LOGGER
from utils.packed import PackedRows, PackedTexts
from utils.progress import progress
from utils.threads import ThreadPool

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
        return sorted(name for name in _files_below(str(path), ()) if is_image(name))
    if not path.is_file():
        raise UserError(f"{path}: no such folder or list file. Check the paths in the data set's YAML.")
    if is_image(path):
        return [str(path)]
    lines = (line.strip() for line in path.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines())
    folder = str(path.parent)
    return [_listed_image(line, folder) for line in lines if is_image(line)]


def _files_below(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """All files of a folder and its subfolders, symbolic links followed unless they lead back to a folder ``above``."""
    status = os.stat(folder)
    here = status.st_dev, status.st_ino
    if here in above:
        LOGGER.warning(f"{folder}: left out: this link leads back to a folder that it lies in")
        return
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        LOGGER.warning(f"{folder}: left out: {error.strerror or error}")
        return
    for entry in entries:
        if entry.is_dir():
            yield from _files_below(entry.path, (*above, here))
        else:
            yield entry.path


def _listed_image(line: str, folder: str) -> str:
    if line.startswith("./"):
        return os.path.join(folder, line[2:])
    if os.path.isabs(line) or os.path.exists(line):
        return line
    beside = os.path.join(folder, line)
    return beside if os.path.exists(beside) else line


def label_path(image_path: str | Path) -> str:
    """The label file of an image: its last ``images`` folder replaced by ``labels``, its suffix by .txt."""
    # As text: pathlib took most of the 6 s that a list of 100,000 images needed to start.
    folder, name = os.path.split(image_path)
    parts = folder.replace("/", os.sep).split(os.sep)
    for position in range(len(parts) - 1, -1, -1):
        if parts[position] == "images":
            parts[position] = "labels"
            break
    return os.path.join(os.sep.join(parts), os.path.splitext(name)[0] + ".txt")


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
    if not all(map(math.isfinite, values)):
        return "has a coordinate that is not a finite number"
    # Rounded to the precision the labels are kept in, so that 1.00000001 is 1 and duplicates are found.
    with np.errstate(over="ignore"):
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
    """What one image and its label file are found to hold."""

    width: int = 0
    height: int = 0
    rows: np.ndarray = field(default_factory=lambda: np.zeros((0, 5), np.float32))
    corrupt: str = ""  # why the image cannot be used
    problems: list[str] = field(default_factory=list)  # bad label lines


@dataclass
class LabelledImages:
    """The usable images of a data set with their labels, and the counts of what is not usable."""

    images: PackedTexts  # paths
    labels: PackedRows  # (n, 5) float32: class, normalised xywh
    sizes: np.ndarray  # (images, 2) int64: width, height as seen, after EXIF rotation
    stamps: np.ndarray  # (images, 4) int64: size and modification time in ns of the image, then of its label file
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
    cache_files = cache_candidates(path_spec, label_folder(path_spec, images[0])) if cache else []
    known = next((table for file in cache_files if (table := load_cache(file)) is not None), None)
    table = _renew(images, known, prefix)
    if cache and table is not known:
        _save_to_first_writable(cache_files, table)
    result = _collect(images, table)
    _report(result, table, prefix)
    if not len(result.images):
        raise UserError(
            f"{prefix}: none of {len(images)} images in {path_spec} can be used; the first reasons are above."
        )
    return result


def label_folder(path_spec: str | Path | Sequence[str | Path], first_image: str) -> Path:
    """The labels folder of a split, beside which its cache lies."""
    first = Path(path_spec if isinstance(path_spec, (str, Path)) else path_spec[0])
    return Path(label_path(os.path.join(first, "x.jpg") if first.is_dir() else first_image)).parent


def _stamp(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _renew(images: list[str], known: LabelTable | None, prefix: str) -> LabelTable:
    """The table of these images: what is known where the files are unchanged, the rest read anew.

    Returns ``known`` itself if it is of just these images and nothing has changed.
    """
    images = list(dict.fromkeys(images))
    stamps = np.array([(*_stamp(image), *_stamp(label_path(image))) for image in images], np.int64)
    known = known or LabelTable([], np.zeros((0, 4), np.int64), np.zeros((0, 2), np.int64), PackedRows.of([], 5))
    if known.images == images and np.array_equal(known.stamps, stamps):
        return known
    place = {image: position for position, image in enumerate(known.images)}
    places = [place.get(image, -1) for image in images]
    unchanged = [at >= 0 and np.array_equal(known.stamps[at], now) for at, now in zip(places, stamps, strict=True)]
    stale = [position for position, same in enumerate(unchanged) if not same]
    with ThreadPool(READERS) as pool:
        read = pool.map(lambda position: read_entry(images[position], bool(stamps[position, 2] >= 0)), stale)
        fresh = dict(zip(stale, progress(read, f"{prefix}: reading labels", len(stale)), strict=True))
    entries = [fresh.get(position) or _known_entry(known, at) for position, at in enumerate(places)]
    return LabelTable(
        images,
        stamps,
        np.array([(entry.width, entry.height) for entry in entries], np.int64),
        PackedRows.of([entry.rows for entry in entries], 5),
        {position: entry.corrupt for position, entry in enumerate(entries) if entry.corrupt},
        {position: entry.problems for position, entry in enumerate(entries) if entry.problems},
    )


def _known_entry(table: LabelTable, at: int) -> Entry:
    size = table.sizes[at].tolist()
    return Entry(*size, table.labels[at], table.corrupt.get(at, ""), table.problems.get(at, []))


def read_entry(image: str, labelled: bool) -> Entry:
    """Decodes one image and parses its label file; what is wrong is said in the entry, not raised."""
    entry = Entry()
    try:
        encoded = Path(image).read_bytes()
    except OSError as error:
        entry.corrupt = f"{image}: {error.strerror or error}"
        return entry
    picture = decode_image(encoded)
    if is_cut_off(encoded):
        entry.corrupt = f"{image}: is cut off, its lower part is missing"
        return entry
    if picture is None:
        entry.corrupt = f"{image}: is not an image that can be decoded"
        return entry
    entry.height, entry.width = picture.shape[:2]
    if min(entry.height, entry.width) < MINIMUM_IMAGE_SIDE:
        entry.corrupt = f"{image}: {entry.width}x{entry.height} is under {MINIMUM_IMAGE_SIDE} pixels"
    elif labelled:
        file = label_path(image)
        try:
            entry.rows, entry.problems = parse_labels(Path(file).read_text("utf-8-sig", "replace"), file)
        except OSError as error:
            entry.problems = [f"{file}: {error.strerror or error}"]
    return entry


def _collect(images: list[str], table: LabelTable) -> LabelledImages:
    """What can be used, in the order of ``images``, in which an image may occur again."""
    if len(images) == len(table.images):  # so they are the table's
        places = np.arange(len(images))
    else:
        place = {image: position for position, image in enumerate(table.images)}
        places = np.array([place[image] for image in images])
    usable = np.ones(len(table.images), bool)
    usable[list(table.corrupt)] = False
    chosen = places[usable[places]]
    labels, stamps = table.labels.take(chosen), table.stamps[chosen]
    labelled = stamps[:, 2] >= 0
    return LabelledImages(
        images=PackedTexts.of(table.images[position] for position in chosen),
        labels=labels,
        sizes=table.sizes[chosen],
        stamps=stamps,
        missing=int((~labelled).sum()),
        empty=int((labelled & (labels.counts == 0)).sum()),
        corrupt=len(images) - len(chosen),
        bad_lines=sum(len(table.problems.get(position, ())) for position in chosen) if table.problems else 0,
    )


def _report(result: LabelledImages, table: LabelTable, prefix: str) -> None:
    parts = [f"{len(result.images)} images, {len(result.labels.rows)} boxes"]
    parts += [f"{result.missing} without a label file"] if result.missing else []
    parts += [f"{result.empty} with an empty one"] if result.empty else []
    parts += [f"{result.corrupt} unusable images left out"] if result.corrupt else []
    parts += [f"{result.bad_lines} label lines left out"] if result.bad_lines else []
    LOGGER.info(f"{prefix}: " + ", ".join(parts))
    found = table.problems | {position: [text] for position, text in table.corrupt.items()}
    problems = [text for position in sorted(found) for text in found[position]]
    for text in problems[:NAMED_PROBLEMS]:
        LOGGER.warning(f"{prefix}: left out: {text}")
    if len(problems) > NAMED_PROBLEMS:
        LOGGER.warning(f"{prefix}: ... and {len(problems) - NAMED_PROBLEMS} more")


def _save_to_first_writable(files: list[Path], table: LabelTable) -> None:
    for file in files:
        try:
            return save_cache(file, table)
        except OSError:
            continue
    LOGGER.warning(f"No label cache was written: neither {files[0].parent} nor {files[-1].parent} is writable.")
