"""Attention maps and divergences against formulas written out in another way."""

import copy
import math

import pytest
import torch
from torch import nn

from quant import ada
from quant.ada import (
    AttentionAlignment,
    freeze_teacher,
    js_divergence,
    kl_divergence,
    log_distribution,
    quantization_saliency,
    simam_energy,
)
from quant.lsq import LSQ
from quant.primitives import activation_grid


def test_simam_is_a_quarter_of_z_squared_plus_a_half():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 4).double()
    regulariser = 0.1
    count = 5 * 4 - 1
    mean = x.mean((2, 3), keepdim=True)
    variance = ((x - mean) ** 2).sum((2, 3), keepdim=True) / count
    z = (x - mean) / (variance + regulariser).sqrt()
    torch.testing.assert_close(simam_energy(x, regulariser).double(), z**2 / 4 + 0.5, rtol=1e-5, atol=1e-6)


def test_simam_of_a_constant_map_is_finite():
    assert torch.equal(simam_energy(torch.full((1, 1, 4, 4), 7.0)), torch.full((1, 1, 4, 4), 0.5))


@pytest.mark.parametrize("normalisation", ["softmax", "l1"])
def test_distributions_sum_to_one(normalisation):
    attention = torch.rand(2, 3, 4, 5) * 10
    total = log_distribution(attention, normalisation, 2.0).exp().sum(-1)
    torch.testing.assert_close(total, torch.ones(2, 3))


def test_l1_is_the_sigmoid_over_its_sum():
    attention = torch.randn(1, 1, 3, 3)
    expected = attention.sigmoid() / attention.sigmoid().sum()
    torch.testing.assert_close(log_distribution(attention, "l1").exp().view(3, 3), expected.view(3, 3))


def random_logs(seed):
    torch.manual_seed(seed)
    return (torch.randn(2, 3, 20) * 3).log_softmax(-1), (torch.randn(2, 3, 20) * 3).log_softmax(-1)


def test_js_is_symmetric_bounded_and_zero_on_equal_maps():
    p, q = random_logs(0)
    assert js_divergence(p, q).item() == pytest.approx(js_divergence(q, p).item(), rel=1e-6)
    assert 0 < js_divergence(p, q) < math.log(2)
    assert abs(js_divergence(p, p).item()) < 1e-6
    disjoint = torch.tensor([[1.0, 1e-30]]).log(), torch.tensor([[1e-30, 1.0]]).log()
    assert js_divergence(*disjoint).item() == pytest.approx(math.log(2), rel=1e-5)


def test_divergences_equal_torch_distributions():
    p, q = random_logs(1)
    first, second = (torch.distributions.Categorical(logits=logs.double()) for logs in (p, q))
    expected = torch.distributions.kl_divergence(first, second).mean()
    assert kl_divergence(p, q).item() == pytest.approx(expected.item(), rel=1e-5)
    middle = torch.distributions.Categorical(probs=(first.probs + second.probs) / 2)
    halves = [torch.distributions.kl_divergence(d, middle).mean() for d in (first, second)]
    assert js_divergence(p, q).item() == pytest.approx(sum(halves).item() / 2, rel=1e-5)


def test_saliency_without_quantization_error_is_the_logarithm_of_z():
    torch.manual_seed(0)
    x = torch.randn(1, 2, 6, 6)
    z = (x - x.mean((2, 3), keepdim=True)) / x.std((2, 3), correction=0, keepdim=True)
    torch.testing.assert_close(quantization_saliency(x, None, None, 1.0), torch.log1p(z**2), rtol=1e-4, atol=1e-5)
    with_error = quantization_saliency(x, x + 0.1, torch.tensor(0.2), 2.0)
    torch.testing.assert_close(
        with_error, torch.log1p(z**2) + 2 * torch.log1p(torch.tensor(0.25)), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("attention", ["simam", "qaware"])
@pytest.mark.parametrize("divergence", ["js", "kl"])
@pytest.mark.parametrize("normalisation", ["softmax", "l1"])
def test_loss_trains_the_student_and_never_the_teacher(attention, divergence, normalisation):
    torch.manual_seed(0)
    student, teacher = nn.Conv2d(3, 4, 3), freeze_teacher(nn.Conv2d(3, 4, 3))
    before = copy.deepcopy(teacher.state_dict())
    reader = LSQ(4, activation_grid(4, "affine"), "affine")
    reader.initialise(torch.randn(100))
    alignment = AttentionAlignment(attention, divergence, normalisation)
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0 if normalisation == "softmax" else 50.0)
    images = torch.randn(2, 3, 10, 10)
    losses = []
    for _ in range(20):
        loss = alignment({17: student(images)}, {17: teacher(images)}, {17: reader})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_equal_features_cost_nothing():
    feature = torch.randn(2, 3, 8, 8)
    assert abs(AttentionAlignment()({1: feature}, {1: feature.clone()}, {}).item()) < 1e-6


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("divergence", ["js", "kl"])
def test_the_fused_divergence_equals_the_simple_functions(divergence, temperature, layout, monkeypatch):
    monkeypatch.setattr(ada, "BLOCK", 2 * 4 * 30)  # pieces of two samples, the last one of one
    torch.manual_seed(0)
    student = torch.randn(5, 4, 5, 6, dtype=torch.float64).to(memory_format=layout).requires_grad_(True)
    teacher = torch.randn(5, 4, 5, 6, dtype=torch.float64)
    loss = AttentionAlignment("simam", divergence, temperature=temperature)({0: student}, {0: teacher}, {})
    (gradient,) = torch.autograd.grad(3 * loss, student)

    def log_map(x):  # simam_energy without its rounding to float32
        deviation = (x - x.mean((-2, -1), keepdim=True)).square()
        variance = deviation.sum((-2, -1), keepdim=True) / 29
        return torch.log_softmax((deviation / (4 * (variance + 1e-4)) + 0.5).flatten(-2) / temperature, -1)

    expected = ada.DIVERGENCES[divergence](log_map(teacher), log_map(student))
    (expected_gradient,) = torch.autograd.grad(3 * expected, student)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-14)


def test_distributions_that_share_nothing_have_a_finite_divergence():
    """Two peaks at different places: both probabilities underflow to 0 elsewhere."""
    student, teacher = torch.zeros(1, 1, 20, 20), torch.zeros(1, 1, 20, 20)
    student[..., 3, 3], teacher[..., 15, 15] = 1.0, 1.0
    student.requires_grad_(True)
    loss = AttentionAlignment("simam", "js", temperature=0.01)({0: student}, {0: teacher}, {})
    loss.backward()
    assert abs(loss.item() - math.log(2)) < 1e-5
    assert student.grad.isfinite().all()
