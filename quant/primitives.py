"""Stateless arithmetic of uniform fake quantization: grids, codes, straight-through gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from quant import kernels
from quant.blocks import (
    Buffer,
    add_up,
    difference,
    equalized,
    inside_gradient,
    level,
    number,
    pieces_with_step,
    staircase,
    total,
)
from quant.layouts import dense, same_layout

# The smallest step a quantizer may use. Steps of real layers lie between 1e-4 (8-bit weights of a weak channel) and 1.
SMALLEST_STEP = 2.0**-20


@dataclass(frozen=True)
class Grid:
    """The integer codes ``qmin .. qmax`` of a uniform quantizer."""

    qmin: int
    qmax: int

    @property
    def levels(self) -> int:
        """Number of codes."""
        return self.qmax - self.qmin + 1


def weight_grid(bits: int) -> Grid:
    """The narrow symmetric grid ``-(2**(bits-1) - 1) .. 2**(bits-1) - 1``.

    It is narrow so that a code can change its sign, which folding a batch norm with negative gamma asks for.
    """
    limit = 2 ** (bits - 1) - 1
    return Grid(-limit, limit)


def activation_grid(bits: int, scheme: str) -> Grid:
    """Codes of an activation grid: ``affine`` and ``unsigned`` count from 0, ``signed`` is two's complement."""
    if scheme == "signed":
        return Grid(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return Grid(0, 2**bits - 1)


def round_ste(x: Tensor) -> Tensor:
    """Rounds half to even, as ONNX's QuantizeLinear does; the gradient is the identity (straight-through estimator)."""
    return x + (torch.round(x) - x).detach()


def step_gradient_scale(count: int, qmax: int) -> float:
    """LSQ's gradient scale ``1 / sqrt(N * Qp)`` (arXiv 1902.08153 section 2.2).

    Args:
        count: N, the number of values that share the step (of one image, for activations: the scale must not depend on
            the batch size).
        qmax: Qp, the largest code.
    """
    return 1.0 / math.sqrt(max(count, 1) * max(qmax, 1))


def to_codes(x: Tensor, step: Tensor, zero_point: Tensor | int, grid: Grid) -> Tensor:
    """Codes ``clip(round(x / step) + zero_point, qmin, qmax)`` as a float tensor of ``x``'s shape.

    The order (divide, round half to even, add, clip) is that of ONNX's QuantizeLinear; multiplying by ``1 / step``
    instead would move values that lie on a rounding boundary.
    """
    return (torch.round(x / step) + zero_point).clamp(grid.qmin, grid.qmax)


def to_odd_codes(x: Tensor, step: Tensor, grid: Grid) -> Tensor:
    """Codes of a half-level grid, ``clip(2 * round((x / step - 1) / 2) + 1, qmin, qmax)``: odd integers, no zero.

    Args:
        step: half the distance of two neighbouring levels.
        grid: odd limits, e.g. -15 .. 15 for the 16 levels of 4 bits.
    """
    return (torch.round((x / step - 1) / 2) * 2 + 1).clamp(grid.qmin, grid.qmax)


def from_codes(codes: Tensor, step: Tensor, zero_point: Tensor | int) -> Tensor:
    """Values ``(codes - zero_point) * step``."""
    return (codes - zero_point) * step


def per_channel(values: Tensor, like: Tensor) -> Tensor:
    """Reshapes a vector of C values so that it broadcasts along dimension 0 of ``like``; one value stays as it is."""
    return values if values.numel() == 1 else values.reshape(-1, *([1] * (like.dim() - 1)))


class _UniformFakeQuantize(torch.autograd.Function):
    """Fake quantization whose step and zero point learn by LSQ's gradients.

    With v = x / s, forward ``y = s * clip(round(v), qmin - z, qmax - z)``. Gradients (arXiv 1902.08153 eq. 3 and 5,
    with the zero point of LSQ+, arXiv 2004.09576):
        dy/dx = 1 inside the range, 0 outside
        dy/ds = round(v) - v inside, qmin - z below, qmax - z above
        dy/dz = 0 inside, -s outside
    Inside, dy/ds is (y - x) / s and outside it is y / s, so the sum over all values is (<g, y> - <dx, x>) / s: two dot
    products instead of the half-dozen full-size temporaries of the case distinction.
    """

    @staticmethod
    def forward(ctx, x, step, zero_point, grid, gradient_scale, keep_output, factors):
        x = dense(x)
        divisor, zero = usable_step(step), usable_zero_point(zero_point, grid)
        ctx.low, ctx.high, ctx.divisor, ctx.scale = grid.qmin - zero, grid.qmax - zero, divisor, gradient_scale
        ctx.factors = factors
        y = staircase(x, divisor, ctx.low, ctx.high, factors)
        # The convolution behind keeps a float32 y anyway. One that was shortened would spoil y - x, and what follows an
        # output quantizer may overwrite it: it is then made again.
        keep_output = keep_output and y.dtype is torch.float32 and not kernels.active(x, divisor)
        ctx.save_for_backward(x, y if keep_output else None, step, zero_point)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, y, step, zero_point = ctx.saved_tensors
        divisor, affine = ctx.divisor, zero_point is not None
        gradient_x, (by_step, outside) = _uniform_backward(
            same_layout(gradient, x), x, y, divisor, ctx.low, ctx.high, affine, ctx.factors
        )
        gradient_step = _through_magnitude(by_step / divisor * ctx.scale, step)
        gradient_zero_point = None
        if affine:
            moved = -divisor * outside * ctx.scale
            gradient_zero_point = (
                moved.reshape(zero_point.shape) if isinstance(moved, Tensor) else torch.full_like(zero_point, moved)
            )
        return gradient_x, gradient_step, gradient_zero_point, *[None] * 4


def _through_magnitude(gradient: Tensor | float, step: Tensor) -> Tensor:
    """The gradient of ``step`` from that of ``usable_step``: its sign, or nothing under the floor."""
    if isinstance(gradient, Tensor):
        return gradient.reshape(step.shape) * step.sign() * (step.abs() >= SMALLEST_STEP)
    value = step.item()
    return torch.full_like(step, math.copysign(1.0, value) * gradient if abs(value) >= SMALLEST_STEP else 0.0)


def usable_step(step: Tensor) -> Tensor | float:
    """The magnitude of ``step``, never under ``SMALLEST_STEP``, so that no update can turn it over."""
    step = number(step)
    if isinstance(step, Tensor):
        return step.abs().clamp_min(SMALLEST_STEP)
    return step if step != step else max(abs(step), SMALLEST_STEP)  # NaN stays


def usable_zero_point(zero_point: Tensor | None, grid: Grid) -> Tensor | float:
    """``zero_point`` rounded and inside ``grid``, or 0 for None."""
    zero_point = 0 if zero_point is None else number(zero_point)
    if isinstance(zero_point, Tensor):
        return zero_point.clamp(grid.qmin, grid.qmax).round()
    return float(round(min(max(zero_point, grid.qmin), grid.qmax))) if zero_point == zero_point else zero_point


def _uniform_backward(
    gradient: Tensor,
    x: Tensor,
    y: Tensor | None,
    step: Tensor | float,
    low: Tensor | float,
    high: Tensor | float,
    affine: bool,
    factors: Tensor | None,
) -> tuple[Tensor, Iterator[Tensor | float]]:
    """The gradient of x, and one or R sums: of dL/ds times s, and of the gradient outside the range if ``affine`` (else
    anything)."""
    if kernels.active(x, step):
        gradient_x, *sums = kernels.run(kernels.uniform_backward, [gradient, x], step, low, high, factors=factors)
        return gradient_x, (number(value) for value in sums)
    x = equalized(x, factors)
    gradient_x, buffer, sums = torch.empty_like(x), Buffer(), []
    for divisor, g, values, made, out in pieces_with_step(step, gradient, x, x if y is None else y, gradient_x):
        g, values, inside = g.float(), values.float(), buffer.like(out)
        if y is None:
            made = level(values, divisor, low, high, torch.empty_like(values))
        inside_gradient(g, values, low * divisor, high * divisor, inside)
        by_step = difference(g, made, inside, values)
        sums.append((by_step, total(g) - total(inside) if affine else by_step))
        if inside is not out:
            out.copy_(inside)
    return equalized(gradient_x, factors), add_up(sums, step.numel() if isinstance(step, Tensor) else 1)


def uniform_fake_quantize(
    x: Tensor,
    step: Tensor,
    zero_point: Tensor | None,
    grid: Grid,
    gradient_scale: float = 1.0,
    keep_output: bool = True,
    factors: Tensor | None = None,
) -> Tensor:
    """Quantizes ``x`` to ``grid`` and back, with LSQ's gradients for ``x``, ``step`` and ``zero_point``.

    Args:
        x: values of any shape.
        step: one value, or one for each row of dimension 0. Its magnitude is used, at least ``SMALLEST_STEP``.
        zero_point: one value, or None for 0. It is rounded and limited to the grid, with a gradient straight through
            both: at 2 bit the best zero point is often 0, where a clamp would hold it. Only with a single step.
        grid: the codes.
        gradient_scale: factor on the gradients of ``step`` and ``zero_point``.
        keep_output: the result serves the backward pass; False where something may write into it (ReLU in place).
        factors: None, or (C, 1, 1) without a gradient: ``x`` (B, C, H, W) times these is quantized.

    Returns:
        A tensor of ``x``'s shape and dtype whose values are ``(code - zero_point) * step``.
    """
    if kernels.triton_active(x):
        from quant.triton_uniform import uniform_fake_quantize as launched  # needs Triton, which not every machine has

        return launched(equalized(x, factors), step, zero_point, grid.qmin, grid.qmax, gradient_scale)
    return _UniformFakeQuantize.apply(x, step, zero_point, grid, gradient_scale, keep_output, factors)
