import math

import pytest
import torch
from torch import nn

from utils.ema import ModelEMA, unwrap


class Scheduled(nn.Module):
    ema_copied = ("strength",)

    def __init__(self):
        super().__init__()
        self.register_buffer("strength", torch.tensor(0.0))
        self.register_buffer("learned", torch.tensor(0.0))
        self.register_buffer("ready", torch.tensor(False))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Scheduled(), nn.Conv2d(4, 2, 1))


def test_known_decay():
    ema = ModelEMA(nn.Linear(1, 1))
    golden = {1: 0.00049983, 100: 0.0487657, 2000: 0.63205735, 20000: 0.9998546}
    for updates, decay in golden.items():
        assert ema.decay(updates) == pytest.approx(decay, rel=1e-5)


def test_average_equals_float64_reference():
    model = network()
    ema = ModelEMA(model, decay=0.99, tau=10.0)
    expected = {name: value.double() for name, value in model.state_dict().items()}
    for step in range(1, 30):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
            model[2].strength.fill_(step / 30)
            model[2].learned.fill_(step / 7)
            model[2].ready.fill_(step % 2 == 0)
        model[:2](torch.randn(2, 3, 8, 8))  # moves the statistics of the normalisation
        ema.update(model)
        decay = 0.99 * (1 - math.exp(-step / 10))
        for name, value in model.state_dict().items():
            if value.is_floating_point() and name != "2.strength":
                expected[name] = decay * expected[name] + (1 - decay) * value.double()
            else:
                expected[name] = value.double()
    assert ema.updates == 29
    for name, value in ema.ema.state_dict().items():
        torch.testing.assert_close(value.double(), expected[name], atol=1e-5, rtol=1e-5)
    assert ema.ema[2].strength.item() == model[2].strength.item()
    assert ema.ema[2].learned.item() != model[2].learned.item()
    assert ema.ema[1].num_batches_tracked == 29


def test_average_is_apart_from_the_model():
    model = network().train()
    ema = ModelEMA(model, updates=500)
    assert not ema.ema.training and model.training
    assert not any(parameter.requires_grad for parameter in ema.ema.parameters())
    model[0].weight.data.add_(1)
    assert not torch.equal(ema.ema[0].weight, model[0].weight)
    assert ema.updates == 500


def test_works_after_the_model_was_moved():
    model = network()
    ema = ModelEMA(model)
    model.to(torch.float64)  # replaces every buffer
    ema.update(model)
    torch.testing.assert_close(ema.ema[0].weight.double(), model[0].weight, atol=1e-6, rtol=1e-6)
    assert ema.ema[0].weight.dtype == torch.float32


def test_wrapped_models_and_attributes():
    model = network()
    model.names = {0: "cat"}
    wrapped = nn.DataParallel(model)
    assert unwrap(wrapped) is model
    ema = ModelEMA(wrapped)
    model.names[1] = "dog"
    ema.update(wrapped)
    ema.update_attributes(wrapped)
    assert ema.ema.names == {0: "cat", 1: "dog"} and ema.ema.names is not model.names
