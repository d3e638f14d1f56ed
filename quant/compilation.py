"""Switches on the compiled arithmetic of a model's quantizers (``quant.kernels``), if this machine can."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable

import torch
from torch import nn

from quant import kernels, native
from quant.prepare import quantizers
from quant.quantizer import Quantizer
from utils.log import LOGGER


def compile_quantizers(
    model: nn.Module, types: Iterable[torch.dtype] = (torch.float32,), required: bool = True
) -> bool:
    """Compiles the kernels that ``model`` needs and tries them; from then on all quantizers in the process use them.

    On a CPU that is ``native.cpp``: a second or two the first time. On an accelerator ``torch.compile`` takes half a
    minute the first time, later a few seconds (it keeps what it compiled on disk). Where it fails, for want of a C++
    compiler or of Triton, everything goes on without.

    Args:
        model: prepared, on the device where it will be trained.
        types: of the tensors that the quantizers will read.
        required: whether a failure is worth a warning.

    Returns:
        Whether the kernels are in use.
    """
    started = time.perf_counter()
    # Weights are written in the native library and in Triton only for some kinds, activations everywhere.
    kinds = {
        (type(q), q.grid.levels, q.scheme, bool(q.channels)): q
        for q in quantizers(model).values()
        if not q.channels or q.initialised.is_cuda
    }
    before = kernels.switch(True)
    try:
        if any(q.initialised.device.type == "cpu" for q in kinds.values()):
            native.load()
        for quantizer in kinds.values():
            for dtype in types:
                _try(quantizer, dtype)
    except Exception as error:  # whatever a missing or broken compiler raises
        kernels.switch(before)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if required:
            LOGGER.warning(f"The quantizers cannot be compiled here, training goes on without: {reason}")
        return False
    if not before:
        LOGGER.debug(f"Quantizers run compiled kernels (ready in {time.perf_counter() - started:.1f} s)")
    return True


@torch.inference_mode(False)
@torch.enable_grad()
def _try(quantizer: Quantizer, dtype: torch.dtype) -> None:
    quantizer = copy.deepcopy(quantizer)
    quantizer.inverse_equalizer = None  # tried on tensors of other channel counts
    rows = quantizer.channels
    for shape in ((rows or 2, 3, 4, 4), (rows or 1, 5, 6, 6)):  # two, so that a kernel for one size only would show now
        x = torch.rand(shape, device=quantizer.initialised.device).to(dtype)
        found = _pass(quantizer, x)
        if x.is_cuda:  # where what a compiler makes differs from machine to machine
            kernels.switch(False)
            expected = _pass(quantizer, x)
            kernels.switch(True)
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2 * float(other.abs().max()))


def _pass(quantizer: Quantizer, x: torch.Tensor) -> list[torch.Tensor]:
    """The quantizer's result for ``x``, and the gradients of its sum."""
    quantizer.zero_grad()
    x = x.clone().requires_grad_(True)
    y = quantizer(x)
    y.float().sum().backward()
    gradients = [parameter.grad for parameter in quantizer.parameters() if parameter.grad is not None]
    return [y.detach(), x.grad, *(gradient.clone() for gradient in gradients)]
