"""A moving average of a model's state: what is validated, saved and deployed."""

import math
from collections.abc import Iterator
from copy import deepcopy

import torch
from torch import Tensor, nn


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel or torch.compile, or the model itself."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        else:
            return model


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers with their names, each tensor once."""
    yield from model.named_parameters()
    yield from model.named_buffers()


class ModelEMA:
    """Exponential moving average of every floating-point parameter and buffer; everything else is copied.

    The decay grows with the number of updates t as ``decay * (1 - exp(-t / tau))``, so that the random start is
    forgotten. A module may name buffers that are a schedule's state rather than something learned in a class attribute
    ``ema_copied: tuple[str, ...]``: those are copied too, because an average would lag behind the schedule.

    Attributes:
        ema: the averaged model, in eval mode, without gradients.
        updates: the number of updates so far; to be saved with ``ema`` and given back on resume.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999, tau: float = 2000.0, updates: int = 0) -> None:
        self.ema = deepcopy(unwrap(model)).eval().requires_grad_(False)
        self.base_decay = decay
        self.tau = tau
        self.updates = updates
        self._copied = {
            f"{prefix}.{name}" if prefix else name
            for prefix, module in self.ema.named_modules()
            for name in getattr(type(module), "ema_copied", ())
        }

    def decay(self, updates: int) -> float:
        """The decay used at update number ``updates`` (from 1)."""
        return self.base_decay * (1 - math.exp(-updates / self.tau))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the average towards ``model``; call it once after each optimizer step."""
        self.updates += 1
        averaged, latest, copied, source = self._pairs(model)
        if averaged:
            torch._foreach_lerp_(averaged, latest, 1 - self.decay(self.updates))
        if copied:
            torch._foreach_copy_(copied, source)

    def _pairs(self, model: nn.Module) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        # Looked up anew each time: Module.to() replaces buffers, so references kept from the start would go stale. Each
        # tensor once, unlike in a state_dict: one that two modules share (a quantizer with two readers) moves once.
        state = dict(_tensors(unwrap(model)))
        averaged, latest, copied, source = [], [], [], []
        for name, value in _tensors(self.ema):
            new = state[name].detach()
            if value.is_floating_point() and name not in self._copied:
                averaged.append(value)
                latest.append(new.to(value.dtype))
            else:
                copied.append(value)
                source.append(new)
        return averaged, latest, copied, source

    def update_attributes(self, model: nn.Module, names: tuple[str, ...] = ("yaml", "nc", "names", "stride")) -> None:
        """Copies plain attributes such as class names, where ``model`` has them."""
        model = unwrap(model)
        for name in names:
            if hasattr(model, name):
                setattr(self.ema, name, deepcopy(getattr(model, name)))
