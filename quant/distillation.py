"""Distillation from the frozen float teacher beyond ADA; all terms share the teacher's one forward pass.

Student S and teacher T, features (B, C, H, W) of matching layers, sums over all of B, C, H, W:

    feature_mse    sum (S - T)^2 / sum T^2                            the noise-to-signal ratio of the features
    channel_wise   tau^2 * mean over B, C of KL(p_T || p_S),  p = softmax of the channel over space / tau
                   (CWD, arXiv 2011.13256, eq. 4 to 6)
    logits         on Detect's raw maps, with o = sigmoid of the teacher's objectness:
                   sum [KL(o_T || o_S) + o * (KL of each class + squared differences of the four sigmoid box terms)]
                   / sum o, Bernoulli KL; the objectness-scaled distillation of arXiv 1805.06361 with KL for its squared
                   differences of probabilities
    boxes          sum o * (1 - CIoU of the two networks' boxes) / sum o, on the same maps (CIoU: arXiv 1911.08287): a
                   tenth of a box's width moves a sigmoid by 0.05 or less and its square by 0.003, next to nothing among
                   the divergences of ``logits``

feature_mse and channel_wise are means over layers. Everything is computed in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from quant.ada import kl_divergence, log_distribution
from utils import distributed
from utils.iou import bbox_iou

SIGNAL_FLOOR = 1e-6  # mean square below which a teacher's feature counts as this strong


def feature_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance over the teacher's squares, both meant over the whole batch (a scalar; 0 if equal).

    One denominator for all channels, and the energy instead of the variance: neither a channel nor a whole map that is
    constant in the teacher may count without limit.
    """
    student, teacher = student.float(), teacher.float()
    energy = distributed.mean(teacher.square().mean())  # several processes have parts of one batch
    return (student - teacher).square().mean() / energy.clamp_min(SIGNAL_FLOOR)


def channel_wise(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """CWD in nats, mean over samples and channels (B, C, H, W) -> scalar."""
    distributions = (log_distribution(x.float(), "softmax", temperature) for x in (teacher, student))
    return kl_divergence(*distributions) * temperature**2


def bernoulli_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(sigmoid(teacher) || sigmoid(student)) in nats, element by element, from logits."""
    share = teacher.sigmoid()
    cross, own = (F.binary_cross_entropy_with_logits(x, share, reduction="none") for x in (student, teacher))
    return cross - own


def head_logits(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Distance of Detect's raw maps, each (B, anchors, H, W, 5 + classes), per object the teacher sees (a scalar)."""
    total = objects = 0.0
    for ours, theirs in zip(student, teacher, strict=True):
        ours, theirs = ours.float(), theirs.float()
        objectness = theirs[..., 4].sigmoid()
        boxes = (ours[..., :4].sigmoid() - theirs[..., :4].sigmoid()).square().sum(-1)
        classes = bernoulli_kl(theirs[..., 5:], ours[..., 5:]).sum(-1)
        total = total + (bernoulli_kl(theirs[..., 4], ours[..., 4]) + objectness * (boxes + classes)).sum()
        objects = objects + objectness.sum()
    return _per_object(total, objects)


def _per_object(total: Tensor, objects: Tensor) -> Tensor:
    """``total`` over the objects in all processes' images, at least one."""
    return total / distributed.mean(objects).clamp_min(1 / distributed.world_size())


def box_overlap(student: Sequence[Tensor], teacher: Sequence[Tensor], anchors: tuple[Tensor, Tensor]) -> Tensor:
    """1 - CIoU of the two networks' boxes, per object the teacher sees (a scalar).

    Args:
        student, teacher: Detect's raw maps, one a level, each (B, anchors, H, W, 5 + classes).
        anchors: the student's and the teacher's, each (levels, anchors, 2), widths and heights in cells.
    """
    total = objects = 0.0
    for ours, theirs, *sizes in zip(student, teacher, *anchors, strict=True):
        objectness = theirs[..., 4].float().sigmoid()
        pairs = zip((ours, theirs), sizes, strict=True)
        boxes = [_in_cells(raw[..., :4].float().sigmoid(), size.float()[:, None, None]) for raw, size in pairs]
        total = total + (objectness * (1 - bbox_iou(*boxes, kind="ciou"))).sum()
        objects = objects + objectness.sum()
    return _per_object(total, objects)


def _in_cells(shares: Tensor, sizes: Tensor) -> Tensor:
    """Centre from the cell's corner, width and height, in cells, of Detect's four sigmoid values (..., 4)."""
    return torch.cat((shares[..., :2] * 2 - 0.5, (shares[..., 2:] * 2).square() * sizes), -1)


def distillation_losses(
    terms: Sequence[str],
    student: Mapping[int, Tensor],
    teacher: Mapping[int, Tensor],
    student_raw: Sequence[Tensor],
    teacher_raw: Sequence[Tensor],
    temperature: float = 1.0,
    anchors: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The named terms, unweighted (scalars with a gradient towards the student only).

    Args:
        terms: of ``feature_mse``, ``channel_wise``, ``logits``, ``boxes``.
        student, teacher: layer index -> feature (B, C, H, W), with the same keys.
        student_raw, teacher_raw: Detect's raw maps; used by ``logits`` and ``boxes``.
        temperature: tau of ``channel_wise``.
        anchors: Detect's of the student and of the teacher, each in cells (levels, anchors, 2); used by ``boxes``.
    """
    losses = {}
    pairs = [(feature, teacher[index].detach()) for index, feature in student.items()]
    for term in terms:
        with torch.autocast(student_raw[0].device.type, enabled=False):
            if term == "feature_mse":
                losses[term] = torch.stack([feature_mse(*pair) for pair in pairs]).mean()
            elif term == "channel_wise":
                losses[term] = torch.stack([channel_wise(*pair, temperature) for pair in pairs]).mean()
            elif term == "logits":
                losses[term] = head_logits(student_raw, [level.detach() for level in teacher_raw])
            elif term == "boxes":
                losses[term] = box_overlap(student_raw, [level.detach() for level in teacher_raw], anchors)
            else:
                raise ValueError(f"{term!r} is not a distillation term")
    return losses
