"""COCO's JSON formats for detections and ground truth, and its official evaluation."""

import contextlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from utils.boxes import xyxy_to_ltwh
from utils.errors import UserError
from utils.log import LOGGER

# COCO numbers its 80 detection classes with gaps, from 1 to 90.
_ABSENT = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
COCO_CATEGORY_IDS = [number for number in range(1, 91) if number not in _ABSENT]


class CocoResult(NamedTuple):
    """pycocotools' twelve numbers. Small is an area under 32 x 32 pixels, large one over 96 x 96; -1 where no object is
    of that size."""

    map: float  # IoU 0.50 to 0.95
    map50: float
    map75: float
    map_small: float
    map_medium: float
    map_large: float
    recall1: float  # mean recall, IoU 0.50 to 0.95, of the most confident detection of an image
    recall10: float
    recall100: float
    recall_small: float
    recall_medium: float
    recall_large: float


def image_identifiers(paths: Sequence[str | Path]) -> dict[str, int | str]:
    """Identifier of every image in a JSON file: its stem, as a number if it is one; its path where stems repeat."""
    stems = [Path(path).stem for path in paths]
    repeated = len(set(stems)) < len(set(map(str, paths)))
    if repeated:
        return {str(path): Path(path).as_posix() for path in paths}
    return {str(path): int(stem) if stem.isdecimal() else stem for path, stem in zip(paths, stems, strict=True)}


def detection_rows(detections: Tensor, image_id: int | str, category_ids: Sequence[int] | None) -> list[dict]:
    """Rows of a result file for one image.

    Args:
        detections: (n, 6) x1, y1, x2, y2 in pixels of the image file, confidence, class.
        category_ids: category of each class, or None for the class index itself.
    """
    boxes = xyxy_to_ltwh(detections[:, :4]).tolist()
    rows = []
    for box, (score, label) in zip(boxes, detections[:, 4:6].tolist(), strict=True):
        label = int(label)
        rows.append(
            {
                "image_id": image_id,
                "category_id": category_ids[label] if category_ids else label,
                "bbox": [round(value, 3) for value in box],
                "score": round(score, 5),
            }
        )
    return rows


def ground_truth(
    sizes: Mapping[int | str, tuple[int, int]],
    labels: Mapping[int | str, np.ndarray],
    names: Mapping[int, str],
    category_ids: Sequence[int] | None = None,
) -> dict:
    """Annotations in COCO's format for a data set that has only YOLO labels.

    Args:
        sizes: identifier of each image -> (height, width).
        labels: identifier of each image -> (n, 5) rows class, x1, y1, x2, y2 in pixels of the image file.
    """
    annotations = []
    for image_id, rows in labels.items():
        for label, left, top, right, bottom in np.asarray(rows, dtype=float).reshape(-1, 5).tolist():
            width, height = right - left, bottom - top
            annotations.append(
                {
                    "id": len(annotations) + 1,  # pycocotools takes identifier 0 for "no match"
                    "image_id": image_id,
                    "category_id": category_ids[int(label)] if category_ids else int(label),
                    "bbox": [left, top, width, height],
                    "area": width * height,
                    "iscrowd": 0,
                }
            )
    categories = [{"id": category_ids[i] if category_ids else i, "name": name} for i, name in names.items()]
    images = [{"id": key, "width": int(width), "height": int(height)} for key, (height, width) in sizes.items()]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def coco_evaluate(annotations: Path | dict, rows: list[dict], image_ids: Sequence[int | str]) -> CocoResult:
    """Runs pycocotools' box evaluation and logs its table, which has AP and recall by the objects' size too.

    Args:
        annotations: an annotation file or its contents.
        rows: from ``detection_rows``.
        image_ids: the images to count; the annotation file may hold more.

    Raises:
        UserError: pycocotools is missing, or the annotation file does not know the images.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise UserError("--save-json needs pycocotools: pip install pycocotools") from error
    if not rows:
        LOGGER.warning("pycocotools was not run: there are no detections")
        return CocoResult(*[0.0] * 12)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(None if isinstance(annotations, dict) else str(annotations))
        if isinstance(annotations, dict):
            truth.dataset = annotations
            truth.createIndex()
        try:
            found = truth.loadRes(rows)
        except AssertionError as error:
            raise UserError(
                f"{annotations if isinstance(annotations, Path) else 'annotations'}: does not list the evaluated"
                " images; the image files must be named by COCO's image numbers"
            ) from error
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.params.imgIds = list(image_ids)
        evaluation.evaluate()
        evaluation.accumulate()
    summary = io.StringIO()
    with contextlib.redirect_stdout(summary):
        evaluation.summarize()
    LOGGER.info(summary.getvalue().rstrip())
    return CocoResult(*map(float, evaluation.stats))


def category_ids_for(names: Mapping[int, str], is_coco: bool) -> list[int] | None:
    """COCO's category numbers if the data set is COCO itself, else None (categories are class indices)."""
    return COCO_CATEGORY_IDS if is_coco and len(names) == len(COCO_CATEGORY_IDS) else None
