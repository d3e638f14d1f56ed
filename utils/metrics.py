"""Precision, recall, average precision, localisation and classification apart, the confusion matrix of a detector."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from utils.iou import box_iou

# The ten thresholds of COCO: 0.50, 0.55 ... 0.95.
IOU_THRESHOLDS = tuple(np.linspace(0.5, 0.95, 10).tolist())
CONFIDENCE_AXIS = np.linspace(0, 1, 1000)
RECALL_AXIS = np.linspace(0, 1, 101)
STRICT_COLUMN = 5  # of IOU_THRESHOLDS: 0.75
SMOOTHING = 0.1  # width of the window, as a share of CONFIDENCE_AXIS, that smooths F1 before its maximum is taken


def fitness(map50: float, map50_95: float) -> float:
    """One number to choose the best epoch by: 0.1 * mAP50 + 0.9 * mAP50-95."""
    return 0.1 * map50 + 0.9 * map50_95


def match_predictions(detections: Tensor, labels: Tensor, iou_thresholds: Tensor) -> Tensor:
    """Says which detections of one image are right, at every IoU threshold at once.

    Each detection stands for the label of its class that it overlaps most; of several that stand for one label, the
    most confident whose overlap reaches the threshold is right and the others are wrong.

    Args:
        detections: (n, 6) rows x1, y1, x2, y2, confidence, class, most confident first.
        labels: (m, 5) rows class, x1, y1, x2, y2 in the same pixels.
        iou_thresholds: (T,).

    Returns:
        (n, T) bool.
    """
    number, thresholds = len(detections), iou_thresholds.to(detections.device)
    if not number or not len(labels):
        return torch.zeros(number, len(thresholds), dtype=torch.bool, device=detections.device)
    overlap = box_iou(detections[:, :4], labels[:, 1:5])
    overlap = torch.where(detections[:, 5:6] == labels[None, :, 0], overlap, -1.0)
    best_overlap, best_label = overlap.max(1)
    return _first_to_reach(best_overlap, best_label, len(labels), thresholds)


def match_boxes(detections: Tensor, labels: Tensor, iou_threshold: float = 0.5) -> tuple[Tensor, Tensor]:
    """Pairs the boxes of one image whatever their classes, by the rule of ``match_predictions``.

    Which label a detection gets depends only on more confident detections, so the pairs among the detections above any
    confidence are the pairs found here that lie above it.

    Args:
        detections: (n, 6) rows x1, y1, x2, y2, confidence, class, most confident first.
        labels: (m, 5) rows class, x1, y1, x2, y2 in the same pixels.

    Returns:
        (n,) float32 IoU of each detection with its label, 0 for a detection without one; (n,) bool, whether it has a
        label and that label's class.
    """
    number, device = len(detections), detections.device
    if not number or not len(labels):
        return torch.zeros(number, device=device), torch.zeros(number, dtype=torch.bool, device=device)
    best_overlap, best_label = box_iou(detections[:, :4], labels[:, 1:5]).max(1)
    threshold = torch.tensor([iou_threshold], device=device)
    paired = _first_to_reach(best_overlap, best_label, len(labels), threshold)[:, 0]
    return best_overlap.float() * paired, paired & (labels[best_label, 0] == detections[:, 5])


def _first_to_reach(best_overlap: Tensor, best_label: Tensor, number_labels: int, thresholds: Tensor) -> Tensor:
    """(n, T) bool: whether a detection's overlap reaches the threshold as the first of those with its best label."""
    number = len(best_overlap)
    reached = best_overlap[:, None] >= thresholds  # (n, T)
    position = torch.arange(number, device=best_overlap.device)[:, None].expand(-1, len(thresholds))
    claims = torch.where(reached, position, number)
    slots = best_label[:, None].expand_as(claims)
    first = torch.full((number_labels, len(thresholds)), number, device=best_overlap.device)
    first = first.scatter_reduce(0, slots, claims, "amin")
    return reached & (first.gather(0, slots) == position)


def compute_ap(recall: np.ndarray, precision: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Average precision: area under the falling envelope of the precision-recall curve.

    The curve is continued to (0, 1) and (1, 0), sampled at the 101 recalls of COCO by linear interpolation and
    integrated by trapezoids.

    Args:
        recall, precision: (n,) after each detection, most confident first.

    Returns:
        The area, and the recalls and enveloped precisions (n + 2,) of the continued curve.
    """
    recall = np.concatenate(([0.0], recall, [1.0]))
    precision = np.concatenate(([1.0], precision, [0.0]))
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    sampled = np.interp(RECALL_AXIS, recall, envelope)
    return float(((sampled[1:] + sampled[:-1]) / 2 * np.diff(RECALL_AXIS)).sum()), recall, envelope


@dataclass
class ClassMetrics:
    """Per-class results over a data set; C classes that have labels, T IoU thresholds, the first of them 0.5.

    precision, recall and f1 are those at IoU 0.5 and at ``confidence``, the one where the mean F1 is highest.
    """

    classes: np.ndarray  # (C,) int, class indices, ascending
    labels: np.ndarray  # (C,) int, number of labels
    true_positives: np.ndarray  # (C,)
    false_positives: np.ndarray  # (C,)
    precision: np.ndarray  # (C,)
    recall: np.ndarray  # (C,)
    f1: np.ndarray  # (C,)
    ap: np.ndarray  # (C, T)
    confidence: float = 0.0
    # Curves for plots: over CONFIDENCE_AXIS (C, 1000) and, of precision over it as recall, at IoU 0.5 (C, 1000).
    precision_curve: np.ndarray = field(default_factory=lambda: np.zeros((0, len(CONFIDENCE_AXIS))))
    recall_curve: np.ndarray = field(default_factory=lambda: np.zeros((0, len(CONFIDENCE_AXIS))))
    f1_curve: np.ndarray = field(default_factory=lambda: np.zeros((0, len(CONFIDENCE_AXIS))))
    precision_by_recall: np.ndarray = field(default_factory=lambda: np.zeros((0, len(CONFIDENCE_AXIS))))

    @property
    def ap50(self) -> np.ndarray:
        """(C,) AP at IoU 0.5."""
        return self.ap[:, 0]

    @property
    def ap75(self) -> np.ndarray:
        """(C,) AP at IoU 0.75."""
        return self.ap[:, STRICT_COLUMN]

    @property
    def ap50_95(self) -> np.ndarray:
        """(C,) AP averaged over the thresholds."""
        return self.ap.mean(1)

    def means(self) -> tuple[float, float, float, float]:
        """Precision, recall, mAP50 and mAP50-95 averaged over classes; zeros if there are no labels."""
        if not len(self.classes):
            return 0.0, 0.0, 0.0, 0.0
        return tuple(float(v.mean()) for v in (self.precision, self.recall, self.ap50, self.ap50_95))


@dataclass
class MatchedBoxes:
    """Localisation apart from classification: the detections of at least ``confidence`` that ``match_boxes`` paired.

    Means over boxes, not over classes; zeros where nothing is paired. The two means are of found objects only, so a
    network that finds fewer, easier objects can have higher ones: read them beside ``share``.
    """

    confidence: float = 0.0
    count: int = 0
    share: float = 0.0  # of the labels that have a partner
    mean_iou: float = 0.0  # at least the IoU that pairs were formed at
    class_accuracy: float = 0.0  # share of pairs with the label's class


def matched_boxes(
    overlap: np.ndarray, right_class: np.ndarray, confidence: np.ndarray, number_labels: int, minimum: float
) -> MatchedBoxes:
    """Localisation and classification over a data set.

    Args:
        overlap, right_class: (n,) each, of all detections of the data set, from ``match_boxes``.
        confidence: (n,) of each detection.
        number_labels: of the data set.
        minimum: confidence from which a detection counts. ``ClassMetrics.confidence`` (the highest mean F1, where P and
            R are given too) compares networks at their own operating points; a fixed one would mostly compare how
            quantization moves confidences.
    """
    chosen = (overlap > 0) & (confidence >= minimum)
    count = int(chosen.sum())
    if not count:
        return MatchedBoxes(minimum)
    mean_iou, accuracy = float(overlap[chosen].mean(dtype=np.float64)), float(right_class[chosen].mean())
    return MatchedBoxes(minimum, count, count / number_labels, mean_iou, accuracy)


def ap_per_class(
    correct: np.ndarray, confidence: np.ndarray, predicted: np.ndarray, actual: np.ndarray, eps: float = 1e-16
) -> ClassMetrics:
    """Average precision and the operating point of every class that has labels.

    Args:
        correct: (n, T) bool, of all detections of the data set, from ``match_predictions``.
        confidence, predicted: (n,) confidence and class of each detection.
        actual: (m,) class of each label.
    """
    order = np.lexsort((-confidence, predicted))  # by class, in it the most confident first; stable
    correct, confidence, predicted = correct[order], confidence[order], predicted[order]
    classes, number_labels = np.unique(actual.astype(int), return_counts=True)
    shape = (len(classes), len(CONFIDENCE_AXIS))
    precision_curve, recall_curve, precision_by_recall = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    ap = np.zeros((len(classes), correct.shape[1]))
    starts, ends = (np.searchsorted(predicted, classes, side) for side in ("left", "right"))
    for index, (start, end) in enumerate(zip(starts, ends, strict=True)):
        chosen = slice(start, end)
        if start == end:
            continue
        hits = correct[chosen].cumsum(0)
        recall = hits / (number_labels[index] + eps)
        precision = hits / np.arange(1, len(hits) + 1)[:, None]
        # np.interp wants rising positions, confidences fall; no detection is above the first confidence.
        axis = (-CONFIDENCE_AXIS, -confidence[chosen])
        recall_curve[index] = np.interp(*axis, recall[:, 0], left=0)
        precision_curve[index] = np.interp(*axis, precision[:, 0], left=1)
        for threshold in range(ap.shape[1]):
            ap[index, threshold], recalls, envelope = compute_ap(recall[:, threshold], precision[:, threshold])
            if threshold == 0:
                precision_by_recall[index] = np.interp(CONFIDENCE_AXIS, recalls, envelope)

    f1_curve = 2 * precision_curve * recall_curve / (precision_curve + recall_curve + eps)
    best = int(_smooth(f1_curve.mean(0)).argmax()) if len(classes) else 0
    precision, recall, f1 = precision_curve[:, best], recall_curve[:, best], f1_curve[:, best]
    true_positives = (recall * number_labels).round()
    false_positives = (true_positives / (precision + eps) - true_positives).round()
    return ClassMetrics(
        classes, number_labels, true_positives, false_positives, precision, recall, f1, ap,
        float(CONFIDENCE_AXIS[best]), precision_curve, recall_curve, f1_curve, precision_by_recall,
    )  # fmt: skip


def _smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over SMOOTHING of the length; the ends are continued with their own value."""
    window = round(len(values) * SMOOTHING * 2) // 2 + 1
    padded = np.pad(values, window // 2, mode="edge")
    return np.convolve(padded, np.ones(window) / window, mode="valid")


class ConfusionMatrix:
    """Counts of (predicted class, labelled class) at one confidence and one IoU; the last row and column: background.

    Detections and labels are paired whatever their class, best overlap first, each at most once.

    Attributes:
        matrix: (classes + 1, classes + 1) int64; row predicted, column labelled. The last row holds labels that
            nothing found, the last column detections where nothing is.
    """

    def __init__(self, num_classes: int, confidence_threshold: float = 0.25, iou_threshold: float = 0.45) -> None:
        self.matrix = np.zeros((num_classes + 1, num_classes + 1), dtype=np.int64)
        self.num_classes = num_classes
        self.confidence_threshold = confidence_threshold
        self.iou_threshold = iou_threshold

    def add(self, detections: Tensor, labels: Tensor) -> None:
        """Counts one image: detections (n, 6) x1 y1 x2 y2 confidence class, labels (m, 5) class x1 y1 x2 y2."""
        detections = detections[detections[:, 4] > self.confidence_threshold].cpu()
        labels = labels.cpu()
        found = detections[:, 5].long().numpy()
        actual = labels[:, 0].long().numpy()
        partner = np.full(len(found), -1)
        if len(found) and len(actual):
            partner = _pair(box_iou(detections[:, :4], labels[:, 1:5]).numpy(), self.iou_threshold)
        paired = partner >= 0
        missed = np.ones(len(actual), dtype=bool)
        missed[partner[paired]] = False
        background = self.num_classes
        np.add.at(self.matrix, (found[paired], actual[partner[paired]]), 1)
        np.add.at(self.matrix, (found[~paired], background), 1)
        np.add.at(self.matrix, (background, actual[missed]), 1)


def _pair(overlap: np.ndarray, threshold: float) -> np.ndarray:
    """Label (or -1) of each detection: the one it overlaps most, if it is also that label's best such detection."""
    best_label, best = overlap.argmax(1), overlap.max(1)
    order = np.argsort(-best, kind="stable")
    order = order[best[order] > threshold]
    _, first = np.unique(best_label[order], return_index=True)
    partner = np.full(len(overlap), -1)
    winners = order[first]
    partner[winners] = best_label[winners]
    return partner
