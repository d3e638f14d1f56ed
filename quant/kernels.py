"""The quantizers' elementwise arithmetic as kernels: one pass forward, one backward.

The formulas below are compiled by ``torch.compile`` for an accelerator, and stand in ``native.cpp`` for a CPU. LSQ's
have Triton kernels of their own (``quant.triton_uniform``).
``quant.compilation`` switches kernels on; without, or where compiling fails, the same results come from
``quant.blocks``, piece by piece.

The formulas' sums are over the last dimension; x and gradients may be shortened types, in between is float32.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from quant import native
from quant.layouts import unflat

# Each is a comparison in the kernel. With the 15 of 4 bits that takes 0.6 times a table's time on a CPU; more of them,
# or an accelerator, have not been measured.
MOST_THRESHOLDS = 15
# A compiled sum over everything would be one block's work where the first tensor that is seen is small: a step of
# yolov5n took 27 times a float step's time on an H200. So each of at most this many rows has its sum.
MOST_ROWS = 4096
_on = False


def active(x: Tensor, steps: Tensor | float, thresholds: int = 0) -> bool:
    """Whether kernels are to be used for ``x``. Compiled formulas take a single step, and few thresholds."""
    if not _on or x.device.type == "cpu":
        return native_active(x)
    if type(x) not in (Tensor, torch.nn.Parameter):  # a tracer's, without memory
        return False
    return (not isinstance(steps, Tensor) or steps.numel() == 1) and thresholds <= MOST_THRESHOLDS


def triton_active(x: Tensor) -> bool:
    """Whether LSQ's Triton kernels are to be used for ``x``."""
    real = type(x) in (Tensor, torch.nn.Parameter)  # a tracer's has no memory
    return _on and real and x.device.type == "cuda" and x.numel() > 0 and not torch.compiler.is_compiling()


def native_active(x: Tensor) -> bool:
    """Whether the functions of ``quant.native`` are to be used for ``x``, whatever a formula is limited to."""
    return _on and native.usable(x)


def switch(on: bool) -> bool:
    """Whether quantizers use these kernels from now on; ``quant.compilation.compile_quantizers`` tries them first.

    Returns:
        Whether they did before.
    """
    global _on
    before, _on = _on, on
    return before


@cache
def compiled(kernel: Callable) -> Callable:
    """``kernel`` compiled for any size."""
    for noisy in ("torch._inductor", "torch.utils.cpp_extension"):  # a missing CUDA toolkit is no news on a CPU
        logging.getLogger(noisy).setLevel(logging.ERROR)
    return torch.compile(kernel, dynamic=True)


def run(
    kernel: Callable, tensors: Sequence[Tensor], *values: Tensor | float, factors: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Calls the compiled form of ``kernel``.

    Args:
        kernel: one of those below.
        tensors: dense, of one layout; results of their size get that layout.
        values: single values or short vectors.
        factors: of x's channels, see ``quant.native``; only for a tensor on a CPU.
    """
    if tensors[-1].device.type == "cpu":
        return getattr(native, kernel.__name__)(*tensors, *values, factors=factors)
    if factors is not None:
        raise ValueError(f"{kernel.__name__}: factors of channels are for tensors on a CPU")
    return run_compiled(kernel, tensors, *values)


def run_compiled(kernel: Callable, tensors: Sequence[Tensor], *values: Tensor | float) -> tuple[Tensor, ...]:
    """``run`` by ``torch.compile``, whatever the device."""
    like = tensors[-1]
    values = (
        value.reshape(-1) if isinstance(value, Tensor) else torch.full((1,), value, device=like.device)
        for value in values
    )
    # The largest power of two that divides the size, limited.
    rows = min(like.numel() & -like.numel(), MOST_ROWS)
    results = compiled(kernel)(*(_alias(tensor, rows) for tensor in tensors), *(value.detach() for value in values))
    results = results if isinstance(results, tuple) else (results,)
    return unflat(results[0].reshape(-1), like), *(sums.sum() for sums in results[1:])


def _alias(tensor: Tensor, rows: int) -> Tensor:
    """The values of a dense tensor in memory order, (rows, n / rows), without a copy and without a past.

    Neither the shape that a view comes from nor whether it wants a gradient must be a reason to compile again.
    """
    columns = tensor.numel() // rows
    alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return alias.set_(tensor.untyped_storage(), tensor.storage_offset(), (rows, columns), (columns, 1))


# --- formulas ---------------------------------------------------------------------------------------------------------


def staircase(x: Tensor, step: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """``step * clip(round(x / step), low, high)``."""
    return ((x.float() / step).round().clamp(low, high) * step).to(x.dtype)


def uniform_backward(
    gradient: Tensor, x: Tensor, step: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """LSQ's gradients (``quant.primitives``): of x; the sum of dL/ds times s; the sum of the gradient outside."""
    gradient, v = gradient.float(), x.float()
    passed = torch.where((v <= low * step) | (v >= high * step), 0.0, gradient)
    by_step = gradient * (v / step).round().clamp(low, high) * step - passed * v
    return passed.to(x.dtype), by_step.sum(-1), (gradient - passed).sum(-1)


def clipped_backward(gradient: Tensor, x: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """PACT's gradients: of x, and the sums of the gradient at and above ``high`` and at and below ``low`` (values)."""
    gradient, v = gradient.float(), x.float()
    passed = torch.where((v <= low) | (v >= high), 0.0, gradient)
    above = torch.where(v >= high, gradient, 0.0)
    return passed.to(x.dtype), above.sum(-1), (gradient - passed - above).sum(-1)


def soft_backward(
    gradient: Tensor, x: Tensor, step: Tensor, low: Tensor, high: Tensor, k: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """DSQ's gradients: of x, and the sums that ``quant.dsq`` calls moved, outside, slope and bend.

    Args:
        k: of the tanh, (1,).
        scale: (2,) dy/dx in the middle of an interval, divided by the root mean square if x's gradient is normalised,
            and that root mean square.
    """
    gradient, v = gradient.float(), x.float()
    gain, divisor = scale[0], scale[1]
    t = v / step
    hard = t.round().clamp(low, high) * step
    t = t - low
    passed = torch.where((t <= 0) | (t >= high - low), 0.0, gradient)
    turned = k * (t - t.floor() - 0.5)
    soft = 1 - 2 / (torch.exp(2 * turned) + 1)  # tanh, which takes 2.4 times as long
    gradient_x = passed * (1 - soft * soft) * gain
    moved = gradient * hard - gradient_x * v * divisor
    slope, bend = gradient_x * turned * divisor, passed * soft
    return gradient_x.to(x.dtype), moved.sum(-1), (gradient - passed).sum(-1), slope.sum(-1), bend.sum(-1)


def thresholds_passed(x: Tensor, step: Tensor, first: Tensor, thresholds: Tensor) -> Tensor:
    """N2UQ's values: ``step * (first + number of thresholds <= x)``; NaN stays NaN.

    Args:
        first: smallest code less the zero point, (1,).
        thresholds: (n,), rising; n is part of the compiled code.
    """
    v = x.float()
    code = torch.where(v == v, first, torch.nan)
    for threshold in thresholds.unbind():
        code = code + (v >= threshold).float()
    return (code * step).to(x.dtype)
