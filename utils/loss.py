"""The detection loss: which cells and anchors answer for which labelled box, and what their answers cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils import distributed
from utils.iou import bbox_iou

# A box belongs to its own cell and to the nearest of the left/right and of the upper/lower neighbours.
# Offsets (x, y) in cells that are subtracted from the centre: own, left, upper, right, lower.
NEIGHBOURS = ((0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (-0.5, 0.0), (0.0, -0.5))
# Weight of each level's objectness term: maps with many cells have small means.
LEVEL_BALANCE_3 = (4.0, 1.0, 0.4)
LEVEL_BALANCE = (4.0, 1.0, 0.25, 0.06, 0.02)


def scale_loss_gains(hyp: Mapping, num_levels: int, num_classes: int, image_size: int) -> dict:
    """Returns a copy of ``hyp`` whose gains box, cls and obj are scaled from 3 levels, 80 classes and 640 pixels."""
    scaled = dict(hyp)
    scaled["box"] = hyp["box"] * 3 / num_levels
    scaled["cls"] = hyp["cls"] * num_classes / 80 * 3 / num_levels
    scaled["obj"] = hyp["obj"] * (image_size / 640) ** 2 * 3 / num_levels
    return scaled


@dataclass
class Assignment:
    """Candidates of one level, K = 5 * anchors * targets of them; only those under ``mask`` are matches.

    Every candidate is kept and masked, because picking the matches out would make the host wait for the device. Where
    the host is the device, ``only_matches`` saves the work on the others.
    """

    mask: Tensor  # (K,) bool
    image: Tensor  # (K,) int64, index in the batch
    anchor: Tensor  # (K,) int64
    row: Tensor  # (K,) int64, inside the map
    column: Tensor  # (K,) int64, inside the map
    label: Tensor  # (K,) int64, class index
    box: Tensor  # (K, 4) centre relative to the cell's corner, width, height; in cells

    def only_matches(self) -> "Assignment":
        """The matches alone, in their order: their number becomes a shape."""
        chosen = self.mask.nonzero()[:, 0]
        return Assignment(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))


def assign_targets(targets: Tensor, anchors: Tensor, height: int, width: int, anchor_threshold: float) -> Assignment:
    """Matches labelled boxes with the cells and anchors of one level.

    An anchor answers for a box if neither side differs from the anchor's by a factor of ``anchor_threshold`` or more.

    Args:
        targets: (n, 6) rows image index, class, centre x, centre y, width, height; boxes normalised to 0..1.
        anchors: (A, 2) widths and heights in cells of this level.
        height, width: size of the level's map in cells.
    """
    number_anchors, number = anchors.shape[0], targets.shape[0]
    size = targets.new_tensor((width, height))
    centre, extent = targets[:, 2:4] * size, targets[:, 4:6] * size

    ratio = extent[None] / anchors[:, None]  # (A, n, 2)
    fits = torch.maximum(ratio, 1 / ratio).amax(2) < anchor_threshold  # (A, n)

    from_end = size - centre
    near_start = (centre % 1 < 0.5) & (centre > 1)  # (n, 2) for x, y: the left and the upper neighbour
    near_end = (from_end % 1 < 0.5) & (from_end > 1)  # the right and the lower one
    own = near_start.new_ones(1, number)
    wanted = torch.cat((own, near_start.T, near_end.T))  # (5, n)

    cell = (centre[None] - targets.new_tensor(NEIGHBOURS)[:, None]).long()  # (5, n, 2), towards zero
    column, row = cell[..., 0].clamp(0, width - 1), cell[..., 1].clamp(0, height - 1)
    corner = torch.stack((column, row), 2).to(centre.dtype)
    box = torch.cat((centre[None] - corner, extent.expand(len(NEIGHBOURS), -1, -1)), 2)  # (5, n, 4)

    def spread(values: Tensor) -> Tensor:
        """(5 or 1, A or 1, n, ...) -> (5 * A * n, ...)"""
        shape = (len(NEIGHBOURS), number_anchors, number, *values.shape[3:])
        return values.expand(shape).reshape(-1, *values.shape[3:])

    return Assignment(
        mask=spread(fits[None] & wanted[:, None]),
        image=spread(targets[:, 0].long()[None, None]),
        anchor=spread(torch.arange(number_anchors, device=targets.device)[None, :, None]),
        row=spread(row[:, None]),
        column=spread(column[:, None]),
        label=spread(targets[:, 1].long()[None, None]),
        box=spread(box[:, None]),
    )


class DetectionLoss(nn.Module):
    """Sum over levels of box (1 - CIoU), objectness and class terms.

    Nothing in it waits for a GPU: the number of matches never becomes a shape there.

    Args:
        anchors: (levels, A, 2) in units of each level's stride.
        stride: pixels per cell of each level; kept only for the reader of ``repr``.
        num_classes: with one class there is no class term.
        hyp: keys box, obj, cls (gains, already scaled by ``scale_loss_gains``), cls_pw, obj_pw (weights of positives),
            anchor_t and fl_gamma (focal exponent, 0 = none; arXiv 1708.02002, equation 5 with its alpha of 0.25).
        label_smoothing: class targets become 1 - eps/2 and eps/2.
    """

    FOCAL_ALPHA = 0.25

    def __init__(
        self,
        anchors: Tensor,
        stride: Tensor | Sequence[float],
        num_classes: int,
        hyp: Mapping,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.register_buffer("anchors", anchors.detach().clone().float(), persistent=False)
        self.stride = [float(value) for value in stride]
        self.num_classes = num_classes
        self.gain_box, self.gain_objectness, self.gain_class = (float(hyp[key]) for key in ("box", "obj", "cls"))
        self.anchor_threshold = float(hyp["anchor_t"])
        self.focal_exponent = float(hyp.get("fl_gamma", 0.0))
        device = anchors.device
        self.register_buffer("class_positive", torch.tensor(float(hyp["cls_pw"]), device=device), persistent=False)
        self.register_buffer("object_positive", torch.tensor(float(hyp["obj_pw"]), device=device), persistent=False)
        self.true_value, self.false_value = 1.0 - 0.5 * label_smoothing, 0.5 * label_smoothing
        self.level_balance = LEVEL_BALANCE_3 if len(anchors) == 3 else LEVEL_BALANCE[: len(anchors)]

    def forward(self, raw_maps: Sequence[Tensor], targets: Tensor, shared: bool = False) -> tuple[Tensor, Tensor]:
        """Computes the loss of one batch.

        Args:
            raw_maps: per level (B, A, H, W, 5 + classes), the Detect head's output before any sigmoid.
            targets: (n, 6) rows image index, class, centre x, centre y, width, height; normalised; on the same device.
            shared: whether all processes call this together, each with its part, equally large, of one batch. Matches
                are then counted over all of them, so that the mean over the processes is the loss of the whole batch.

        Returns:
            The scalar to differentiate, (box + obj + cls) * B, and a detached (3,) tensor box, obj, cls (per image).
        """
        targets = targets.float()
        total_box = total_objectness = total_class = raw_maps[0].new_zeros((), dtype=torch.float32)
        matches = [self._matches(raw, targets, level) for level, raw in enumerate(raw_maps)]
        counts = torch.stack([match.mask.sum() for match in matches])
        counts = distributed.mean(counts).clamp(min=1 / distributed.world_size()) if shared else counts.clamp(min=1)
        for level, (raw, match, count) in enumerate(zip(raw_maps, matches, counts, strict=True)):
            answers = raw[match.image, match.anchor, match.row, match.column].float()  # (K, 5 + classes)
            overlap = self._overlap(answers, match, level)
            total_box = total_box + torch.where(match.mask, 1 - overlap, 0.0).sum() / count
            expected = self._objectness_target(overlap.detach(), match, raw.shape[:4])
            objectness = self._cross_entropy(raw[..., 4].float(), expected, self.object_positive).mean()
            total_objectness = total_objectness + objectness * self.level_balance[level]
            if self.num_classes > 1:
                total_class = total_class + self._class_term(answers[:, 5:], match) / (count * self.num_classes)

        parts = torch.stack(
            (total_box * self.gain_box, total_objectness * self.gain_objectness, total_class * self.gain_class)
        )
        return parts.sum() * raw_maps[0].shape[0], parts.detach()

    def _matches(self, raw: Tensor, targets: Tensor, level: int) -> Assignment:
        match = assign_targets(targets, self.anchors[level], raw.shape[2], raw.shape[3], self.anchor_threshold)
        return match.only_matches() if raw.device.type == "cpu" else match

    def _overlap(self, answers: Tensor, match: Assignment, level: int) -> Tensor:
        """CIoU (K,) of the predicted boxes with the labelled ones, in cells."""
        centre = answers[:, :2].sigmoid() * 2 - 0.5
        extent = (answers[:, 2:4].sigmoid() * 2) ** 2 * self.anchors[level][match.anchor]
        return bbox_iou(torch.cat((centre, extent), 1), match.box, kind="ciou")

    @staticmethod
    def _objectness_target(overlap: Tensor, match: Assignment, shape: torch.Size) -> Tensor:
        """Overlap of the last match of each cell and anchor, zero where there is none; (B, A, H, W).

        A plain indexed assignment leaves the winner of a shared cell to chance on a GPU; the highest position among
        the matches is found first, with an operation that does not depend on order.
        """
        _batch, anchors, height, width = shape
        cell = ((match.image * anchors + match.anchor) * height + match.row) * width + match.column
        position = torch.arange(1, len(cell) + 1, device=cell.device)
        winner = torch.zeros(shape.numel(), dtype=torch.long, device=cell.device)
        winner = winner.scatter_reduce(0, cell, torch.where(match.mask, position, 0), "amax")
        values = torch.cat((overlap.new_zeros(1), overlap.clamp(min=0)))
        return values[winner].view(shape)

    def _class_term(self, logits: Tensor, match: Assignment) -> Tensor:
        expected = torch.full_like(logits, self.false_value)
        expected = expected.scatter(1, match.label[:, None], self.true_value)
        loss = self._cross_entropy(logits, expected, self.class_positive)
        return torch.where(match.mask[:, None], loss, 0.0).sum()

    def _cross_entropy(self, logits: Tensor, expected: Tensor, positive: Tensor) -> Tensor:
        """Elementwise binary cross entropy with a weight for positives, focal if asked for."""
        loss = F.binary_cross_entropy_with_logits(logits, expected, pos_weight=positive, reduction="none")
        if self.focal_exponent <= 0:
            return loss
        probability = logits.sigmoid()
        right = expected * probability + (1 - expected) * (1 - probability)
        alpha = expected * self.FOCAL_ALPHA + (1 - expected) * (1 - self.FOCAL_ALPHA)
        return loss * alpha * (1 - right) ** self.focal_exponent
