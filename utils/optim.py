"""Optimizer groups, learning-rate schedules, warm-up and early stopping."""

import math

import torch
from torch import nn

from utils.errors import UserError

OPTIMIZERS = ("SGD", "Adam", "AdamW")
# Positions of the parameter groups; x/lr0, x/lr1, x/lr2 of results.csv follow them.
BIAS, WEIGHT, NORM, QUANTIZER = range(4)
GROUP_NAMES = ("bias", "weight", "norm", "quantizer")
NOMINAL_BATCH = 64  # gradients are accumulated up to this many images per step
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm)


def parameter_groups(model: nn.Module) -> list[list[nn.Parameter]]:
    """Sorts every parameter of ``model`` into one of four lists.

    0 biases; 1 weights that decay; 2 weights of normalisation layers; 3 parameters of modules whose class says
    ``no_weight_decay = True`` (quantizer ranges, fusion scales): decay would pull a step size towards zero.
    """
    groups: list[list[nn.Parameter]] = [[], [], [], []]
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:  # a parameter shared by two modules must be stepped once
                continue
            seen.add(id(parameter))
            if getattr(type(module), "no_weight_decay", False):
                group = QUANTIZER
            elif name == "bias":
                group = BIAS
            elif name == "weight" and isinstance(module, _NORMS):
                group = NORM
            else:
                group = WEIGHT
            groups[group].append(parameter)
    return groups


def build_optimizer(
    model: nn.Module,
    name: str = "SGD",
    lr: float = 0.01,
    momentum: float = 0.937,
    weight_decay: float = 5e-4,
    quantizer_lr: float | None = None,
) -> torch.optim.Optimizer:
    """Builds the optimizer with the groups of ``parameter_groups``; the fourth is there only if it has parameters.

    Args:
        name: "SGD" (with Nesterov momentum), "Adam" or "AdamW" (``momentum`` is their first beta).
        quantizer_lr: learning rate of group 3, ``lr`` if None.

    Raises:
        UserError: unknown ``name``.
    """
    groups = parameter_groups(model)
    settings = [
        {"params": groups[BIAS], "lr": lr, "weight_decay": 0.0},
        {"params": groups[WEIGHT], "lr": lr, "weight_decay": weight_decay},
        {"params": groups[NORM], "lr": lr, "weight_decay": 0.0},
    ]
    if groups[QUANTIZER]:
        rate = lr if quantizer_lr is None else quantizer_lr
        settings.append({"params": groups[QUANTIZER], "lr": rate, "weight_decay": 0.0})
    for setting, group_name in zip(settings, GROUP_NAMES, strict=False):
        setting["name"] = group_name
    # One kernel for all of a parameter's arithmetic; the default is a dozen small ones for each of 177 tensors.
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in model.parameters())
    if name == "SGD":
        optimizer = torch.optim.SGD(settings, lr=lr, momentum=momentum, nesterov=momentum > 0, fused=fused)
        if momentum > 0:
            # The fused step makes the buffers in its first call and leaves them unwritten where float16 overflows in
            # that call, as it does with the first loss scale: what lies in memory would reach the weights in the next.
            for parameter in (parameter for group in groups for parameter in group):
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    if name in ("Adam", "AdamW"):
        return getattr(torch.optim, name)(settings, lr=lr, betas=(momentum, 0.999), fused=fused)
    raise UserError(f"--optimizer {name}: unknown; choose one of {', '.join(OPTIMIZERS)}")


def describe_groups(optimizer: torch.optim.Optimizer) -> str:
    """One line for the log: how many parameters each group has and how strongly they decay."""
    parts = (f"{len(g['params'])} {g['name']} (decay {g['weight_decay']:g})" for g in optimizer.param_groups)
    return f"{type(optimizer).__name__}: " + ", ".join(parts)


def learning_rate_factor(epoch: float, epochs: int, final: float, cosine: bool = False, tail: float = 0.0) -> float:
    """Share of the initial learning rate at ``epoch`` (from 0), falling from 1 to ``final`` at ``epochs``.

    With ``tail`` it is at ``final`` before: for that share of the epochs, at their end, it stays there.
    """
    epoch = min(epoch / (1 - tail), epochs)
    if cosine:
        return (1 - math.cos(epoch * math.pi / epochs)) / 2 * (final - 1) + 1
    return (1 - epoch / epochs) * (1 - final) + final


def accumulation_steps(batch_size: int, nominal: int = NOMINAL_BATCH) -> int:
    """Batches whose gradients are summed before each optimizer step."""
    return max(round(nominal / batch_size), 1)


def scale_weight_decay(weight_decay: float, batch_size: int, nominal: int = NOMINAL_BATCH) -> float:
    """Weight decay for the images that one optimizer step really sees."""
    return weight_decay * batch_size * accumulation_steps(batch_size, nominal) / nominal


class Warmup:
    """Linear ramps over the first iterations: learning rates, momentum and gradient accumulation.

    Biases fall from ``bias_lr`` to the schedule's rate, all other groups rise from zero; momentum goes from
    ``start_momentum`` to ``momentum`` (SGD only); accumulation from 1 batch to ``accumulation_steps(batch_size)``.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        iterations: int,
        bias_lr: float = 0.1,
        start_momentum: float = 0.8,
        momentum: float = 0.937,
        batch_size: int = NOMINAL_BATCH,
        nominal: int = NOMINAL_BATCH,
    ) -> None:
        self.optimizer = optimizer
        self.iterations = iterations
        self.bias_lr = bias_lr
        self.start_momentum = start_momentum
        self.momentum = momentum
        self.target_accumulation = nominal / batch_size

    def active(self, iteration: int) -> bool:
        """Whether ``iteration`` (from 0, counted over all epochs) still lies in the warm-up."""
        return iteration <= self.iterations and self.iterations > 0

    def step(self, iteration: int, factor: float) -> int:
        """Sets the optimizer up for ``iteration``; ``factor`` is the epoch schedule's. Returns batches per step."""
        share = min(iteration / max(self.iterations, 1), 1.0)
        for index, group in enumerate(self.optimizer.param_groups):
            start = self.bias_lr if index == BIAS else 0.0
            group["lr"] = start + share * (group["initial_lr"] * factor - start)
            if "momentum" in group:
                group["momentum"] = self.start_momentum + share * (self.momentum - self.start_momentum)
        return max(1, round(1 + share * (self.target_accumulation - 1)))


def warmup_iterations(warmup_epochs: float, batches_per_epoch: int, minimum: int = 100) -> int:
    """Length of the warm-up: ``warmup_epochs`` epochs, but at least ``minimum`` iterations; 0 epochs switch it off."""
    return max(round(warmup_epochs * batches_per_epoch), minimum) if warmup_epochs > 0 else 0


class EarlyStopping:
    """Says when fitness has not reached its best for ``patience`` epochs; 0 means never."""

    def __init__(self, patience: int = 100) -> None:
        self.patience = patience
        self.best_fitness = 0.0
        self.best_epoch = 0

    def step(self, epoch: int, fitness: float) -> bool:
        """Takes one epoch's fitness and returns whether to stop.

        A draw counts as progress: in the first epochs fitness is often exactly zero.
        """
        if fitness >= self.best_fitness:
            self.best_fitness, self.best_epoch = fitness, epoch
        return self.patience > 0 and epoch - self.best_epoch >= self.patience

    def state_dict(self) -> dict:
        """What a resumed run needs."""
        return {"best_fitness": self.best_fitness, "best_epoch": self.best_epoch}

    def load_state_dict(self, state: dict) -> None:
        """Takes ``state_dict()`` back."""
        self.best_fitness, self.best_epoch = float(state["best_fitness"]), int(state["best_epoch"])
