import math

import pytest
import torch
from torch import nn

from quant.calibrate import calibrate
from quant.dampening import dampening, dampening_factor
from quant.layers import QuantConv2d
from quant.prepare import prepare
from quant.recipe import build_config
from quant.registry import QUANTIZERS


@pytest.mark.parametrize("method", QUANTIZERS)
def test_the_sum_and_its_gradient(method):
    """Against a plain loop over the weights and the quantizer's own result."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.SiLU(), nn.Conv2d(8, 2, 1))
    batches = [torch.rand(4, 3, 12, 12)]
    prepare(model, build_config(method, 3), example=batches[0])
    calibrate(model, batches)
    layers = [module for module in model.modules() if isinstance(module, QuantConv2d)]
    layers[1].weight.data[0, 0, 0, 0] = 50.0  # beyond the grid
    expected = {}
    for layer in layers:
        values = layer.weight_quantizer(layer.weight).detach()
        distance = torch.zeros_like(layer.weight)
        for channel in range(len(values)):
            form = layer.weight_quantizer.integer()
            end = form.step.expand(len(values))[channel] * form.grid.qmax
            distance[channel] = layer.weight.detach()[channel].clamp(-end, end) - values[channel]
        expected[layer] = distance
    loss = dampening(model)
    loss.backward()
    assert loss.item() == pytest.approx(sum(float(d.square().sum()) for d in expected.values()), rel=1e-4)
    for layer, distance in expected.items():
        torch.testing.assert_close(layer.weight.grad, 2 * distance, rtol=1e-3, atol=1e-5)
        assert all(p.grad is None for p in layer.weight_quantizer.parameters())
    assert layers[1].weight.grad[0, 0, 0, 0] == 0


def test_the_factor_rises_along_a_cosine():
    assert [dampening_factor(share, 0.1) for share in (0.0, 0.25)] == [0, 0]
    assert dampening_factor(0.625, 0.1) == pytest.approx(0.05)
    assert dampening_factor(0.4375, 0.1) == pytest.approx(0.1 * (1 - math.cos(math.pi / 4)) / 2)
    assert [dampening_factor(share, 0.1) for share in (1.0, 1.2)] == pytest.approx([0.1, 0.1])
