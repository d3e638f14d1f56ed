"""DSQ: Differentiable Soft Quantization (arXiv 1908.05033), with zero as a code and a hard forward pass.

With t = x / D, D = (u - l) / (levels - 1), i = floor(t) and f = t - i - 1/2, the distance from the interval's middle:

    phi(f) = tanh(k f) / T,   T = tanh(k / 2) = 1 - alpha,   k = log(2 / alpha - 1)    (the paper's k times D)
    y      = l where x <= l,   u where x >= u,   D (i + (sgn(phi) + 1) / 2) = D round(t) between

The forward pass takes sgn(phi), so it is the uniform quantizer; the backward pass takes d sgn(phi) / d phi = 1, so the
gradients are those of the soft staircase. alpha is how far tanh stays below 1 at an interval's ends: 0 would be the
hard staircase, 1 a straight line. Inside the range:

    dy/dx     = (1 - tanh^2(k f)) k / (2 T)
    dy/dD     = y / D - dy/dx x / D                    the Delta term: levels and t both move with D
    dy/du     = dy/dD / (levels - 1),   dy/dl = -dy/dD / (levels - 1)
    dy/dalpha = D ((1 - tanh^2(k f)) f k' + tanh(k f) / T) / (2 T),   k' = dk/dalpha = -2 / (alpha (2 - alpha))

Outside, dy/dx = dy/dalpha = 0, and dy/dl = 1 below, dy/du = 1 above. The paper's levels are l + i D for any l. Here l
is -z D with an integer z, rounded straight through, because QuantizeLinear carries nothing else; a small move of l then
moves no level, and the term 1 - dy/dx that it has in the paper is not there.

No case distinction is needed for the sums over all values: y has degree 1 in (x, l, u) (Euler's identity, the first
line), and moving l and u together changes y only outside the range (the second):

    l dy/dl + u dy/du = y - x dy/dx =: b,     dy/dl + dy/du = 1 outside, 0 inside =: o
    dy/du = (b - l o) / (u - l),   dy/dl = (u o - b) / (u - l);   where l is a constant times u: dy/du = b / u

The mean of dy/dx over an interval is 1 for every alpha, as the staircase passes through the levels, but its root mean
square is 1.004 at alpha 0.5, 1.04 at 0.2, 1.09 at 0.1, 1.16 at 0.05 and grows without limit towards 0: one layer after
the other amplifies the gradient. A sigmoid therefore keeps alpha between 0.05 and 0.5, and what is handed on to x is
dy/dx divided by its root mean square, sqrt(k / (2 T) (1 - T^2 / 3)). Undivided, as in the paper, the gradient at the
first convolution of a small 4-bit detector was twice LSQ's.

The paper scales no gradient. Ours follow LSQ's rule (arXiv 1902.08153 section 2.2), that a parameter should move as
fast relative to itself as the weights do: g = 1 / sqrt(N Qp) for a parameter as large as D, so g Qp^2 for u, which is
Qp steps long, g Qp for l, which on SiLU is about sqrt(Qp) steps long, and g / D^2 for alpha, whose gradient is D times
a number of order 1. The parameters are u / Qp and l / Qp, so that a part of these factors is in the parametrisation and
the gradients are of the order of LSQ's, which matters where gradients are clipped by their norm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from quant import kernels
from quant.blocks import (
    Buffer,
    add_up,
    equalized,
    level,
    multiply_add,
    number,
    pieces_with_step,
    staircase,
    total,
)
from quant.layouts import dense, same_layout
from quant.primitives import (
    SMALLEST_STEP,
    Grid,
    activation_grid,
    step_gradient_scale,
    weight_grid,
)
from quant.quantizer import IntegerForm, MethodOptions, Quantizer
from quant.ranges import search_affine_range, search_symmetric_step

ALPHA_LIMITS = (0.05, 0.5)
# alpha is low + (high - low) * sigmoid(SLOPE * parameter). With a slope of 1 it would hardly ever move: the sigmoid's
# derivative, at most 1/4 of a width of 0.45, takes part twice.
SLOPE = 4.0


@dataclass
class DSQOptions(MethodOptions):
    """Options of DSQ.

    Attributes:
        paper: unsigned activations, weights on all 2**bits codes, first ranges from the extremes of the data instead of
            the smallest squared error, gradients of x, l, u and alpha neither normalised nor scaled.
        alpha: first value; the smaller, the closer is the soft staircase to the hard one.
        learn_alpha: whether it is learned; false keeps that value.
    """

    alpha: float = 0.2
    learn_alpha: bool = True

    def validate(self) -> None:
        low, high = ALPHA_LIMITS
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, (int, float)) or not low < self.alpha < high:
            raise ValueError(f"alpha: {self.alpha!r} is not a number between {low} and {high}")


class DSQ(Quantizer):
    """Uniform quantizer trained through a soft staircase.

    Args: see ``Quantizer``; ``options`` is a ``DSQOptions``. Parameters are ``upper`` (channels,) or (1,), if affine
    ``lower`` (1,), and ``alpha_logit`` (1,), a buffer where alpha is not learned. The range in use is u = qmax |upper|
    and l = -qmax |lower|, so l <= 0 <= u after any update, or l = qmin |upper| where there is no ``lower``; the step is
    D = |upper| + |lower|.
    """

    any_precision = True
    takes_factors = True
    Options = DSQOptions

    def __init__(
        self, bits: int, grid: Grid, scheme: str, channels: int | None = None, options: DSQOptions | None = None
    ) -> None:
        super().__init__(bits, grid, scheme, channels)
        options = options or DSQOptions()
        self.paper = options.paper
        self.upper = nn.Parameter(torch.ones(channels or 1))
        self.lower = nn.Parameter(torch.zeros(1)) if scheme == "affine" else None
        share = (options.alpha - ALPHA_LIMITS[0]) / (ALPHA_LIMITS[1] - ALPHA_LIMITS[0])
        logit = torch.full((1,), math.log(share / (1 - share)) / SLOPE)
        if options.learn_alpha:
            self.alpha_logit = nn.Parameter(logit)
        else:
            self.register_buffer("alpha_logit", logit)

    @classmethod
    def for_weights(cls, bits: int, channels: int | None, options: DSQOptions) -> DSQ:
        """Symmetric on the narrow grid (l = -u), or on all 2**bits codes under ``options.paper``."""
        grid = activation_grid(bits, "signed") if options.paper else weight_grid(bits)
        return cls(bits, grid, "signed", channels, options)

    @classmethod
    def for_activations(cls, bits: int, scheme: str, options: DSQOptions) -> DSQ:
        scheme = "unsigned" if options.paper else scheme
        return cls(bits, activation_grid(bits, scheme), scheme, None, options)

    def alpha(self) -> Tensor:
        """alpha in use, (1,), inside ``ALPHA_LIMITS``."""
        return _alpha(self.alpha_logit)

    def _step_and_zero_point(self) -> tuple[Tensor, Tensor | None]:
        """D, never under ``SMALLEST_STEP``, and the zero point, an integer in 0 .. qmax, (1,), or None for 0."""
        if self.lower is None:
            return self.upper.abs().clamp_min(SMALLEST_STEP), None
        lower = self.lower.abs()
        step = (self.upper.abs() + lower).clamp_min(SMALLEST_STEP)
        return step, torch.round(lower / step * self.grid.qmax)

    def current_step(self) -> Tensor:
        return self._step_and_zero_point()[0]

    def set_range(self, x: Tensor) -> None:
        if self.scheme == "affine":
            step, zero_point = search_affine_range(x, self.grid, self.range_rule)
            share = zero_point / self.grid.qmax
            self.lower.copy_(-share * step)
            self.upper.copy_((1 - share) * step)
        elif self.paper:
            self.upper.copy_(self._extreme_step(x.reshape(self.channels or 1, -1)))
        else:
            self.upper.copy_(search_symmetric_step(x, self.grid, self.channels, self.range_rule))

    def _extreme_step(self, rows: Tensor) -> Tensor:
        """The smallest steps with which no value of a row is clipped (an unsigned grid clips negative values)."""
        step = rows.amax(1).clamp_min(0) / self.grid.qmax
        return step if self.grid.qmin == 0 else torch.maximum(step, rows.amin(1) / self.grid.qmin)

    def quantize(self, x: Tensor, factors: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            step, zero_point = self._step_and_zero_point()
        scale = None
        if not self.paper:
            samples = 1 if self.channels else max(x.shape[0], 1)
            scale = step_gradient_scale(x.numel() // ((self.channels or 1) * samples), self.grid.qmax)
        parameters = self.lower, self.upper, self.alpha_logit
        return _SoftStaircase.apply(x, *parameters, step, zero_point, self.grid, scale, factors)

    @torch.no_grad()
    def integer(self) -> IntegerForm:
        step, zero_point = self._step_and_zero_point()
        return IntegerForm(step.clone(), 0 if zero_point is None else round(float(zero_point)), self.grid)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, alpha {'learned' if self.alpha_logit.requires_grad else 'fixed'}"


class _SoftStaircase(torch.autograd.Function):
    """Hard staircase forward, soft staircase backward; the formulas stand at the top of this file.

    Inputs: x; the parameters ``lower`` (1,) or None, ``upper`` (R,), one value or one a row of x's dimension 0, and
    ``alpha_logit`` (1,); D (R,) and zero point (1,) or None, which follow from them; the grid; LSQ's gradient scale, or
    None to scale no gradient; factors of x's channels, or None.
    """

    @staticmethod
    def forward(ctx, x, lower, upper, alpha_logit, step, zero_point, grid, scale, factors):
        x = dense(x)
        zero = 0 if zero_point is None else zero_point
        y = staircase(x, step, grid.qmin - zero, grid.qmax - zero, factors)
        kept = y if y.dtype is torch.float32 else None  # a shortened one is made again
        ctx.save_for_backward(x, kept, lower, upper, alpha_logit, step, zero_point)
        ctx.grid, ctx.scale, ctx.factors = grid, scale, factors
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, y, lower, upper, alpha_logit, step, zero_point = ctx.saved_tensors
        grid, learned = ctx.grid, ctx.needs_input_grad[3]
        low = grid.qmin - (0 if zero_point is None else number(zero_point))
        curve = _Curve(number(_alpha(alpha_logit)), low, grid.levels - 1, lower is not None, learned)
        if ctx.scale is not None:
            curve.normalise()
        gradient_x, moved, outside, slope, bend = curve.apply(step, same_layout(gradient, x), x, y, ctx.factors)
        distance = number(step)
        gradient_upper = (moved - low * distance * outside) / (distance * grid.qmax)
        gradient_lower, gradient_alpha = outside - gradient_upper, curve.alpha_gradient(slope, bend)
        upper_scale = lower_scale = 1.0 / grid.qmax
        alpha_scale = distance
        if ctx.scale is not None:
            mean = number(step.mean())  # dividing twice: the square of a step of 1e30 would overflow
            upper_scale, lower_scale = ctx.scale * grid.qmax, ctx.scale
            alpha_scale = distance / mean * (ctx.scale / mean)
        return (
            gradient_x,
            None if lower is None else _through_magnitude(lower, gradient_lower * lower_scale, negative=True),
            _through_magnitude(upper, gradient_upper * upper_scale),
            _through_sigmoid(alpha_logit, gradient_alpha * alpha_scale) if learned else None,
            *[None] * 5,
        )


class _Curve:
    """The derivatives of the soft staircase, for one block of values after another.

    Args:
        alpha: a number, or (1,) on an accelerator.
        low: smallest code less the zero point, a number or (1,).
        intervals: number of levels less 1.
        affine: whether the sum of the gradients outside the range is wanted, else it is 0.
        learned: whether the two sums for alpha's gradient are wanted, else they are 0.
    """

    def __init__(self, alpha: Tensor | float, low: Tensor | float, intervals: int, affine: bool, learned: bool) -> None:
        self.alpha, self.low, self.intervals, self.affine, self.learned = alpha, low, intervals, affine, learned
        self.k = torch.log(2 / alpha - 1) if isinstance(alpha, Tensor) else math.log(2 / alpha - 1)
        self.gain = self.k / (2 * (1 - alpha))  # dy/dx in the middle of an interval
        self.divisor = 1.0
        self.buffers: list[Tensor] = []
        self.buffer = Buffer()

    def normalise(self) -> None:
        """From now on the gradient of x is divided by the root mean square of dy/dx; the sums stay as they are."""
        self.divisor = (self.gain * (1 - (1 - self.alpha) ** 2 / 3)) ** 0.5

    def apply(self, step: Tensor, gradient: Tensor, x: Tensor, y: Tensor | None, factors: Tensor | None) -> tuple:
        """The gradient of ``x`` and the four sums of ``backward`` for the whole tensor, one each or R."""
        if kernels.active(x, step):
            scale = (self.gain / self.divisor, self.divisor)
            scale = torch.cat([torch.as_tensor(value, device=x.device).reshape(1) for value in scale])
            gradient_x, moved, outside, *others = kernels.run(
                kernels.soft_backward,
                [gradient, x],
                step,
                self.low,
                self.low + self.intervals,
                self.k,
                scale,
                factors=factors,
            )
            return gradient_x, moved, outside if self.affine else 0.0, *others
        x = equalized(x, factors)
        gradient_x = torch.empty_like(x)
        views = pieces_with_step(step, x, x if y is None else y, gradient, gradient_x)
        parts = [self.backward(*view, remake=y is None) for view in views]
        return equalized(gradient_x, factors), *add_up(parts, step.numel())

    def backward(
        self, step: Tensor | float, x: Tensor, y: Tensor, gradient: Tensor, out: Tensor, remake: bool = False
    ) -> tuple:
        """Writes the gradient of ``x`` to ``out``; returns four sums, each a number, a scalar or one a row, (r,).

        They are b and o of the file's top and two for ``alpha_gradient``, all times the gradient. With ``remake`` what
        ``y`` holds is not looked at.
        """
        x, gradient, target, out = x.float(), gradient.float(), out, self.buffer.like(out)
        if not self.buffers:
            self.buffers = [torch.empty_like(x) for _ in range(2)]
        t, soft = (buffer[: len(x)] for buffer in self.buffers)
        if remake:
            y = level(x, step, self.low, self.low + self.intervals, soft)
        moved = total(gradient, y)  # early, while the gradient is in the cache
        multiply_add(-self.low, x, 1 / step, t)  # from 0 to the number of intervals inside the range
        torch.ops.aten.hardtanh_backward.grad_input(gradient, t, 0, self.intervals, grad_input=out)  # 0 outside
        nothing = x.new_zeros(len(x)) if x.dim() == 2 else 0.0
        outside = total(gradient) - total(out) if self.affine else nothing
        multiply_add(-self.k / 2, t.frac_(), self.k, t)  # k f
        torch.tanh(t, out=soft)
        bend = total(out, soft) if self.learned else nothing
        torch.ops.aten.tanh_backward.grad_input(out, soft, grad_input=out).mul_(self.gain / self.divisor)
        slope = total(out, t) * self.divisor if self.learned else nothing
        moved = moved - total(out, x) * self.divisor
        if out is not target:
            target.copy_(out)
        return moved, outside, slope, bend

    def alpha_gradient(self, slope: Tensor | float, bend: Tensor | float) -> Tensor | float:
        """The gradient of alpha over D: ``slope`` sums dy/dx k f, ``bend`` tanh(k f), both times the gradient of y."""
        change = -2 / (self.alpha * (2 - self.alpha))  # k'
        return slope * change / self.k**2 + bend / (2 * (1 - self.alpha) ** 2)


def _alpha(logit: Tensor) -> Tensor:
    low, high = ALPHA_LIMITS
    return low + (high - low) * torch.sigmoid(SLOPE * logit)


def _through_magnitude(parameter: Tensor, gradient: Tensor | float, negative: bool = False) -> Tensor:
    """The gradient of ``parameter`` from that of its magnitude, or with ``negative`` of minus its magnitude.

    At 0 it is that of the allowed side: with a gradient of 0 there, as abs() has, a lower end at 0 would stay.
    """
    gradient = torch.zeros_like(parameter) + gradient
    return torch.where(parameter > 0 if negative else parameter < 0, -gradient, gradient)


def _through_sigmoid(logit: Tensor, gradient: Tensor | float) -> Tensor:
    """The gradient of ``logit`` from that of alpha, one value or one a row."""
    low, high = ALPHA_LIMITS
    alpha = _alpha(logit)
    gradient = gradient.sum() if isinstance(gradient, Tensor) else gradient
    return (alpha - low) * (high - alpha) / (high - low) * SLOPE * gradient
