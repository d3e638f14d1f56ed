"""Dense tensors and their one-dimensional views, in the two usual memory formats. Imports only torch."""

from __future__ import annotations

import torch
from torch import Tensor


def dense(x: Tensor) -> Tensor:
    """``x`` without gaps, in one of the two memory formats whose flat view needs no copy."""
    channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x if channels_last else x.contiguous()


def flat(x: Tensor) -> Tensor:
    """A one-dimensional view of a dense tensor in memory order."""
    if x.dim() == 4 and not x.is_contiguous():
        x = x.permute(0, 2, 3, 1)
    return x.reshape(-1)


def unflat(values: Tensor, like: Tensor) -> Tensor:
    """``flat`` undone: values (n,) in the shape and memory format of the dense tensor ``like``."""
    if like.dim() == 4 and not like.is_contiguous():
        batch, channels, height, width = like.shape
        return values.view(batch, height, width, channels).permute(0, 3, 1, 2)
    return values.view(like.shape)


def same_layout(gradient: Tensor, like: Tensor) -> Tensor:
    """``gradient`` with the strides of the dense tensor ``like`` (a meta tensor will do), copied only if it must be."""
    if gradient.stride() == like.stride():
        return gradient
    return torch.empty_like(like, dtype=gradient.dtype, device=gradient.device).copy_(gradient)
