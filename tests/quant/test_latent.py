"""The float weights behind codes: those that were quantized, whatever the calibration moved into them."""

import pytest
import torch

from models.yolo import DetectionModel
from quant.calibrate import calibrate
from quant.latent import latent_state
from quant.prepare import prepare, quantizers
from quant.recipe import build_config
from utils.errors import UserError


def sound_model(seed: int = 0) -> DetectionModel:
    torch.manual_seed(seed)
    model = DetectionModel("yolov5n.yaml", nc=3)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.3, 3.0)  # channels of different size: something to equalize
    return model


@pytest.mark.parametrize("method", ["lsq", "pact", "dsq", "n2uq"])
def test_calibration_is_taken_back(method):
    before = {name: value.clone() for name, value in sound_model().state_dict().items()}
    model = prepare(sound_model(), build_config(method, 3))
    calibrate(model, [torch.rand(2, 3, 64, 64)])
    equalized = [q.inverse_equalizer for q in quantizers(model).values() if q.inverse_equalizer is not None]
    assert len(equalized) > 10 and all((factors != 1).any() for factors in equalized)
    held = {name: value.clone() for name, value in model.state_dict().items()}
    state = latent_state(model)
    assert state.keys() == before.keys()
    for name, value in before.items():
        torch.testing.assert_close(state[name], value, rtol=1e-6, atol=0)
    assert all(torch.equal(value, held[name]) for name, value in model.state_dict().items())  # left as it is


def test_weights_come_back_whatever_the_statistics_are():
    """Those of the codes may make the float network's activations overflow."""
    model = prepare(sound_model(), build_config("lsq", 3))
    calibrate(model, [torch.rand(2, 3, 64, 64)])
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.fill_(1e-30)
    state = latent_state(model)
    before = sound_model().state_dict()
    for name, value in state.items():
        assert torch.isfinite(value).all()
        if name.endswith("conv.weight"):
            torch.testing.assert_close(value, before[name], rtol=1e-6, atol=0)


def test_branch_factors_have_no_place():
    model = prepare(sound_model(), build_config("lsq", 4, gabfusion=True))
    with pytest.raises(UserError, match="without --gabfusion"):
        latent_state(model)
