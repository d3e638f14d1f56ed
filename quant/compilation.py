"""Compiles the arithmetic of a model's quantizers (``quant.kernels``), if this machine can."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable

import torch
from torch import nn

from quant import kernels
from quant.prepare import quantizers
from quant.quantizer import Quantizer
from utils.log import LOGGER


def compile_quantizers(model: nn.Module, types: Iterable[torch.dtype] = (torch.float32,)) -> bool:
    """Compiles the kernels that ``model`` needs and tries them; from then on all quantizers in the process use them.

    Takes half a minute the first time on two cores, later a few seconds (torch keeps what it compiled on disk). Where
    it fails, for want of a C++ compiler or of Triton, a warning says so and everything goes on without.

    Args:
        model: prepared, on the device where it will be trained.
        types: of the tensors that the quantizers will read.

    Returns:
        Whether the kernels are in use.
    """
    started = time.perf_counter()
    kinds = {(type(q), q.grid.levels, q.scheme): q for q in quantizers(model).values() if not q.channels}
    kernels.switch(True)
    try:
        for quantizer in kinds.values():
            for dtype in types:
                _try(copy.deepcopy(quantizer), dtype)
    except Exception as error:  # whatever a missing or broken compiler raises
        kernels.switch(False)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        LOGGER.warning(f"torch.compile does not work here, training goes on without it: {reason}")
        return False
    LOGGER.info(f"Quantizer kernels compiled in {time.perf_counter() - started:.0f} s")
    return True


def _try(quantizer: Quantizer, dtype: torch.dtype) -> None:
    for shape in ((2, 3, 4, 4), (1, 5, 6, 6)):  # two, so that a kernel for one size only would show now
        x = torch.rand(shape, device=quantizer.initialised.device).to(dtype).requires_grad_(True)
        quantizer(x).sum().backward()
