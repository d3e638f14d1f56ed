"""Uniform fake quantization with LSQ's gradients on a GPU: one launch forward, one or two backward.

At the sizes of small detectors a training step on a GPU takes as long as the host needs to launch its kernels, and the
same arithmetic in PyTorch's operations is some thirty launches a quantizer. Formulas as in ``quant.primitives``; the
parameters' own gradients are made in the kernels too. Sums do not depend on the order in which blocks run.

Importing this module needs Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from quant.layouts import dense, same_layout

BLOCK = 4096  # values a program
SMALLEST_STEP = tl.constexpr(2.0**-20)  # quant.primitives
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding and taking it away rounds half to even below 2**22
KEEP_NAN = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def _limited(value, low, high):
    return tl.minimum(tl.maximum(value, low, propagate_nan=KEEP_NAN), high, propagate_nan=KEEP_NAN)


@triton.jit
def _range(step_pointer, zero_pointer, row, qmin, qmax, AFFINE: tl.constexpr):  # noqa: N803, as Triton's users write
    """The usable step of a row and the limits of the codes less the zero point."""
    step = tl.maximum(tl.abs(tl.load(step_pointer + row)), SMALLEST_STEP, propagate_nan=KEEP_NAN)
    zero = 0.0
    if AFFINE:
        zero = (_limited(tl.load(zero_pointer), qmin, qmax) + ROUNDER) - ROUNDER
    return step, qmin - zero, qmax - zero


@triton.jit
def _forward(x, y, step, zero, length, qmin, qmax, AFFINE: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
    row = tl.program_id(1)
    s, low, high = _range(step, zero, row, qmin, qmax, AFFINE)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < length
    place = row.to(tl.int64) * length + column
    v = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    code = (_limited(tl.div_rn(v, s), low, high) + ROUNDER) - ROUNDER
    tl.store(y + place, (code * s).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _parameter_gradients(by_step, outside, step, row, s, scale, step_gradient, zero_gradient, AFFINE: tl.constexpr):  # noqa: N803
    """Stores dL/d(step) of a row, through the magnitude that ``_range`` takes, and dL/d(zero point)."""
    given = tl.load(step + row)
    sign = tl.where(given > 0, 1.0, tl.where(given < 0, -1.0, 0.0))
    live = (tl.abs(given) >= SMALLEST_STEP).to(tl.float32)
    tl.store(step_gradient + row, by_step / s * scale * sign * live)
    if AFFINE:
        tl.store(zero_gradient, -s * outside * scale)


@triton.jit
def _backward(
    gradient, x, gradient_x, step, zero, partial, step_gradient, zero_gradient,
    length, qmin, qmax, scale,
    AFFINE: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """dL/dx, and of each program's values the sums of dL/ds * s and of the gradient outside the range."""
    block, blocks = tl.program_id(0), tl.num_programs(0)
    row = tl.program_id(1)
    s, low, high = _range(step, zero, row, qmin, qmax, AFFINE)
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside = column < length
    place = row.to(tl.int64) * length + column
    v = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)
    passed = tl.where((v <= low * s) | (v >= high * s), 0.0, g)
    tl.store(gradient_x + place, passed.to(gradient_x.dtype.element_ty), mask=inside)
    code = (_limited(tl.div_rn(v, s), low, high) + ROUNDER) - ROUNDER
    by_step = tl.sum(g * code * s - passed * v, 0)
    outside = tl.sum(g - passed, 0)
    if WHOLE:
        _parameter_gradients(by_step, outside, step, row, s, scale, step_gradient, zero_gradient, AFFINE)
    else:
        tl.store(partial + 2 * (row * blocks + block), by_step)
        tl.store(partial + 2 * (row * blocks + block) + 1, outside)


@triton.jit
def _add_up(
    partial, step, zero, step_gradient, zero_gradient, blocks, qmin, qmax, scale,
    AFFINE: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """The parameters' gradients of a row from its programs' sums."""
    row = tl.program_id(0)
    s, _low, _high = _range(step, zero, row, qmin, qmax, AFFINE)
    by_step = tl.zeros((BLOCK,), tl.float32)
    outside = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, blocks, BLOCK):
        column = first + tl.arange(0, BLOCK)
        place = 2 * (row * blocks + column)
        by_step += tl.load(partial + place, mask=column < blocks, other=0.0)
        outside += tl.load(partial + place + 1, mask=column < blocks, other=0.0)
    total, beyond = tl.sum(by_step, 0), tl.sum(outside, 0)
    _parameter_gradients(total, beyond, step, row, s, scale, step_gradient, zero_gradient, AFFINE)


class _TritonFakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, step, zero_point, qmin, qmax, scale):
        x = dense(x)
        rows, length = step.numel(), x.numel() // step.numel()
        block = min(triton.next_power_of_2(length), BLOCK)
        ctx.launch = rows, length, block, float(qmin), float(qmax), float(scale)
        ctx.save_for_backward(x, step, zero_point)
        y = torch.empty_like(x)
        grid = triton.cdiv(length, block), rows
        zero = step if zero_point is None else zero_point
        _forward[grid](
            x, y, step, zero, length, float(qmin), float(qmax), AFFINE=zero_point is not None, BLOCK=block,
            num_warps=_warps(block),
        )  # fmt: skip
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, step, zero_point = ctx.saved_tensors
        rows, length, block, qmin, qmax, scale = ctx.launch
        gradient = same_layout(gradient, x)
        blocks, affine = triton.cdiv(length, block), zero_point is not None
        gradient_x, step_gradient = torch.empty_like(x), torch.empty_like(step)
        zero, zero_gradient = (zero_point, torch.empty_like(zero_point)) if affine else (step, step_gradient)
        whole = blocks == 1
        partial = step if whole else torch.empty(2 * rows * blocks, device=x.device)
        _backward[(blocks, rows)](
            gradient, x, gradient_x, step, zero, partial, step_gradient, zero_gradient, length, qmin, qmax, scale,
            AFFINE=affine, WHOLE=whole, BLOCK=block, num_warps=_warps(block),
        )  # fmt: skip
        if not whole:
            _add_up[(rows,)](
                partial, step, zero, step_gradient, zero_gradient, blocks, qmin, qmax, scale, AFFINE=affine, BLOCK=1024
            )
        return gradient_x, step_gradient, zero_gradient if affine else None, None, None, None


def _warps(block: int) -> int:
    return 8 if block >= 2048 else 4


def uniform_fake_quantize(
    x: Tensor, step: Tensor, zero_point: Tensor | None, qmin: int, qmax: int, gradient_scale: float
) -> Tensor:
    """``quant.primitives.uniform_fake_quantize`` for a tensor on a GPU.

    Args:
        x: values of any shape and float type.
        step: float32, one or one for each row of dimension 0.
        zero_point: float32, one, or None; only with a single step.
        qmin, qmax: smallest and largest code.
        gradient_scale: factor on the gradients of ``step`` and ``zero_point``.
    """
    return _TritonFakeQuantize.apply(x, step, zero_point, qmin, qmax, gradient_scale)
