"""Losses that are not finite: noticed before they reach the weights, and traced to the layer where they begin."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class FiniteCheck:
    """Whether the terms of a loss are finite.

    On a GPU the answer is copied while the backward pass is computed, so that asking for it behind ``backward()`` does
    not make the host wait for more than the forward pass.

    Args:
        terms: scalars by name.
    """

    def __init__(self, terms: Mapping[str, Tensor]) -> None:
        self.names = list(terms)
        finite = torch.isfinite(torch.stack([term.detach().float().reshape(()) for term in terms.values()]))
        self._event: torch.cuda.Event | None = None
        if finite.is_cuda:
            self._finite = torch.empty(finite.shape, dtype=torch.bool, pin_memory=True)
            self._finite.copy_(finite, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._finite = finite

    def failed(self) -> list[str]:
        """The names of the terms that are infinite or not a number."""
        if self._event is not None:
            self._event.synchronize()
        return [name for name, finite in zip(self.names, self._finite.tolist(), strict=True) if not finite]


class _FoundError(Exception):
    """Ends a forward pass at the first value that is not finite."""


def _tensors(output: object) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (list, tuple)) else ()
    return [tensor for value in values for tensor in _tensors(value)]


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


@torch.no_grad()
def first_non_finite(model: nn.Module, images: Tensor) -> str | None:
    """Where values stop being finite, in the order of the forward pass; None if they are finite to the end.

    Runs ``model`` once more in its present mode (which moves batch-norm statistics in training) and looks at each
    module's own parameters and statistics before it computes, and at its output afterwards.

    Args:
        images: (B, 3, H, W), 0 to 1.

    Returns:
        For example ``model.4.conv (its parameter weight)`` or ``model.2.bn (its output)``.
    """

    def before(name: str):
        def look(module: nn.Module, _inputs: tuple) -> None:
            state = dict(module.named_parameters(recurse=False))
            state |= {key: module._buffers[key] for key in ("running_mean", "running_var") if key in module._buffers}
            for key, tensor in state.items():
                if tensor is not None and not _is_finite(tensor):
                    raise _FoundError(f"{name} (its {'parameter ' if key in module._parameters else ''}{key})")

        return look

    def after(name: str):
        def look(_module: nn.Module, _inputs: tuple, output: object) -> None:
            if not all(map(_is_finite, _tensors(output))):
                raise _FoundError(f"{name} (its output)")

        return look

    handles = []
    for name, module in model.named_modules():
        if name:
            handles += [module.register_forward_pre_hook(before(name)), module.register_forward_hook(after(name))]
    try:
        model(images)
    except _FoundError as found:
        return str(found)
    finally:
        for handle in handles:
            handle.remove()
    return None
