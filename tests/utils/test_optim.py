import math
from functools import partial

import pytest
import torch
from torch import nn

from utils.errors import UserError
from utils.optim import (
    EarlyStopping,
    Warmup,
    accumulation_steps,
    build_optimizer,
    describe_groups,
    learning_rate_factor,
    parameter_groups,
    scale_weight_decay,
    warmup_iterations,
)


class Step(nn.Module):
    no_weight_decay = True

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.bias = nn.Parameter(torch.ones(3))


class Network(nn.Module):
    def __init__(self, quantized=True):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.layer_norm = nn.LayerNorm(4)
        self.raw = nn.Parameter(torch.ones(2))
        self.shared = self.conv
        if quantized:
            self.step = Step()


def test_every_parameter_is_in_its_group_once():
    model = Network()
    bias, weight, norm, quantizer = parameter_groups(model)
    assert {id(p) for p in bias} == {id(p) for p in (model.conv.bias, model.norm.bias, model.layer_norm.bias)}
    assert {id(p) for p in weight} == {id(model.conv.weight), id(model.raw)}
    assert {id(p) for p in norm} == {id(model.norm.weight), id(model.layer_norm.weight)}
    assert {id(p) for p in quantizer} == {id(model.step.weight), id(model.step.bias)}
    assert len(bias + weight + norm + quantizer) == len(list(model.parameters()))


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_groups_have_their_settings(name):
    optimizer = build_optimizer(Network(), name, lr=0.02, momentum=0.9, weight_decay=1e-3, quantizer_lr=1e-4)
    assert type(optimizer).__name__ == name
    groups = optimizer.param_groups
    assert [g["weight_decay"] for g in groups] == [0, 1e-3, 0, 0]
    assert [g["lr"] for g in groups] == [0.02, 0.02, 0.02, 1e-4]
    if name == "SGD":
        assert all(g["nesterov"] and g["momentum"] == 0.9 for g in groups)
    else:
        assert all(g["betas"] == (0.9, 0.999) for g in groups)
    assert "2 weight (decay 0.001)" in describe_groups(optimizer)
    assert len(build_optimizer(Network(quantized=False), name).param_groups) == 3


def test_decay_shrinks_weights_alone():
    model = Network()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, "SGD", lr=0.1, momentum=0.0, weight_decay=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 0.95 if name in ("conv.weight", "raw") else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


def test_unknown_optimizer_is_refused():
    with pytest.raises(UserError, match=r"Lion.*SGD, Adam, AdamW"):
        build_optimizer(Network(), "Lion")


def test_known_learning_rates():
    linear = [learning_rate_factor(epoch, 100, 0.01) for epoch in (0, 1, 50, 99)]
    assert linear == pytest.approx([1.0, 0.9901, 0.505, 0.0199])
    cosine = [learning_rate_factor(epoch, 100, 0.01, cosine=True) for epoch in (0, 1, 50, 99)]
    assert cosine == pytest.approx([1.0, 0.999756, 0.505, 0.010244], abs=1e-6)
    for cosine in (False, True):
        tailed = [learning_rate_factor(epoch, 30, 0.1, cosine, tail=1 / 3) for epoch in (0, 10, 20, 25, 29)]
        assert tailed == pytest.approx([1.0, 0.55, 0.1, 0.1, 0.1])


def with_initial_rates(optimizer):
    """Notes each group's first rate in it, as the trainer does."""
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def test_warmup_ramps():
    optimizer = with_initial_rates(build_optimizer(Network(), lr=0.01, momentum=0.937))
    warmup = Warmup(optimizer, 100, bias_lr=0.1, start_momentum=0.8, momentum=0.937, batch_size=16)
    factor = partial(learning_rate_factor, epochs=10, final=0.1)
    assert warmup.step(0, factor(0)) == 1
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.0, 0.0, 0.0]
    assert optimizer.param_groups[0]["momentum"] == pytest.approx(0.8)
    assert warmup.step(50, factor(0)) == round(1 + 0.5 * 3)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.055, 0.005, 0.005, 0.005])
    assert warmup.step(100, factor(2)) == 4
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.01 * factor(2)] * 4)
    assert optimizer.param_groups[1]["momentum"] == pytest.approx(0.937)
    assert warmup.active(100) and not warmup.active(101)
    assert not Warmup(optimizer, 0).active(0)
    build = with_initial_rates(build_optimizer(Network(), "Adam", momentum=0.9))
    Warmup(build, 10).step(5, 1.0)
    assert build.param_groups[0]["betas"] == (0.9, 0.999)


def test_accumulation_and_lengths():
    assert [accumulation_steps(batch) for batch in (1, 16, 48, 64, 128)] == [64, 4, 1, 1, 1]
    assert scale_weight_decay(5e-4, 16) == pytest.approx(5e-4)
    assert scale_weight_decay(5e-4, 128) == pytest.approx(1e-3)
    assert warmup_iterations(3, 10) == 100 and warmup_iterations(3, 1000) == 3000 and warmup_iterations(0, 50) == 0


def test_early_stopping():
    stopping = EarlyStopping(patience=2)
    assert [stopping.step(epoch, value) for epoch, value in enumerate([0.0, 0.0, 0.3, 0.2, 0.3, 0.1])] == [False] * 6
    assert stopping.best_epoch == 4
    again = EarlyStopping(patience=2)
    again.load_state_dict(stopping.state_dict())
    assert again.step(6, 0.2)
    assert not any(EarlyStopping(patience=0).step(epoch, 1 / (1 + epoch)) for epoch in range(50))
    assert math.isclose(again.best_fitness, 0.3)


def test_an_overflow_in_the_first_step_leaves_no_momentum():
    model = nn.Conv2d(3, 4, 3)
    optimizer = build_optimizer(model, "SGD", 0.1, 0.9, 0.0)
    before = model.weight.detach().clone()
    optimizer.found_inf = torch.ones(())  # how a GradScaler tells the fused step
    optimizer.grad_scale = None
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("inf"))
    optimizer.step()
    assert torch.equal(model.weight, before)
    optimizer.found_inf = torch.zeros(())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model.weight, before - 0.1 * 1.9)  # Nesterov: gradient + momentum * gradient
