"""GABFusion: balanced feature fusion for low-bit networks (arXiv 2511.05898).

At a Concat or Add with K branches F_i:

    alpha = softmax(lambda)                                     (version 2, eq. 5)
    h     = cat(K * alpha_i * F_i)      at an Add: the sum of K * alpha_i * F_i
    n(h)  = (h - m) / s * s0 + m0       m, s: mean and deviation over channels at each location (eq. 6)
    y     = (1 - w) * h + w * n(h)

lambda starts at 0, so at insertion h is the old concatenation (or sum). Ours are the factor K, the calibrated scalars
s0 and m0 (means of s and m over calibration images) and the strength w, which ramps up and returns to 0 before training
ends: the pretrained network survives the insertion and the exported one contains nothing but a factor per branch.
``paper`` drops them: y = LN(cat(alpha_i * F_i)).

``learnable`` trains lambda by back-propagation (version 1 of the paper). ``feedback`` moves it by the gradient energies
G_i of the branches (version 2, eq. 7 to 10):

    Gbar_i  <- (1 - beta) * Gbar_i + beta * G_i,   G_i = ||dL / dF_i|| through this node
    lambda_i <- lambda_i - eta * (log Gbar_i - mean_j log Gbar_j)

``backward`` is ours and leaves the forward pass alone (y = h, alpha = 1/K, w = 0): what balances is the gradient that
branch i receives through this node, which is multiplied by

    c_i = clip(exp(mean_j log Gbar_j - log Gbar_i), 1/4, 4)

so that all have the geometric mean of the norms. Features stay as they were and nothing is left to fold.

All branches of a sum receive one gradient, so at an Add the energies differ by the factors alone and the feedback law
can only pull them back to 1 (``backward``: c_i = 1); weighted sums need ``learnable``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from utils import distributed

STATISTICS_EPSILON = 1e-5
OPERATIONS = ("concat", "add")
GRADIENT_LIMIT = 4.0  # of the factor on a branch's gradient under ``backward``, and of its inverse


def join(branches: list[Tensor], operation: str) -> Tensor:
    """K tensors (B, C_i, H, W) -> their concatenation over channels, or for ``add`` their sum."""
    if operation == "concat":
        return torch.cat(branches, 1)
    total = branches[0]
    for branch in branches[1:]:
        total = total + branch
    return total


class GABFusion(nn.Module):
    """Replaces ``torch.cat`` inside a Concat, or the sum inside an Add.

    Args:
        branches: K, the number of inputs.
        balance: ``learnable``, ``feedback``, ``backward`` or ``fixed``.
        paper: the paper's form.
        beta, eta, epsilon: constants of the feedback law.
        operation: ``concat`` or ``add``.

    Attributes:
        deviation_range: smallest and largest s (mean over a batch's locations) since ``clear_monitors``, (2,).
        axis_error: while ``probe`` is set, mean distance in units of s0 between the mean over channels of n(h) and m0:
            0 unless the statistics are taken over another axis.
    """

    no_weight_decay = True
    # Schedule state and the controller's statistics: the EMA copies them, an average would mean nothing.
    ema_copied = ("strength", "energy", "energy_average", "updates", "deviation_range", "axis_error")

    def __init__(
        self,
        branches: int,
        balance: str = "learnable",
        paper: bool = False,
        beta: float = 0.1,
        eta: float = 0.01,
        epsilon: float = 1e-12,
        operation: str = "concat",
    ) -> None:
        super().__init__()
        if operation not in OPERATIONS:
            raise ValueError(f"operation {operation!r}: choose one of {', '.join(OPERATIONS)}")
        self.operation = operation
        self.branches, self.balance, self.paper = branches, balance, paper
        self.beta, self.eta, self.epsilon = beta, eta, epsilon
        logits = torch.zeros(branches)
        if balance == "learnable":
            self.logits = nn.Parameter(logits)
        else:
            self.register_buffer("logits", logits)
        self.register_buffer("mean", torch.zeros(()))  # m0
        self.register_buffer("deviation", torch.ones(()))  # s0
        self.register_buffer("fixed_mean", torch.zeros(()))  # mu1, the constant that replaces m under fold: finetune
        self.register_buffer("fixed_deviation", torch.ones(()))  # s1
        self.register_buffer("snap_step", torch.zeros(()))  # the reader's step when the statistics became constants
        self.register_buffer("strength", torch.tensor(1.0 if paper else 0.0))  # w
        self.register_buffer("energy", torch.zeros(branches))  # G_i of the last backward pass
        self.register_buffer("energy_average", torch.zeros(branches))  # Gbar_i
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))
        # What the monitors look at once an epoch; no part of the network's state.
        self.register_buffer("deviation_range", torch.zeros(2), persistent=False)
        self.register_buffer("axis_error", torch.zeros(()), persistent=False)
        self.probe = False
        self.clear_monitors()
        self._strength = float(self.strength)  # on the host, so that forward needs no device synchronisation
        self.statistics_fixed = False
        self.observer: list[tuple[Tensor, Tensor]] | None = None

    def factors(self) -> Tensor:
        """(K,) factor of each branch: K * alpha_i, or alpha_i in the paper's form."""
        alpha = torch.softmax(self.logits.float(), 0)
        return alpha if self.paper else alpha * self.branches

    def set_strength(self, strength: float) -> None:
        """Sets w, 0 (plain fusion) to 1 (normalised); under ``backward`` it stays 0."""
        self._strength = 0.0 if self.balance == "backward" else float(strength)
        self.strength.fill_(self._strength)

    def clear_monitors(self) -> None:
        """Forgets what the monitors have seen."""
        self.deviation_range[0], self.deviation_range[1] = torch.inf, 0.0
        self.axis_error.zero_()

    @property
    def is_identity(self) -> bool:
        """Whether nothing but the branch factors is left, so that folding is exact."""
        return self._strength == 0.0 or self.statistics_fixed

    def forward(self, branches: list[Tensor]) -> Tensor:
        """K tensors (B, C_i, H, W) -> (B, sum C_i, H, W); at an Add all C_i are C, and so is the output."""
        factors = self.factors()
        scaled = [branch * factor.to(branch.dtype) for branch, factor in zip(branches, factors, strict=True)]
        if self.training and torch.is_grad_enabled():
            for index, branch in enumerate(scaled):
                if branch.requires_grad:
                    branch.register_hook(self._energy_hook(index))
        h = join(scaled, self.operation)
        if self.statistics_fixed:
            gain, shift_steps = self.constants()
            return gain * h + shift_steps * self.snap_step
        if self._strength == 0.0 and self.observer is None:
            return h
        normalised, m, s = self._normalise(h)
        if self.observer is not None:
            self.observer.append((m.mean(), s.mean()))
        if self.training:
            self._note(s.detach(), normalised.detach())
        # lerp is one pass, and exact at 0 and 1.
        return normalised if self._strength == 1.0 else torch.lerp(h, normalised.to(h.dtype), self._strength)

    @torch.no_grad()
    def _note(self, s: Tensor, normalised: Tensor) -> None:
        """Keeps for the monitors, on the device, how large s is and whether n(h) has the mean m0 over channels."""
        mean = s.mean()
        torch.minimum(self.deviation_range[0], mean, out=self.deviation_range[0])
        torch.maximum(self.deviation_range[1], mean, out=self.deviation_range[1])
        if self.probe:
            error = (normalised.float().mean(1) - self.mean).abs().mean() / self.deviation
            self.axis_error.copy_(error)

    def _normalise(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """n(h), and mean and deviation over channels at each location, (B, H, W, 1) each, in float32."""
        # A layer norm over the last dimension whose gain and shift are s0 and m0: one pass forward and one backward.
        channels = h.shape[1]
        normalised, mean, reciprocal = torch.native_layer_norm(
            h.movedim(1, h.dim() - 1).float(),  # counted from the front, as the ONNX exporter wants it
            (channels,),
            self.deviation.expand(channels),
            self.mean.expand(channels),
            STATISTICS_EPSILON,
        )
        return normalised.movedim(h.dim() - 1, 1), mean, 1 / reciprocal

    def constants(self) -> tuple[Tensor, Tensor]:
        """Under ``fold: finetune``: gain s0 / s1, and the shift m0 - mu1 * gain in whole steps of the reader's grid."""
        gain = self.deviation / self.fixed_deviation
        shift = self.mean - self.fixed_mean * gain
        return gain, torch.round(shift / self.snap_step)

    def fix_statistics(self, mean: Tensor, deviation: Tensor, step: Tensor) -> None:
        """Puts constants for the statistics (section 'Deployment' of version 2), the shift snapped to ``step``.

        Args:
            mean, deviation: averages of m and s over calibration images.
            step: step of the quantizer that reads the fused tensor; it must not change afterwards.
        """
        self.fixed_mean.copy_(mean)
        self.fixed_deviation.copy_(deviation)
        self.snap_step.copy_(step.reshape(()))
        self.statistics_fixed = True

    # --- gradient balance -------------------------------------------------------------------------------------------

    def _energy_hook(self, index: int):
        def record(gradient: Tensor) -> Tensor | None:
            # At the scaled branch: a hook on F_i itself would also see F_i's other readers. The chain rule's factor
            # K * alpha_i gives the gradient that reaches F_i through this node (eq. 7).
            self.energy[index] = torch.linalg.vector_norm(gradient.detach().float()) * self.factors()[index].detach()
            if self.balance == "backward":
                return gradient * self.gradient_factors()[index].to(gradient.dtype)
            return None

        return record

    @torch.no_grad()
    def gradient_factors(self) -> Tensor:
        """(K,) c_i of the present averages of the energies; 1 before there are any."""
        logarithm = torch.log(self.energy_average + self.epsilon)
        limit = math.log(GRADIENT_LIMIT)
        return torch.exp((logarithm.mean() - logarithm).clamp(-limit, limit))

    @torch.no_grad()
    def update_balance(self, gradient_scale: Tensor | float = 1.0) -> None:
        """One step of the controller, called after each backward pass. One that overflowed changes nothing, which is
        decided on the device.

        Args:
            gradient_scale: the loss scale of mixed precision, divided out.
        """
        energy = self.energy / gradient_scale
        valid = torch.isfinite(energy).all()
        moved = torch.where(self.updates == 0, energy, self.energy_average.lerp(energy, self.beta))
        self.energy_average.copy_(torch.where(valid, moved, self.energy_average))
        self.updates += valid
        if self.balance == "feedback":
            logarithm = torch.log(self.energy_average + self.epsilon)
            self.logits -= torch.where(valid, self.eta * (logarithm - logarithm.mean()), 0.0)

    # --- state ------------------------------------------------------------------------------------------------------

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._strength = float(self.strength)
        self.statistics_fixed = bool(self.snap_step > 0)

    def extra_repr(self) -> str:
        form = f"{self.operation}, branches={self.branches}, balance={self.balance}"
        return form + (", paper" if self.paper else "")


def fusion_nodes(model: nn.Module) -> dict[str, GABFusion]:
    """The model's fusion modules by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, GABFusion)}


def set_strength(model: nn.Module, strength: float) -> None:
    """Sets w at every fusion node."""
    for module in fusion_nodes(model).values():
        module.set_strength(strength)


def update_balance(model: nn.Module, gradient_scale: Tensor | float = 1.0) -> None:
    """One step of the controller at every fusion node, after each backward pass."""
    for module in fusion_nodes(model).values():
        module.update_balance(gradient_scale)


@torch.no_grad()
def share_energies(nodes: Iterable[GABFusion]) -> None:
    """Replaces the energies of the last backward pass by those of the whole batch, of which each process had a part.

    Squared norms add up. Each process's loss counts for all of them, as gradients are averaged afterwards, so that the
    root is divided by their number.
    """
    nodes = list(nodes)
    if not distributed.is_active() or not nodes:
        return
    squares = distributed.total(torch.cat([node.energy for node in nodes]).square())
    energies = squares.sqrt() / distributed.world_size()
    for node, energy in zip(nodes, energies.split([node.branches for node in nodes]), strict=True):
        node.energy.copy_(energy)


def strength_at(progress: float, ramp: float = 0.05, hold: float = 0.5, release: float = 0.9) -> float:
    """The strength w at ``progress`` (0..1) of the quantized epochs: up until ``ramp``, 1 until ``hold``, 0 from
    ``release``."""
    if progress >= release:
        return 0.0
    if progress < ramp:
        return progress / ramp
    if progress <= hold:
        return 1.0
    return (release - progress) / (release - hold)


def calibrate_fusion(model: nn.Module, batches: Iterable[Tensor], fix: dict[str, Tensor] | None = None) -> None:
    """Sets m0 and s0 at every fusion node from its statistics over ``batches``, or makes the statistics constant.

    Args:
        model: in eval mode.
        batches: images (B, 3, H, W), 0 to 1.
        fix: node name -> step of its reader. When given, mu1 and s1 are set instead (``fold: finetune``).
    """
    nodes = fusion_nodes(model)
    for node in nodes.values():
        node.observer = []
    with torch.no_grad():
        for images in batches:
            model(images)
    for name, node in nodes.items():
        mean = torch.stack([m for m, _ in node.observer]).mean()
        deviation = torch.stack([s for _, s in node.observer]).mean()
        node.observer = None
        if fix is not None:
            node.fix_statistics(mean, deviation, fix[name])
        elif not node.paper:
            node.mean.copy_(mean)
            node.deviation.copy_(deviation)
