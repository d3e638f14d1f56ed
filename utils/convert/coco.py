"""COCO's detection annotations (Lin et al., arXiv 1405.0312; one JSON file a set) to YOLO's labels and back."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.coco import image_identifiers
from utils.convert.files import (
    DIGITS,
    Counts,
    box_line,
    clip,
    read_labelled,
    safe_name,
    transfer_image,
    write_lines,
)
from utils.errors import UserError
from utils.images import read_image
from utils.labels import label_path
from utils.progress import progress


@dataclass
class CocoSet:
    """The parts of an annotation file that detection needs."""

    file: Path
    images: list[dict]
    annotations: dict[Any, list[dict]]  # by image
    categories: dict[int, str]  # number -> name, by number: the order of YOLO's classes


def read_annotations(file: Path, segments: bool = False) -> CocoSet:
    """Reads an instances file.

    Args:
        segments: keep the outlines, which are the larger part of COCO's own files.

    Raises:
        UserError: unreadable, not JSON, or without images, annotations and categories as COCO has them.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"), object_hook=None if segments else _without_outline)
        images, rows = list(content["images"]), list(content["annotations"])
        categories = {int(item["id"]): str(item["name"]) for item in content["categories"]}
        for image in images:
            _ = image["id"], image["file_name"]
        by_image: dict[Any, list[dict]] = {image["id"]: [] for image in images}
        for row in rows:
            _ = int(row["category_id"]), row["bbox"]
            if row["image_id"] not in by_image:
                raise UserError(f"{file}: an annotation belongs to image {row['image_id']!r}, which is not listed.")
            by_image[row["image_id"]].append(row)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error}).") from None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file}: is not a COCO instances file ({type(error).__name__}: {error}).") from None
    return CocoSet(file, images, by_image, dict(sorted(categories.items())))


def _without_outline(item: dict) -> dict:
    item.pop("segmentation", None)
    return item


# --- COCO to YOLO
def coco_to_yolo(
    annotations: CocoSet, images: Path, output: Path, set_name: str, names: Sequence[str] | None = None,
    *, segments: bool = False, transfer: str | None = "copy",
) -> Counts:  # fmt: skip
    """Converts one set to ``labels/SET``, ``images/SET`` and the list ``SET.txt`` of its images.

    Classes are numbered in the order of the category numbers, which for COCO's 80 of 1 to 90 is the order that official
    YOLOv5 weights know. Crowd regions are left out.

    Args:
        images: the folder that the annotations' file names are relative to.
        names: classes in order, matched by name; categories without one are left out.
        segments: write outlines instead of boxes where ``annotations`` kept any.
        transfer: how images get to ``output``; None where they are in ``images/SET`` already.

    Raises:
        UserError: wrong numbers or names in the annotations; none of the images is there.
    """
    names = list(annotations.categories.values()) if names is None else list(names)
    numbers = {key: names.index(name) for key, name in annotations.categories.items() if name in names}
    counts, listed = Counts(), []
    safe_name(set_name, output)
    for image in progress(annotations.images, set_name):
        name = safe_name(image["file_name"], annotations.file, folders=True)
        if not (images / name).is_file():
            counts.missing += 1
            continue
        counts.images += 1
        size = image.get("width"), image.get("height")
        if not all(isinstance(side, int) and side > 0 for side in size):
            size = read_image(images / name).shape[1::-1]
        lines = _label_lines(annotations, image["id"], size, numbers, counts, segments)
        target = output / "images" / set_name / name
        write_lines(Path(label_path(target)), lines)
        if transfer is not None:
            transfer_image(images / name, target, transfer)
        listed.append(f"./images/{set_name}/{name}")
    if not counts.images:
        raise UserError(f"{images}: has none of the {counts.missing} images that {annotations.file} lists.")
    write_lines(output / f"{set_name}.txt", listed)
    return counts


def _label_lines(
    annotations: CocoSet,
    image_id: Any,
    size: tuple[int, int],
    numbers: Mapping[int, int],
    counts: Counts,
    segments: bool,
) -> list[str]:
    lines = []
    for row in annotations.annotations[image_id]:
        if row.get("iscrowd"):
            counts.leave_out("crowd region")
            continue
        if row["category_id"] not in numbers:
            counts.leave_out(f"category {row['category_id']} is not among the names")
            continue
        label, outline = numbers[row["category_id"]], join_polygons(row.get("segmentation")) if segments else None
        if outline is not None:
            xs, ys = (np.clip(outline[:, axis] / size[axis], 0, 1) for axis in (0, 1))
            if np.ptp(xs) > 0 and np.ptp(ys) > 0:
                points = np.stack([xs, ys], 1).ravel()
                lines.append(" ".join([str(label), *(f"{value:.{DIGITS}f}" for value in points)]))
                continue
        try:
            left, top, width, height = map(float, row["bbox"])
        except (TypeError, ValueError, OverflowError):
            raise UserError(
                f"{annotations.file}: bbox {row['bbox']!r} of image {image_id!r} is not 4 numbers."
            ) from None
        box = clip((left, top, left + width, top + height), *size)
        if box is None:
            counts.leave_out("box without extent in the image")
            continue
        lines.append(box_line(label, box, *size))
    counts.boxes += len(lines)
    counts.background += not lines
    return lines


def join_polygons(segmentation: Any) -> np.ndarray | None:
    """The outlines of one object as a single one (n, 2), in pixels; None where there is none (masks in run lengths).

    Each further polygon is entered and left at its point nearest to what is there, so that the bridge has no area.
    """
    if not isinstance(segmentation, list):
        return None
    polygons = []
    for flat in segmentation:
        try:
            values = np.array(flat, float)
        except (TypeError, ValueError, OverflowError):
            continue
        if values.ndim == 1 and len(values) >= 6 and len(values) % 2 == 0 and np.isfinite(values).all():
            polygons.append(values.reshape(-1, 2))
    if not polygons:
        return None
    joined = polygons[0]
    for polygon in polygons[1:]:
        distance = np.linalg.norm(joined[:, None] - polygon[None], axis=2)
        here, there = np.unravel_index(distance.argmin(), distance.shape)
        around = np.concatenate([polygon[there:], polygon[: there + 1]])
        joined = np.concatenate([joined[: here + 1], around, joined[here:]])
    return joined


# --- YOLO to COCO
def yolo_to_coco(
    images: Sequence[str | Path], names: Mapping[int, str], category_ids: Sequence[int] | None = None
) -> tuple[dict, Counts]:
    """The contents of an instances file for images with YOLO labels; difficult objects are left out.

    Images are numbered, and categories too, as in the detections that ``val.py --save-json`` writes: by the stem if
    that is a number, by class index unless ``category_ids`` gives COCO's numbers.

    Raises:
        UserError: an unreadable image, a wrong label, a class without a name.
    """
    identifiers, counts = image_identifiers(images), Counts()
    records, rows = [], []
    for image in progress([str(image) for image in images], "images"):
        labelled = read_labelled(Path(image), Path(label_path(image)))
        number = identifiers[image]
        file_name = Path(image).name if number != Path(image).as_posix() else number
        records.append({"id": number, "file_name": file_name, "width": labelled.width, "height": labelled.height})
        for label, box, polygon in zip(labelled.classes, labelled.boxes, labelled.polygons, strict=True):
            if label not in names:
                raise UserError(f"{image}: its labels name class {label}; the data set has {len(names)} classes.")
            left, top, right, bottom = box
            row = {"id": len(rows) + 1, "image_id": number, "iscrowd": 0}  # pycocotools takes 0 for "no match"
            row["category_id"] = category_ids[label] if category_ids else label
            row["bbox"] = [round(value, 3) for value in (left, top, right - left, bottom - top)]
            row["area"] = round(polygon_area(polygon) if polygon else (right - left) * (bottom - top), 3)
            row["segmentation"] = [[round(value, 3) for value in polygon]] if polygon else []
            rows.append(row)
        counts.images += 1
        counts.boxes += len(labelled.classes)
        counts.background += not labelled.classes
    categories = [{"id": category_ids[i] if category_ids else i, "name": name} for i, name in sorted(names.items())]
    return {"info": {}, "images": records, "annotations": rows, "categories": categories}, counts


def polygon_area(polygon: Sequence[float]) -> float:
    """Area of an outline x, y, x, y ... (shoelace formula)."""
    points = np.asarray(polygon, float).reshape(-1, 2)
    xs, ys = points[:, 0], points[:, 1]
    return float(abs(xs @ np.roll(ys, -1) - ys @ np.roll(xs, -1)) / 2)
