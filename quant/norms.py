"""Batch-norm statistics of the very weights that are deployed.

The moving average of the weights rounds to other codes than the weights that the running statistics were collected
with, and those statistics are themselves an average over weights that have since changed. In float both differences are
smooth and small; in a low-bit network a code that changes moves a whole channel. Statistics of the final weights, with
quantization on, are computed again before they are used (as arXiv 2203.11086 does).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def reestimate_norms(model: nn.Module, batches: Iterable[Tensor], keep: tuple[str, ...] = ()) -> int:
    """Replaces the running statistics of every batch norm of ``model`` by those of ``batches``.

    The mean over batches of each batch's mean and unbiased variance: what a batch norm in training would normalise by.
    Each layer's input is made with its predecessors normalised by the batch's own statistics, as in training. All else
    runs as in evaluation; quantizers quantize.

    Args:
        model: any network; its training mode is kept.
        batches: images (B, 3, H, W) as floats 0 to 1, or what else the network reads; without any all statistics stay.
            Augmented as in training: the weights are fitted to what such batches are normalised by.
        keep: batch norms whose names start so keep theirs.

    Returns:
        The number of batches.
    """
    modes = {module: module.training for module in model.modules()}
    norms = [
        module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats and not name.startswith(keep)
    ]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    count = 0
    try:
        for batch in batches:
            if not count:
                for norm in norms:
                    norm.train()
                    norm.momentum = None  # a cumulative mean
                    norm.num_batches_tracked.zero_()
            model(batch)
            count += 1
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
    return count
