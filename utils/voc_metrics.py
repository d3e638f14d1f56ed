"""PASCAL VOC's average precision (Everingham et al., "The PASCAL Visual Object Classes Challenge: A Retrospective",
IJCV 2015, section 3; until VOC2009 by 11 points: "The PASCAL VOC Challenge", IJCV 2010, section 4.2).

Each detection stands for the object of its class, difficult ones included, that it overlaps most. With an IoU of at
least 0.5 it is right if it is the most confident one for that object and wrong if not; where the object is difficult it
counts as neither. Difficult objects need not be found.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.boxes import xywhn_to_xyxy
from utils.difficult import read_difficult
from utils.iou import box_iou

IOU_THRESHOLD = 0.5
WRONG, RIGHT, IGNORED = 0, 1, 2


def judge(detections: Tensor, labels: Tensor, difficult: Tensor, iou_threshold: float = IOU_THRESHOLD) -> np.ndarray:
    """Says of each detection of one image whether it is RIGHT, WRONG or IGNORED.

    Args:
        detections: (n, 6) rows x1, y1, x2, y2, confidence, class, in any order; of equally confident ones the first
            goes first.
        labels: (m, 5) rows class, x1, y1, x2, y2 in the same pixels.
        difficult: (m,) bool.

    Returns:
        (n,) uint8.
    """
    verdict = np.full(len(detections), WRONG, np.uint8)
    if not len(detections) or not len(labels):
        return verdict
    overlap = box_iou(detections[:, :4].double(), labels[:, 1:5].double(), eps=0.0)
    overlap = torch.where(detections[:, 5:6] == labels[None, :, 0], overlap, -1.0)
    best, partner = (values.cpu().numpy() for values in overlap.max(1))
    difficult, taken = difficult.cpu().numpy(), set()
    order = np.argsort(-detections[:, 4].cpu().numpy(), kind="stable")
    for index in order[best[order] >= iou_threshold]:
        if difficult[partner[index]]:
            verdict[index] = IGNORED
        elif partner[index] not in taken:
            taken.add(partner[index])
            verdict[index] = RIGHT
    return verdict


def average_precision(right: np.ndarray, objects: int) -> tuple[float, float]:
    """AP of one class.

    Args:
        right: (n,) bool of its detections, most confident first, without ignored ones.
        objects: number of objects that are not difficult, at least 1.

    Returns:
        By 11 points: the mean of the best precisions at recalls of at least 0, 0.1 ... 1. By every point: the area
        under the falling envelope of precision over recall.
    """
    hits = np.cumsum(right)
    precision = hits / np.arange(1, len(hits) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    # Recalls are compared as whole numbers: 3 of 10 is a recall of at least 0.3, whatever 0.3 is in binary.
    first = [np.searchsorted(10 * hits, tenth * objects) for tenth in range(11)]
    eleven = sum(envelope[position] for position in first if position < len(envelope)) / 11
    # Recall rises by 1 / objects at each right detection.
    return float(eleven), float(envelope[right].sum() / objects)


@dataclass
class VocResult:
    """VOC's scores: AP at IoU 0.5 of the classes that have objects which are not difficult."""

    classes: np.ndarray = field(default_factory=lambda: np.zeros(0, int))  # (C,) class indices, ascending
    objects: np.ndarray = field(default_factory=lambda: np.zeros(0, int))  # (C,) that are not difficult
    ap11: np.ndarray = field(default_factory=lambda: np.zeros(0))  # (C,) by 11 points
    ap: np.ndarray = field(default_factory=lambda: np.zeros(0))  # (C,) by every point
    difficult: int = 0  # objects of all classes that were left out
    ignored: int = 0  # detections that stand for them

    @property
    def map11(self) -> float:
        """Mean AP by 11 points."""
        return float(self.ap11.mean()) if len(self.classes) else 0.0

    @property
    def map(self) -> float:
        """Mean AP by every point."""
        return float(self.ap.mean()) if len(self.classes) else 0.0

    def lines(self, names: Mapping[int, str], verbose: bool) -> list[str]:
        """The scores as text: one line of all classes and, if ``verbose``, one per class."""
        left_out = f"{self.difficult} difficult objects and {self.ignored} detections of them left out"
        header = f"VOC, IoU 0.5: mAP by 11 points {self.map11:.4f}, by every point {self.map:.4f}; {left_out}"
        if not verbose or len(self.classes) < 2:
            return [header]
        rows = zip(self.classes, self.objects, self.ap11, self.ap, strict=True)
        return [
            header,
            f"{'Class':>22}{'Objects':>11}{'AP11':>11}{'AP':>11}",
            *(f"{names[int(label)]:>22}{count:>11}{ap11:>11.4f}{ap:>11.4f}" for label, count, ap11, ap in rows),
        ]


class VocEvaluator:
    """Gathers detections image by image and scores them as VOC does."""

    def __init__(self, single_class: bool = False) -> None:
        self.single_class = single_class
        self.verdicts, self.scores, self.predicted, self.actual = [], [], [], []
        self.difficult = 0

    def add(self, detections: Tensor, labels: Tensor, difficult: Tensor) -> None:
        """Takes one image.

        Args:
            detections: (n, 6) rows x1, y1, x2, y2, confidence, class.
            labels, difficult: (m, 5) and (d, 5) rows class, x1, y1, x2, y2 in the same pixels.
        """
        truth = torch.cat((labels, difficult.to(labels)))
        flags = torch.arange(len(truth)) >= len(labels)
        self.verdicts.append(judge(detections, truth, flags))
        self.scores.append(detections[:, 4].cpu().numpy())
        self.predicted.append(detections[:, 5].cpu().numpy())
        self.actual.append(labels[:, 0].cpu().numpy())
        self.difficult += len(difficult)

    def add_file(self, image: str | Path, size: tuple[int, int], detections: Tensor, labels: Tensor) -> None:
        """Takes one image, whose difficult objects are read from their file; ``size`` is (height, width) in pixels."""
        rows = torch.from_numpy(read_difficult(image))
        if self.single_class:
            rows[:, 0] = 0
        corners = xywhn_to_xyxy(rows[:, 1:], size[1], size[0])
        self.add(detections, labels, torch.cat((rows[:, :1], corners), 1))

    def finish(self) -> VocResult:
        """The scores of all images so far."""
        if not self.verdicts:
            return VocResult()
        gathered = self.verdicts, self.scores, self.predicted, self.actual
        verdicts, scores, predicted, actual = (np.concatenate(parts) for parts in gathered)
        order = np.argsort(-scores, kind="stable")
        order = order[verdicts[order] != IGNORED]
        classes, objects = np.unique(actual.astype(int), return_counts=True)
        pairs = []
        for label, count in zip(classes, objects, strict=True):
            mine = order[predicted[order] == label]
            pairs.append(average_precision(verdicts[mine] == RIGHT, int(count)))
        ap11, ap = np.array(pairs).reshape(-1, 2).T
        return VocResult(classes, objects, ap11, ap, self.difficult, int((verdicts == IGNORED).sum()))
