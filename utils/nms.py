"""Non-maximum suppression: from the decoded rows of a Detect head to a short list of detections."""

import contextlib
import importlib.util
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

# Boxes of different classes are moved this many pixels apart, so that one call never lets them suppress each other.
CLASS_OFFSET = 7680.0
MAX_CANDIDATES = 30_000
PORTION = 2  # boxes compared at a time, for each detection that may be returned


@torch.no_grad()
def non_max_suppression(
    prediction: Tensor | Sequence[Tensor],
    confidence_threshold: float = 0.25,
    iou_threshold: float = 0.45,
    classes: Sequence[int] | None = None,
    agnostic: bool = False,
    multi_label: bool = False,
    labels: Sequence[Tensor] = (),
    max_detections: int = 300,
) -> list[Tensor]:
    """Keeps, per image, the most confident boxes that do not overlap a better one of their class.

    There is no time limit: the result depends on the prediction alone.

    Args:
        prediction: (B, N, 5 + classes) rows centre x, centre y, width, height in pixels, objectness, class scores;
            or such rows (N_i, 5 + classes) of each of B images.
        confidence_threshold: both the objectness and objectness * class score must be above it.
        iou_threshold: a box overlapping a better one by more than this is dropped.
        classes: only these class indices are kept.
        agnostic: boxes suppress each other across classes.
        multi_label: a row yields one box per class above the threshold, not only its best class.
        labels: per image (n, 5) rows class, centre x, centre y, width, height in pixels, added with confidence 1.
        max_detections: at most this many per image.

    Returns:
        Per image (n, 6) float32 rows x1, y1, x2, y2, confidence, class, most confident first.

    Raises:
        ValueError: a threshold outside 0..1.
    """
    for name, value in (("confidence_threshold", confidence_threshold), ("iou_threshold", iou_threshold)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} {value} is outside 0..1")
    results = []
    for index, rows in enumerate(prediction):
        num_classes = rows.shape[1] - 5
        rows = rows[rows[:, 4] > confidence_threshold].float()
        if labels and len(labels[index]):
            rows = torch.cat((rows, _labels_as_rows(labels[index].to(rows), num_classes)))
        candidates = _candidates(rows, confidence_threshold, multi_label and num_classes > 1)
        if classes is not None:
            wanted = torch.as_tensor(list(classes), device=rows.device)
            candidates = candidates[(candidates[:, 5:6] == wanted).any(1)]
        results.append(_suppress(candidates, iou_threshold, agnostic, max_detections))
    return results


def _labels_as_rows(labels: Tensor, num_classes: int) -> Tensor:
    rows = labels.new_zeros(len(labels), 5 + num_classes)
    rows[:, :4] = labels[:, 1:5]
    rows[:, 4] = 1.0
    rows.scatter_(1, 5 + labels[:, :1].long(), 1.0)
    return rows


def _candidates(rows: Tensor, confidence_threshold: float, several: bool) -> Tensor:
    """Decoded rows -> (n, 6) rows x1, y1, x2, y2, confidence, class above the threshold."""
    scores = rows[:, 5:] * rows[:, 4:5]
    half = rows[:, 2:4] / 2
    corners = torch.cat((rows[:, :2] - half, rows[:, :2] + half), 1)
    if several:
        row, label = (scores > confidence_threshold).nonzero(as_tuple=True)
        confidence = scores[row, label]
    else:
        confidence, label = scores.max(1) if scores.shape[1] else (rows[:, 4], rows[:, 4].long() * 0)
        row = (confidence > confidence_threshold).nonzero(as_tuple=True)[0]
        confidence, label = confidence[row], label[row]
    return torch.cat((corners[row], confidence[:, None], label[:, None].float()), 1)


def _suppress(candidates: Tensor, iou_threshold: float, agnostic: bool, max_detections: int) -> Tensor:
    order = candidates[:, 4].argsort(descending=True, stable=True)[:MAX_CANDIDATES]
    candidates = candidates[order]
    # In float32 the offset of class 79 would round coordinates to 1/16 of a pixel.
    boxes = candidates[:, :4].double()
    if not agnostic:
        boxes = boxes + candidates[:, 5:6].double() * CLASS_OFFSET
    # What is kept of the best boxes does not depend on the others. So they are compared portion by portion, each behind
    # what is kept of the ones before, until there are enough: over COCO's images a fifth of the time of all at once.
    scores, portion, keep = candidates[:, 4].double(), PORTION * max_detections, order.new_zeros(0)
    for start in range(0, len(boxes), max(portion, 1)):
        among = torch.cat((keep, torch.arange(start, min(start + portion, len(boxes)), device=boxes.device)))
        keep = among[_kernel()(boxes[among], scores[among], iou_threshold)]
        if len(keep) >= max_detections:
            break
    return candidates[keep[:max_detections]]


@cache
def _kernel() -> Callable[[Tensor, Tensor, float], Tensor]:
    """torchvision's compiled suppression, without the package around it where possible: importing that takes as long
    as importing torch, for networks and data sets that nobody needs here."""
    package = importlib.util.find_spec("torchvision")
    for folder in package.submodule_search_locations if package else ():
        for library in sorted(Path(folder).glob("_C*")):
            with contextlib.suppress(OSError, RuntimeError, AttributeError):
                torch.ops.load_library(str(library))
                return torch.ops.torchvision.nms
    import torchvision

    return torchvision.ops.nms
