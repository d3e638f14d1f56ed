"""Elementwise arithmetic over large tensors in pieces that stay in the processor's cache.

A chain of whole-tensor operations reads and writes main memory once each. Piece by piece the intermediate values stay
in the second-level cache. On an accelerator there is one piece, the whole tensor, and numbers stay tensors, because
reading one would make the host wait.

Tensors may be float32, bfloat16 or float16; the arithmetic is float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quant import kernels
from quant.layouts import flat

# Values a piece and thread on a CPU: two or three buffers of 512 KB fit into the L2 caches of today's cores.
BLOCK = 131072


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Corresponding one-dimensional views of dense tensors of one layout, piece by piece."""
    views = [flat(tensor) for tensor in tensors]
    count, size = views[0].numel(), BLOCK * torch.get_num_threads()
    if count <= size or tensors[0].device.type != "cpu":
        return iter([tuple(views)])
    return zip(*(view.split(size) for view in views), strict=True)


def pieces_with_step(step: Tensor | float, *tensors: Tensor) -> Iterator[tuple]:
    """A step and the corresponding views of dense ``tensors`` of one layout, piece by piece.

    With one step the views are stretches (n,) and the step is what ``number`` makes of it; with R steps, one for each
    row of dimension 0, the views are some whole rows (r, K) and the step is (r, 1).
    """
    rows = step.numel() if isinstance(step, Tensor) else 1
    if rows == 1:
        value = number(step)
        return ((value, *views) for views in pieces(*tensors))
    views = [flat(tensor).reshape(rows, -1) for tensor in (step, *tensors)]
    count, size = tensors[0].numel(), BLOCK * torch.get_num_threads()
    if count <= size or step.device.type != "cpu":
        return iter([tuple(views)])
    return zip(*(view.split(max(size * rows // count, 1)) for view in views), strict=True)


def number(value: Tensor | float) -> Tensor | float:
    """A plain number for a single value on a CPU, where a pass with it is three times faster; else the tensor."""
    single = isinstance(value, Tensor) and value.numel() == 1 and value.device.type == "cpu"
    return value.item() if single else value


def multiply_add(constant: Tensor | float, x: Tensor, factor: Tensor | float, out: Tensor) -> None:
    """``out = constant + x * factor`` in one pass."""
    constant = constant if isinstance(constant, Tensor) else torch.full((), constant, device=x.device)
    if isinstance(factor, Tensor):
        torch.addcmul(constant, x, factor, out=out)
    else:
        torch.add(constant, x, alpha=factor, out=out)


def total(left: Tensor, right: Tensor | None = None) -> Tensor | float:
    """Sum of the products with ``right``, or of the values, over the last dimension of (n,) or (r, K)."""
    if left.dim() == 2:
        return left.sum(1) if right is None else (left * right).sum(1)
    return number(left.sum() if right is None else torch.dot(left, right))


def difference(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor | float:
    """Sum of a * b - c * d over the last dimension of (n,) or (r, K)."""
    if a.dim() == 2:
        return torch.mul(a, b).addcmul_(c, d, value=-1).sum(1)
    return total(a, b) - total(c, d)


def add_up(parts: list[tuple], rows: int) -> Iterator[Tensor | float]:
    """Sums of pieces for the whole tensor: pieces are stretches of the only row, or some rows each."""
    return (sum(column) if rows == 1 else torch.cat(column) for column in zip(*parts, strict=True))


def staircase(
    x: Tensor, step: Tensor | float, low: Tensor | float, high: Tensor | float, factors: Tensor | None = None
) -> Tensor:
    """``step * clip(round(x / step), low, high)`` of a dense ``x``, in its type, with float32 in between.

    Args:
        x: any shape; with R steps, R is the size of dimension 0.
        step: one value or R.
        low, high: smallest and largest code less the zero point; numbers, or one value each.
        factors: None, or (C, 1, 1): ``x`` times these is taken.
    """
    if kernels.active(x, step):
        return kernels.run(kernels.staircase, [x], step, low, high, factors=factors)[0]
    x = equalized(x, factors)
    y = torch.empty_like(x)
    low, high = number(low), number(high)
    for divisor, values, out in pieces_with_step(step, x, y):
        level(values, divisor, low, high, out)
    return y


def equalized(x: Tensor, factors: Tensor | None) -> Tensor:
    """``x`` (B, C, H, W) times ``factors`` (C, 1, 1) in its type, or ``x`` where there are none."""
    return x if factors is None else x * factors.to(x.dtype)


def level(values: Tensor, step: Tensor | float, low: Tensor | float, high: Tensor | float, out: Tensor) -> Tensor:
    """``staircase`` of one piece, written to ``out``; returns it in float32 (``out`` itself if that is float32)."""
    buffer = out if out.dtype is torch.float32 else torch.empty_like(out, dtype=torch.float32)
    # Divided, not multiplied by 1 / step: values on a rounding boundary fall as in ONNX's QuantizeLinear.
    torch.div(values.float(), step, out=buffer).round_().clamp_(low, high).mul_(step)
    if buffer is not out:
        out.copy_(buffer)
    return buffer


def inside_gradient(gradient: Tensor, x: Tensor, low: Tensor | float, high: Tensor | float, out: Tensor) -> None:
    """``out = gradient`` where low < x < high, else 0."""
    if isinstance(low, Tensor):
        torch.mul(gradient, (x > low) & (x < high), out=out)
    else:
        torch.ops.aten.hardtanh_backward.grad_input(gradient, x, low, high, grad_input=out)  # one pass instead of four


class Buffer:
    """Float32 room for a piece's results, used again for the next piece; none is needed if the target is float32."""

    def __init__(self) -> None:
        self.room: Tensor | None = None

    def like(self, out: Tensor) -> Tensor:
        """``out`` itself, or float32 memory of its shape."""
        if out.dtype is torch.float32:
            return out
        if self.room is None:
            self.room = torch.empty_like(out, dtype=torch.float32)
        return self.room[: len(out)]
