"""PACT: Parameterized Clipping Activation (arXiv 1805.06085), two-sided for SiLU, with its statistics-aware weights.

Activations, as the paper has them (unsigned, Qp = 2**bits - 1):

    y  = clip(x, 0, alpha),   yq = round(y / s) * s,   s = alpha / Qp             (eq. 1 and 2)
    dyq/dalpha = 1 where x >= alpha, else 0: nothing inside the range             (eq. 3)
    dyq/dx     = 1 where 0 < x < alpha, else 0
    loss       = task + penalty * alpha**2                                        (section 3.1)

Two-sided (``affine``, the default), because SiLU is negative down to -0.2785: a second learned clip, lower >= 0,

    s = (alpha + lower) / (2**bits - 1),   z = round(lower / s)
    yq = s * clip(round(x / s), -z, 2**bits - 1 - z)
    dyq/dlower = -1 where x <= -z * s, else 0

that is, the range [-lower, alpha] is moved by less than half a step so that zero is a code and z an integer, which is
what QuantizeLinear carries. The step depends on neither rounding nor z: when z changes, codes inside the range keep
their values. In both forms the gradients are those of the clip; rounding passes them straight through.

Weights: ``sawb`` (default) is the symmetric grid with the statistics-aware clip of PACT-SAWB (Choi et al., "Accurate
and Efficient 2-bit Quantized Neural Networks", MLSys 2019); ``dorefa`` is the paper's own choice, DoReFa
(arXiv 1606.06160 eq. 9). Neither has a parameter: both clips are computed from the weights in every forward pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from quant import kernels
from quant.blocks import Buffer, add_up, equalized, inside_gradient, number, pieces, staircase, total
from quant.layouts import dense, same_layout
from quant.primitives import (
    SMALLEST_STEP,
    Grid,
    activation_grid,
    from_codes,
    per_channel,
    to_codes,
    to_odd_codes,
    weight_grid,
)
from quant.quantizer import IntegerForm, MethodOptions, Quantizer
from quant.ranges import search_affine_range, search_symmetric_step

# The paper starts alpha at 10 on CIFAR-10 (figure 2): larger than any typical activation, so that nothing is clipped.
PAPER_CLIP = 10.0
# Its penalty has the factor of its weight decay, 2e-4 there.
PAPER_PENALTY = 2e-4
# Ours is smaller: where ranges are searched on data, few values are clipped (1 % at 4 bit) and the task's gradient for
# alpha is small. In the first 40 steps of a yolov5n the penalty's gradient is at this factor a quarter of the task's
# (median of 51 activation quantizers); at the paper's factor it is 50 times the task's.
DEFAULT_PENALTY = 1e-6


@dataclass
class PACTOptions(MethodOptions):
    """Options of ``pact``.

    Attributes:
        weights: ``sawb``, ``dorefa`` (up to 7 bits; wider weights take ``sawb``), or ``auto``: sawb, dorefa under
            ``paper``.
        penalty: factor of the L2 penalty on both clips, which get no weight decay besides; 0 switches it off. None
            takes 1e-6, under ``paper`` 2e-4.
        initial_clip: first alpha; 0 searches it (smallest mean squared error), under ``paper`` 0 stands for 10.
    """

    weights: str = "auto"
    penalty: float | None = None
    initial_clip: float = 0.0

    def validate(self) -> None:
        if self.weights not in ("auto", "sawb", "dorefa"):
            raise ValueError(f"weights: {self.weights!r} is not possible; choose one of auto, sawb, dorefa")
        for name in ("penalty", "initial_clip"):
            value = getattr(self, name)
            if name == "penalty" and value is None:
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0 <= value < math.inf:
                raise ValueError(f"{name}: {value!r} is not a number from 0 on")

    def penalty_factor(self) -> float:
        """``penalty`` with None replaced."""
        if self.penalty is None:
            return PAPER_PENALTY if self.paper else DEFAULT_PENALTY
        return float(self.penalty)

    def weight_method(self) -> str:
        """``weights`` with ``auto`` replaced."""
        return ("dorefa" if self.paper else "sawb") if self.weights == "auto" else self.weights


class _ClippedFakeQuantize(torch.autograd.Function):
    """Fake quantization with the gradients of the clip for x, the upper and the lower limit (formulas on top)."""

    @staticmethod
    def forward(ctx, x, upper, lower, step, zero_point, qmin, qmax, factors):
        x = dense(x)
        if lower is None:  # dy/dupper below is qmin / qmax: 0 unsigned, about -1 for a signed grid
            low, high = upper * (qmin / qmax), upper
        else:
            qmin, qmax = qmin - zero_point, qmax - zero_point
            low, high = qmin * step, qmax * step
        # The output is not saved: the boundaries say all that the gradients need.
        ctx.save_for_backward(x, low, high)
        ctx.two_sided, ctx.ratio = lower is not None, 0.0 if lower is not None else qmin / qmax
        ctx.factors = factors
        return staircase(x, step, qmin, qmax, factors)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, low, high = ctx.saved_tensors
        gradient = same_layout(gradient, x)
        if kernels.active(x, low):
            gradient_x, above, below = kernels.run(
                kernels.clipped_backward, [gradient, x], low, high, factors=ctx.factors
            )
        else:
            gradient_x, above, below = _clipped_backward(gradient, equalized(x, ctx.factors), low, high)
            gradient_x = equalized(gradient_x, ctx.factors)
        gradient_upper = torch.zeros_like(high) + (above if ctx.two_sided else above + below * ctx.ratio)
        gradient_lower = torch.zeros_like(high) - below if ctx.two_sided else None
        return gradient_x, gradient_upper, gradient_lower, *[None] * 5


def _clipped_backward(
    gradient: Tensor, x: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor | float, Tensor | float]:
    """What ``kernels.clipped_backward`` computes, piece by piece."""
    gradient_x, buffer, sums = torch.empty_like(x), Buffer(), []
    for g, values, out in pieces(gradient, x, gradient_x):
        g, values, inside = g.float(), values.float(), buffer.like(out)
        inside_gradient(g, values, number(low), number(high), inside)
        above = _sum_above(g, values, high)
        sums.append((above, total(g) - total(inside) - above))
        if inside is not out:
            out.copy_(inside)
    return gradient_x, *add_up(sums, 1)


def _sum_above(gradient: Tensor, x: Tensor, limit: Tensor) -> Tensor | float:
    """Sum of ``gradient`` where ``x >= limit`` (one value)."""
    if x.device.type == "cpu":  # one fused pass; it compares with >, so the limit moves down by one float
        just_below = torch.nextafter(limit, torch.full_like(limit, -math.inf)).item()
        return total(torch.ops.aten.threshold_backward(gradient, x, just_below))
    return (gradient * (x >= limit)).sum()


def _magnitude(parameter: Tensor, least: float) -> Tensor:
    """``max(|parameter|, least)``, through whose floor the gradient passes.

    ``clamp`` and ``abs`` have no gradient below the floor and at 0, where a clip would stay for ever.
    """
    magnitude = torch.where(parameter < 0, -parameter, parameter)
    return magnitude + (magnitude.clamp_min(least) - magnitude).detach()


class PACT(Quantizer):
    """Activation quantizer with a learned clip, or two under the ``affine`` scheme.

    Args:
        bits, grid, scheme: see ``Quantizer``. Under ``signed`` one alpha clips both sides, at ``alpha`` and at
            ``alpha * qmin / qmax``, and its gradient has both.
        options: penalty and first clip.

    Parameters are ``alpha`` (1,) and, if affine, ``lower`` (1,): magnitudes, so no update can turn a clip over.
    """

    any_precision = True
    takes_factors = True
    Options = PACTOptions

    def __init__(self, bits: int, grid: Grid, scheme: str, options: PACTOptions | None = None) -> None:
        super().__init__(bits, grid, scheme)
        options = options or PACTOptions()
        self.decay = options.penalty_factor()
        self.initial_clip = float(options.initial_clip) or (PAPER_CLIP if options.paper else 0.0)
        self.alpha = nn.Parameter(torch.ones(1))
        self.lower = nn.Parameter(torch.zeros(1)) if scheme == "affine" else None

    @classmethod
    def for_weights(cls, bits: int, channels: int | None, options: PACTOptions) -> Quantizer:
        """``DoReFa`` if the options say so and its grid fits int8, else ``SAWB``."""
        if options.weight_method() == "dorefa" and bits <= 7:
            limit = 2**bits - 1
            return DoReFa(bits, Grid(-limit, limit), "signed", channels)
        return SAWB(bits, weight_grid(bits), "signed", channels)

    @classmethod
    def for_activations(cls, bits: int, scheme: str, options: PACTOptions) -> Quantizer:
        scheme = "unsigned" if options.paper else scheme
        return cls(bits, activation_grid(bits, scheme), scheme, options)

    @property
    def _span(self) -> int:
        """Steps between zero and alpha, or between the two clips."""
        return self.grid.levels - 1 if self.scheme == "affine" else self.grid.qmax

    def clips(self) -> tuple[Tensor, Tensor | None]:
        """The clips in use, both as magnitudes (1,): upper, positive; lower, not negative, None unless affine."""
        upper = _magnitude(self.alpha, self._span * SMALLEST_STEP)
        return upper, None if self.lower is None else _magnitude(self.lower, 0.0)

    @torch.no_grad()
    def _step_and_zero_point(self, upper: Tensor, lower: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if lower is None:
            return (upper / self._span).clamp_min(SMALLEST_STEP), None
        step = ((upper + lower) / self._span).clamp_min(SMALLEST_STEP)
        zero_point = (torch.round(lower / step) + self.grid.qmin).clamp(self.grid.qmin, self.grid.qmax)
        return step, zero_point

    def current_step(self) -> Tensor:
        return self._step_and_zero_point(*self.clips())[0]

    def set_range(self, x: Tensor) -> None:
        if self.lower is None:
            upper = search_symmetric_step(x, self.grid, None, self.range_rule) * self.grid.qmax
        else:
            step, zero_point = search_affine_range(x, self.grid, self.range_rule)
            upper = (self.grid.qmax - zero_point) * step
            self.lower.copy_((zero_point - self.grid.qmin) * step)
        self.alpha.copy_(torch.full_like(upper, self.initial_clip) if self.initial_clip else upper)

    def quantize(self, x: Tensor, factors: Tensor | None = None) -> Tensor:
        upper, lower = self.clips()
        step, zero_point = self._step_and_zero_point(upper, lower)
        return _ClippedFakeQuantize.apply(x, upper, lower, step, zero_point, self.grid.qmin, self.grid.qmax, factors)

    def penalty(self) -> Tensor | None:
        """``penalty * (alpha**2 + lower**2)``, a scalar; None if the factor is 0."""
        if not self.decay:
            return None
        squares = self.alpha.square() if self.lower is None else self.alpha.square() + self.lower.square()
        return squares.sum() * self.decay

    @torch.no_grad()
    def integer(self) -> IntegerForm:
        step, zero_point = self._step_and_zero_point(*self.clips())
        return IntegerForm(step.clone(), 0 if zero_point is None else round(float(zero_point)), self.grid)


# bits -> (c1, c2, least): alpha = c1 * rms + c2 * mean|w|, at least ``least`` * rms and at most max|w|.
# c1 and c2 are the least-squares solution of alpha* / rms = c1 + c2 * mean|w| / rms over the normal, logistic, Laplace
# and Student's t (5 degrees of freedom) distributions, each as its 16,384 quantiles (i + 1/2) / 16,384, with alpha* the
# clip of the smallest mean squared error on the narrow grid. ``least`` is alpha* / rms of the uniform distribution, the
# flattest, at 2 and 3 bits, and of the normal one from 4 bits on, where too wide a clip costs little (it ends at
# max|w|) and too narrow a one much. Error against a search for each channel's best clip, on the weights of two trained
# yolov5n: 1.00 to 1.03 times at 2 and 3 bits, 1.08 at 4, at most 1.2 at 8.
SAWB_COEFFICIENTS = {
    2: (2.733, -1.917, 1.155),
    3: (6.590, -5.785, 1.485),
    4: (11.614, -11.336, 2.474),
    5: (17.751, -18.368, 2.897),
    6: (24.615, -26.351, 3.262),
    7: (32.000, -35.031, 3.580),
    8: (36.200, -39.828, 3.854),
}


def statistics_aware_clip(weight: Tensor, bits: int, channels: int | None) -> Tensor:
    """SAWB's clip ``c1 * sqrt(E[w**2]) + c2 * E|w|`` within the limits of ``SAWB_COEFFICIENTS``.

    Args:
        weight: (O, ...) float32.
        bits: 2 to 8.
        channels: O for a clip each, or None for one clip of all weights.

    Returns:
        Clips (channels,) or (1,), not negative and finite even where squares overflow or underflow.
    """
    magnitudes = weight.reshape(channels or 1, -1).abs()
    first, second, least = SAWB_COEFFICIENTS[bits]
    root_mean_square = magnitudes.square().mean(1).sqrt()
    clip = first * root_mean_square + second * magnitudes.mean(1)
    return torch.maximum(clip, least * root_mean_square).minimum(magnitudes.amax(1))


class _StraightThrough(torch.autograd.Function):
    """Codes times step forward; the gradient passes to every weight unchanged, clipped ones too."""

    @staticmethod
    def forward(ctx, weight, step, grid):
        return from_codes(to_codes(weight, step, 0, grid), step, 0)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None, None


class SAWB(Quantizer):
    """Weights on the narrow symmetric grid, clipped at ``statistics_aware_clip``; nothing to learn but the weights.

    The gradient of the clip is left out and that of rounding and clipping is 1, for weights beyond the clip too: they
    would otherwise stay where they are, since no step grows to meet them.

    Attributes:
        step: buffer (channels,) or (1,): the step of the latest forward pass, which ``integer`` returns.
    """

    def __init__(self, bits: int, grid: Grid, scheme: str, channels: int | None = None) -> None:
        super().__init__(bits, grid, scheme, channels)
        self.register_buffer("step", torch.ones(channels or 1))

    def set_range(self, x: Tensor) -> None:
        clip = statistics_aware_clip(x, self.bits, self.channels)
        self.step.copy_((clip / self.grid.qmax).clamp_min(SMALLEST_STEP))

    def quantize(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.set_range(x)
        return _StraightThrough.apply(x, per_channel(self.step, x), self.grid)

    def current_step(self) -> Tensor:
        return self.step

    def integer(self) -> IntegerForm:
        return IntegerForm(self.step.clone(), 0, self.grid)


@dataclass(frozen=True)
class TanhForm(IntegerForm):
    """The half-level form of weights that are rounded after a tanh.

    Attributes:
        code_step: half the distance of two levels in the domain of tanh(w), one or one a channel.
    """

    code_step: Tensor | None = None

    def codes(self, x: Tensor) -> Tensor:
        """Odd codes of the weights ``x`` (O, ...)."""
        return to_odd_codes(torch.tanh(x), per_channel(self.code_step, x), self.grid)


class _TanhGradient(torch.autograd.Function):
    """Returns ``values``; its gradient for the weights is ``slope * (1 - tanh(w)**2)``."""

    @staticmethod
    def forward(ctx, weight, values, slope):
        ctx.save_for_backward(weight, slope)
        return values

    @staticmethod
    def backward(ctx, gradient):
        weight, slope = ctx.saved_tensors
        return gradient * (1 - torch.tanh(weight).square()) * slope, None, None


class DoReFa(Quantizer):
    """Weights normalised by tanh on the half-level grid of 2**bits levels, which has no zero (arXiv 1606.06160 eq. 9).

        t = tanh(w) / max|tanh(w)|,   c = 2 * round((2**bits - 1) * (t + 1) / 2) - (2**bits - 1)
        y = step * c,   step = <w, c> / <c, c>
        dy/dw = step * (2**bits - 1) * (1 - tanh(w)**2) / max|tanh(w)|

    DoReFa's own y = c / (2**bits - 1) has lost the scale of the weights, which only a batch norm behind gives back; the
    least-squares step keeps it. The gradient is DoReFa's: straight through the rounding, through the tanh, with step
    and maximum as constants; it is 1 for small weights whose step reproduces them.

    Attributes:
        step, code_step: buffers (channels,) or (1,) of the latest forward pass, which ``integer`` returns.
    """

    def __init__(self, bits: int, grid: Grid, scheme: str, channels: int | None = None) -> None:
        super().__init__(bits, grid, scheme, channels)
        self.register_buffer("step", torch.ones(channels or 1))
        self.register_buffer("code_step", torch.ones(channels or 1))

    def set_range(self, x: Tensor) -> None:
        largest = torch.tanh(x).reshape(self.channels or 1, -1).abs().amax(1)
        self.code_step.copy_((largest / self.grid.qmax).clamp_min(SMALLEST_STEP))
        rows, codes = (values.reshape(self.channels or 1, -1) for values in (x, self.integer().codes(x)))
        # Codes have the sign of their weight and are never 0, so both sums are positive.
        step = (rows * codes).sum(1) / codes.square().sum(1)
        self.step.copy_(step.clamp_min(SMALLEST_STEP))

    def quantize(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.set_range(x)
            form = self.integer()
            values = form.values(form.codes(x))
            slope = per_channel(form.step / form.code_step, x)
        return _TanhGradient.apply(x, values, slope)

    def current_step(self) -> Tensor:
        return self.step

    def integer(self) -> IntegerForm:
        return TanhForm(self.step.clone(), 0, self.grid, odd=True, code_step=self.code_step.clone())
