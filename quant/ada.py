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
        self.divergence = DIVERGENCES[divergence]
        self.gamma, self.quantized = gamma, quantized

    def _map(self, x: Tensor, reader: Quantizer | None) -> Tensor:
        quantized = None if reader is None else reader(x)
        if reader is not None and self.quantized:
            x = quantized
        if self.attention == "simam":
            return simam_energy(x)
        step = None if reader is None else reader.current_step().detach()
        return quantization_saliency(x, quantized, step, self.gamma)

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
                student_log = log_distribution(self._map(feature, reader), self.normalisation, self.temperature)
                with torch.no_grad():
                    attention = self._map(teacher[index].detach(), None)
                    teacher_log = log_distribution(attention, self.normalisation, self.temperature)
                losses.append(self.divergence(teacher_log, student_log))
        return torch.stack(losses).mean()


@torch.no_grad()
def freeze_teacher(model: nn.Module) -> nn.Module:
    """Puts ``model`` into eval mode, takes the gradients off its parameters and returns it."""
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model
