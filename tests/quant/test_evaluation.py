"""Weights quantized once: the same results to the last bit, from every method."""

import pytest
import torch
from small_detector import save, tiny_detector
from torch import nn

from models.backend import load_backend, load_network
from quant.evaluation import freeze_weights
from quant.layers import QuantConv2d
from quant.registry import QUANTIZERS


@pytest.mark.parametrize("method", list(QUANTIZERS))
def test_frozen_weights_change_no_bit(method):
    model = tiny_detector(method, 4, 2, gabfusion=True).eval()
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before, maps = model(images)
        assert freeze_weights(model) is model
        after, same_maps = model(images)
    assert torch.equal(before, after) and all(map(torch.equal, maps, same_maps))


def test_weights_are_quantized_once():
    model = tiny_detector("lsq", 4, 2).eval()
    layers = [module for module in model.modules() if isinstance(module, QuantConv2d)]
    freeze_weights(model)
    assert layers and all(type(layer.weight_quantizer) is nn.Identity for layer in layers)
    assert all(len(layer.weight[0].unique()) <= 15 for layer in layers[1:-2])


def test_a_loaded_checkpoint_is_frozen_and_measures_as_trained(tmp_path):
    path = save(tiny_detector("lsq", 4, 2), tmp_path / "best.pt")
    backend, (trained, _) = load_backend(path), load_network(path)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    trained = trained.eval().to(memory_format=torch.channels_last)
    layers = [module for module in backend.model.modules() if isinstance(module, QuantConv2d)]
    assert layers and all(type(layer.weight_quantizer) is nn.Identity for layer in layers)
    with torch.no_grad():
        assert torch.equal(backend(images)[0], trained(images)[0])
