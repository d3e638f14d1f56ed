"""Overlap of boxes: intersection over union (IoU) and its generalised, distance and complete forms."""

import math

import torch
from torch import Tensor

KINDS = ("iou", "giou", "diou", "ciou")


def box_iou(first: Tensor, second: Tensor, eps: float = 1e-7) -> Tensor:
    """IoU of every box of ``first`` (N, 4) with every box of ``second`` (M, 4), corners x1 y1 x2 y2; returns (N, M)."""
    top_left = torch.maximum(first[:, None, :2], second[None, :, :2])
    bottom_right = torch.minimum(first[:, None, 2:4], second[None, :, 2:4])
    intersection = (bottom_right - top_left).clamp(min=0).prod(2)
    area_first = (first[:, 2:4] - first[:, :2]).prod(1)
    area_second = (second[:, 2:4] - second[:, :2]).prod(1)
    return intersection / (area_first[:, None] + area_second[None] - intersection + eps)


def bbox_iou(first: Tensor, second: Tensor, kind: str = "iou", xywh: bool = True, eps: float = 1e-7) -> Tensor:
    """Overlap of boxes taken in pairs, differentiable in both.

    Args:
        first, second: (..., 4) boxes of broadcastable shapes; centre x, centre y, width, height, or corners
            x1 y1 x2 y2 if ``xywh`` is false. Any unit, the same on both sides.
        kind: "iou"; "giou" (arXiv 1902.09630, equation 4); "diou" (arXiv 1911.08287, equation 7);
            "ciou" (arXiv 1911.08287, equations 8-11; its trade-off factor carries no gradient).
        eps: keeps divisions finite for empty boxes.

    Returns:
        (...) overlaps: at most 1; "iou" is never negative, the others reach down to -1 ("ciou" a little below).

    Raises:
        ValueError: unknown ``kind``.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is none of {', '.join(KINDS)}")
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = _corners(first, xywh), _corners(second, xywh)
    width_a, height_a, width_b, height_b = ax2 - ax1, ay2 - ay1, bx2 - bx1, by2 - by1
    overlap_width = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0)
    overlap_height = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp(min=0)
    intersection = overlap_width * overlap_height
    union = width_a * height_a + width_b * height_b - intersection + eps
    iou = intersection / union
    if kind == "iou":
        return iou

    hull_width = torch.maximum(ax2, bx2) - torch.minimum(ax1, bx1)
    hull_height = torch.maximum(ay2, by2) - torch.minimum(ay1, by1)
    if kind == "giou":
        hull = hull_width * hull_height + eps
        return iou - (hull - union) / hull

    diagonal = hull_width**2 + hull_height**2 + eps
    centres = ((bx1 + bx2 - ax1 - ax2) ** 2 + (by1 + by2 - ay1 - ay2) ** 2) / 4
    if kind == "diou":
        return iou - centres / diagonal
    aspect_a, aspect_b = torch.atan(width_a / (height_a + eps)), torch.atan(width_b / (height_b + eps))
    aspect = (4 / math.pi**2) * (aspect_b - aspect_a) ** 2
    with torch.no_grad():
        trade_off = aspect / (aspect - iou + (1 + eps))
    return iou - (centres / diagonal + aspect * trade_off)


def _corners(boxes: Tensor, xywh: bool) -> tuple[Tensor, ...]:
    if not xywh:
        return boxes.unbind(-1)
    x, y, width, height = boxes.unbind(-1)
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2
