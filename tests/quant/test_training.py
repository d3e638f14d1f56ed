"""The quantized phase's companion: monitors that warn, and the schedule's effect on what may be exported."""

import copy

import pytest
import torch
from small_detector import float_detector, images, quantized_detector

from quant.config import build_config
from quant.training import QuantizedTraining
from utils.errors import UserError


def companion(**flags):
    model = quantized_detector(gabfusion=True).train()
    config = build_config("lsq", 4, gabfusion=flags.pop("gabfusion", True), **flags)
    teacher = float_detector() if config.ada.enabled else None
    return QuantizedTraining(model, copy.deepcopy(model), config, teacher, epochs=10)


def warnings(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING")]


def test_a_healthy_epoch_warns_of_nothing(capsys):
    companion().end_epoch(0.9)
    assert warnings(capsys) == []


def test_a_branch_that_is_switched_off_is_named_once(capsys):
    training = companion()
    node = next(iter(training.nodes.values()))
    with torch.no_grad():
        node.logits.copy_(torch.tensor([4.0, -4.0]))
    training.end_epoch(0.9)
    training.end_epoch(0.9)
    (line,) = warnings(capsys)
    assert next(iter(training.nodes)) in line and "switched off" in line


def test_a_collapsed_step_is_named(capsys):
    training = companion()
    with torch.no_grad():
        training.model.model[1].conv.input_quantizer.step.mul_(1e-3)
    training.end_epoch(0.9)
    (line,) = warnings(capsys)
    assert "model.1.conv.input_quantizer" in line and "collapsed" in line


def test_dying_objectness_is_said(capsys):
    companion().end_epoch(0.001)
    assert "objectness output is dying" in warnings(capsys)[0]


@pytest.mark.parametrize("ratio, word", [(1e-5, "does nothing"), (30.0, "outweighs")])
def test_attention_that_is_too_weak_or_too_strong_is_said(ratio, word, capsys):
    training = companion(ada="js")
    features = {index: torch.rand(2, 4, 5, 5, requires_grad=True) for index in (10, 13)}
    task = sum(feature.sum() for feature in features.values())
    training.measure_ratio(task, task * ratio, features)
    assert training.gradient_ratio == pytest.approx(ratio, rel=1e-4)
    training._ada_sum, training._ada_count = torch.tensor(1.0), 1
    training.end_epoch(0.9)
    assert word in warnings(capsys)[0]


def test_distillation_scales_with_weight_and_batch():
    training = companion(ada="kl")
    batch = images(3)
    _, features = training.model(batch, features=training.features)
    loss = training.distillation(batch, features)
    divergence = training.alignment(features, training.teacher(batch, features=training.features)[1], training.readers)
    torch.testing.assert_close(loss, divergence * 3 * training.config.ada.weight)
    loss.backward()
    assert all(parameter.grad is None for parameter in training.teacher.parameters())


def test_only_the_end_of_the_schedule_is_deployable():
    training = companion()
    states = []
    for epoch in range(10):
        training.set_progress((epoch + 1) / 10)
        states.append(training.deployable)
        assert float(next(iter(training.nodes.values())).strength) == pytest.approx(training.strength)
    assert states == [False] * 8 + [True, True]


def test_attention_needs_a_teacher_and_existing_layers():
    model = quantized_detector(gabfusion=True)
    config = build_config("lsq", 4, ada="js")
    with pytest.raises(UserError, match="needs a float teacher"):
        QuantizedTraining(model, copy.deepcopy(model), config, None, 1)
    config.ada.layers = [99]
    with pytest.raises(UserError, match="99 is not a layer"):
        QuantizedTraining(model, copy.deepcopy(model), config, float_detector(), 1)
