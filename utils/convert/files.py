"""What the converters share: label files, images that travel with them, names that may not leave their folder."""

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import yaml

from utils.errors import UserError
from utils.images import read_image
from utils.labels import parse_labels

TRANSFERS = ("copy", "move", "link")
DIGITS = 6  # of a normalised coordinate: 0.0005 pixels of an image 1000 pixels wide

Box = tuple[float, float, float, float]  # left, top, right, bottom: edges in pixels, 0 at the image's own


@dataclass
class Counts:
    """What became of a set of images; ``left_out`` counts objects by the reason why."""

    images: int = 0
    boxes: int = 0
    difficult: int = 0
    background: int = 0  # images without objects
    unlabelled: int = 0  # images that no annotation speaks of
    missing: int = 0  # images that are listed but not there
    left_out: dict[str, int] = field(default_factory=dict)

    def leave_out(self, reason: str) -> None:
        self.left_out[reason] = self.left_out.get(reason, 0) + 1

    def __str__(self) -> str:
        parts = [f"{self.images} images, {self.boxes} boxes"]
        parts += [f"{self.difficult} difficult ones kept apart"] if self.difficult else []
        parts += [f"{self.background} images without objects"] if self.background else []
        parts += [f"{self.unlabelled} images without annotation"] if self.unlabelled else []
        parts += [f"{self.missing} listed images not there"] if self.missing else []
        return ", ".join(parts + [f"{count} left out: {reason}" for reason, count in sorted(self.left_out.items())])


def safe_name(name: object, file: Path, folders: bool = False) -> str:
    """A file name that an annotation gives, if it stays below the folder that it is meant for.

    Args:
        folders: allow subfolders.

    Raises:
        UserError: it does not, or is no name.
    """
    parts = name.split("/") if isinstance(name, str) else []
    if not parts or (len(parts) > 1 and not folders) or any(part in ("", ".", "..") for part in parts):
        raise UserError(f"{file}: {name!r} is no file name that can be used. Correct it.")
    if any(character in name for character in "\\\0\n\r"):
        raise UserError(f"{file}: the file name {name!r} holds a character that no list of images can.")
    return name


def clip(box: Sequence[float], width: float, height: float) -> Box | None:
    """The part of a box that lies in the image, in pixels; None where nothing does, or a coordinate is not finite."""
    if not all(np.isfinite(value) for value in box):
        return None
    left, right = (min(max(value, 0.0), width) for value in (box[0], box[2]))
    top, bottom = (min(max(value, 0.0), height) for value in (box[1], box[3]))
    return (left, top, right, bottom) if right > left and bottom > top else None


def box_line(label: int, box: Box, width: float, height: float) -> str:
    """One line of a label file: class, centre and extent divided by the image's."""
    left, top, right, bottom = box
    values = (left + right) / 2 / width, (top + bottom) / 2 / height, (right - left) / width, (bottom - top) / height
    # A box thinner than the digits go keeps its least extent instead of vanishing.
    smallest = 10**-DIGITS
    values = (*values[:2], max(values[2], smallest), max(values[3], smallest))
    return " ".join([str(label), *(f"{value:.{DIGITS}f}" for value in values)])


def write_lines(file: Path, lines: Iterable[str]) -> None:
    """Writes text lines; folders are made.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror or error})") from None


def transfer_image(source: Path, target: Path, how: str) -> None:
    """Copies, moves or hard-links an image; where source and target are one file, nothing is done.

    Raises:
        UserError: another file is in the way, or the target cannot be written.
    """
    try:
        if target.exists():
            if target.samefile(source):
                return
            raise UserError(f"{target}: is there already. Convert into an empty folder.")
        target.parent.mkdir(parents=True, exist_ok=True)
        {"copy": shutil.copyfile, "move": os.replace, "link": os.link}[how](source, target)
    except OSError as error:
        raise UserError(
            f"{target}: {source} cannot be put there, --transfer {how} ({error.strerror or error})"
        ) from None


@dataclass
class LabelledImage:
    """An image of a YOLO data set: its size in pixels, and its objects in file order."""

    path: Path
    width: int
    height: int
    classes: list[int]
    boxes: list[Box]
    polygons: list[list[float] | None]  # x, y, x, y ... in pixels where the label is a polygon


def read_labelled(image: Path, labels: Path, size: tuple[int, int] | None = None) -> LabelledImage:
    """Reads an image's size and its label file, which may be missing.

    Args:
        size: (width, height) where it is known: the image is then not opened.

    Raises:
        UserError: an unreadable image, or a line that is no label.
    """
    width, height = size or read_image(image).shape[1::-1]
    result = LabelledImage(image, width, height, [], [], [])
    lines = labels.read_text("utf-8-sig", "replace").splitlines() if labels.is_file() else []
    for number, line in enumerate(lines, 1):
        rows, problems = parse_labels(line)
        if problems:
            raise UserError(f"{labels}:{number}: {problems[0].split(': ', 1)[-1]}. Correct it before converting.")
        if not len(rows):
            continue
        fields = [float(value) for value in line.split()]
        polygon = None
        if len(fields) > 5:
            polygon = [value * (height if index % 2 else width) for index, value in enumerate(fields[1:])]
            xs, ys = polygon[0::2], polygon[1::2]
            box = min(xs), min(ys), max(xs), max(ys)
        else:
            _, x, y, w, h = fields
            box = (x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height
        result.classes.append(int(fields[0]))
        result.boxes.append(box)
        result.polygons.append(polygon)
    return result


def write_dataset_yaml(folder: Path, splits: Mapping[str, Sequence[str]], names: Sequence[str], **extra: str) -> Path:
    """A data set YAML in ``folder``, named after it.

    Args:
        splits: train, val and test to folders or lists below ``folder``. Where train or val is empty, the other one or
            else ``other`` takes its place, so that the file can be used as it is.
    """
    train, val = splits.get("train") or [], splits.get("val") or []
    val = val or splits.get("test") or train or splits["other"]
    content = {"path": ".", "train": list(train or val), "val": list(val)}
    content |= {"test": list(splits["test"])} if splits.get("test") else {}
    content |= {"names": dict(enumerate(names)), **extra}
    file = folder / f"{folder.resolve().name}.yaml"
    write_lines(file, yaml.safe_dump(content, sort_keys=False, allow_unicode=True).splitlines())
    return file
