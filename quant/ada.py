"""ADA: attention-distribution alignment with a frozen float teacher (arXiv 2511.05898).

Attention of a feature map X (C, H, W), per sample and channel, with statistics over space:

    simam   E = d / (4 * (v + lambda)) + 1/2,  d = (X - mean)^2, v = sum(d) / (HW - 1)     (SimAM, ICML 2021)
            = z^2 / 4 + 1/2 with lambda inside z
    qaware  S = log(1 + z^2) + gamma * log(1 + r^2),  z = |X - mean| / (sigma + kappa), r = |X - Q(X)| / (step + kappa)
            (version 2, eq. 13 to 15; r is 0 on the teacher's side)

The maps become distributions over space, by ``softmax`` with a temperature, or by ``l1``, the paper's form: the sigmoid
of the map over its sum. They are compared by ``kl``, KL(teacher || student), or ``js``, the Jensen-Shannon divergence
(eq. 16), as the mean over channels, samples and layers.

L1-normalised sigmoid maps are almost uniform: between SiLU features and their 4-bit copy the JS is 8e-5 nat, against
0.05 to 0.12 with the softmax; that is why ``softmax`` is the default.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from quant.blocks import BLOCK
from quant.quantizer import Quantizer

SIMAM_LAMBDA = 1e-4
KAPPA = 1e-6


def simam_energy(x: Tensor, regulariser: float = SIMAM_LAMBDA) -> Tensor:
    """SimAM's inverse energy (..., H, W) -> (..., H, W), at least 0.5, in float32 (v is tiny under mixed precision)."""
    x = x.float()
    deviation = (x - x.mean((-2, -1), keepdim=True)).square()
    count = max(x.shape[-1] * x.shape[-2] - 1, 1)
    variance = deviation.sum((-2, -1), keepdim=True) / count
    return deviation / (4 * (variance + regulariser)) + 0.5


def quantization_saliency(x: Tensor, quantized: Tensor | None, step: Tensor | None, gamma: float) -> Tensor:
    """Version 2's saliency S (eq. 15) of ``x`` (B, C, H, W); without ``quantized`` the second term is 0 (teacher)."""
    x = x.float()
    centred = (x - x.mean((-2, -1), keepdim=True)).abs()
    sigma = x.std((-2, -1), correction=0, keepdim=True)
    saliency = torch.log1p((centred / (sigma + KAPPA)).square())
    if quantized is not None:
        error = (x - quantized.float()).abs() / (step + KAPPA)
        saliency = saliency + gamma * torch.log1p(error.square())
    return saliency


def log_distribution(attention: Tensor, normalisation: str, temperature: float = 1.0) -> Tensor:
    """Logarithm of the distribution over space: (B, C, H, W) -> (B, C, HW).

    ``softmax``: softmax of attention / temperature. ``l1``: sigmoid of the attention over its sum.
    """
    flat = attention.flatten(-2)
    if normalisation == "softmax":
        return F.log_softmax(flat / temperature, -1)
    log_map = F.logsigmoid(flat)
    return log_map - torch.logsumexp(log_map, -1, keepdim=True)


def kl_divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student) in nats from log-distributions (..., N), mean over all but the last dimension."""
    return (teacher.exp() * (teacher - student)).sum(-1).mean()


def js_divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats, 0 to log 2, from log-distributions (..., N)."""
    middle = torch.logaddexp(teacher, student) - torch.log(torch.tensor(2.0, device=teacher.device))
    return 0.5 * (kl_divergence(teacher, middle) + kl_divergence(student, middle))


DIVERGENCES = {"kl": kl_divergence, "js": js_divergence}


class _SimamDivergence(torch.autograd.Function):
    """Divergence of two features' SimAM maps under the softmax: the functions above in one, a few samples at a time.

    With a = X - mean, n places, V = sum(a^2) / (n - 1) and s = 1 / (4 T (V + lambda)), the distributions are softmax(z)
    with z = s a^2 (the map's + 1/2 cancels), p the teacher's and q the student's. The gradients, worked out by hand:
        dKL/dz = q - p,    dJS/dz = q (h - sum(q h))  with h = log(q / m) / 2, m = (p + q) / 2
        dL/da = 2 a (s dz - 4 T s^2 sum(dz a^2) / (n - 1)),    dL/dX = dL/da - its mean
    They are computed on the way forward, while all is in the cache: with autograd the three maps of yolov5n (320
    pixels, batch 16, one thread) take 3.3 times as long.
    """

    @staticmethod
    def forward(ctx, student, teacher, divergence, temperature):
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(student) if wanted else None
        samples = max(BLOCK * len(student) // max(student.numel(), 1), 1)
        total = student.new_zeros((), dtype=torch.float64 if student.dtype is torch.float64 else torch.float32)
        for start in range(0, len(student), samples):
            part = slice(start, start + samples)
            loss, through = _simam_rows(_rows(student[part]), _rows(teacher[part]), divergence, temperature, wanted)
            total += loss
            if wanted:
                gradient[part] = through.reshape(student[part].shape)
        rows = student.shape[0] * student.shape[1]
        ctx.save_for_backward(gradient)
        ctx.rows = rows
        return total / rows

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        return gradient * (upstream / ctx.rows).to(gradient.dtype), None, None, None


def _rows(x: Tensor) -> Tensor:
    """(B, C, H, W) in any memory format -> (B * C, HW), contiguous, at least float32."""
    rows = x.contiguous().reshape(-1, x.shape[-2] * x.shape[-1])
    return rows if rows.dtype is torch.float64 else rows.float()


def _simam_rows(
    student: Tensor, teacher: Tensor, divergence: str, temperature: float, wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """Sum of the divergences of rows (R, n), and if ``wanted`` its gradient for ``student``."""
    centred, square, scale, log_q = _simam_log_distribution(student, temperature)
    log_p = _simam_log_distribution(teacher, temperature)[3]
    p, q = log_p.exp(), log_q.exp()
    if divergence == "kl":
        loss = torch.dot(p.reshape(-1), log_p.sub_(log_q).reshape(-1))
        through = q.sub_(p) if wanted else None
    else:
        log_middle = torch.add(p, q).mul_(0.5).clamp_min_(torch.finfo(p.dtype).tiny).log_()
        half = log_q.sub_(log_middle).mul_(0.5)
        sums = (q * half).sum(1, keepdim=True)
        loss = 0.5 * torch.dot(p.reshape(-1), log_p.sub_(log_middle).reshape(-1)) + sums.sum()
        through = half.sub_(sums).mul_(q) if wanted else None
    if wanted:
        count = max(square.shape[1] - 1, 1)
        turn = (through * square).sum(1, keepdim=True).mul_(scale.square()).mul_(-4 * temperature / count)
        through = through.mul_(scale).add_(turn).mul_(centred).mul_(2)
        through.sub_(through.mean(1, keepdim=True))
    return loss, through


def _simam_log_distribution(x: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a, a^2, s (R, 1) and the logarithms of the distributions of rows (R, n)."""
    centred = x - x.mean(1, keepdim=True)
    square = centred.square()
    variance = square.sum(1, keepdim=True) / max(x.shape[1] - 1, 1)
    scale = 1 / (4 * temperature * (variance + SIMAM_LAMBDA))
    return centred, square, scale, torch.log_softmax(square * scale, 1)


class AttentionAlignment(nn.Module):
    """The distillation loss between matching features of student and teacher.

    Args:
        attention: ``simam`` or ``qaware``.
        divergence: ``js`` or ``kl``.
        normalisation: ``softmax`` or ``l1``.
        temperature: of the softmax.
        gamma: weight of the quantization error in ``qaware``.
        quantized: compare what the reader sees (the quantized feature) instead of the feature itself.
    """

    def __init__(
        self,
        attention: str = "simam",
        divergence: str = "js",
        normalisation: str = "softmax",
        temperature: float = 1.0,
        gamma: float = 1.0,
        quantized: bool = False,
    ) -> None:
        super().__init__()
        self.attention, self.normalisation, self.temperature = attention, normalisation, temperature
        self.divergence = divergence
        self.gamma, self.quantized = gamma, quantized

    def _map(self, x: Tensor, reader: Quantizer | None) -> Tensor:
        if self.attention == "simam":
            return simam_energy(reader.in_own_scale(x) if reader is not None and self.quantized else x)
        if reader is None:
            return quantization_saliency(x, None, None, self.gamma)
        quantized = reader(x)
        x = quantized if self.quantized else reader.equalized(x)  # as the grid sees it: errors are counted in its steps
        return quantization_saliency(x, quantized, reader.current_step().detach(), self.gamma)

    def forward(
        self, student: dict[int, Tensor], teacher: dict[int, Tensor], readers: dict[int, Quantizer | None]
    ) -> Tensor:
        """Mean divergence over layers, samples and channels, in nats (a scalar).

        Args:
            student: layer index -> feature (B, C, H, W), with gradient.
            teacher: the same layers of the teacher; no gradient flows into it.
            readers: layer index -> the quantizer through which the student's feature is read (lowest bits first).
        """
        needs_reader = self.quantized or self.attention == "qaware"
        losses = []
        for index, feature in student.items():
            reader = readers.get(index) if needs_reader else None
            with torch.autocast(feature.device.type, enabled=False):
                if self.attention == "simam" and self.normalisation == "softmax":
                    read = feature if reader is None else reader.in_own_scale(feature)
                    losses.append(
                        _SimamDivergence.apply(read, teacher[index].detach(), self.divergence, self.temperature)
                    )
                    continue
                student_log = log_distribution(self._map(feature, reader), self.normalisation, self.temperature)
                with torch.no_grad():
                    attention = self._map(teacher[index].detach(), None)
                    teacher_log = log_distribution(attention, self.normalisation, self.temperature)
                losses.append(DIVERGENCES[self.divergence](teacher_log, student_log))
        return torch.stack(losses).mean()


@torch.no_grad()
def freeze_teacher(model: nn.Module) -> nn.Module:
    """Puts ``model`` into eval mode, takes the gradients off its parameters and returns it."""
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model
