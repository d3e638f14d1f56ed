"""A training step on a GPU mixes no devices, and nothing in it reads a number, for which the host would have to wait.

Fake tensors stand for those of a GPU: they have shapes and devices but no values, and refuse to be read.
"""

import copy
import sys

import pytest
import torch
from small_detector import SMALL
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from models.yolo import DetectionModel
from quant.calibrate import calibrate
from quant.prepare import prepare, quantizers
from quant.recipe import build_config
from quant.training import QuantizedTraining
from utils.ema import ModelEMA
from utils.hyp import DEFAULT_FILE, load_hyp
from utils.loss import DetectionLoss, scale_loss_gains


def move(module, mode, moved):
    """Puts fake tensors on ``cuda`` for all parameters and buffers."""

    def fake(tensor):
        if id(tensor) not in moved:
            copied = mode.from_tensor(tensor.detach()).to("cuda")
            wrapped = nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied
            moved[id(tensor)] = wrapped, tensor  # the original too, so that no other gets its id
        return moved[id(tensor)][0]

    for part in module.modules():
        for state in (part._parameters, part._buffers):
            state.update({name: fake(tensor) for name, tensor in state.items() if tensor is not None})


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return DetectionModel(copy.deepcopy(SMALL))


CASES = [
    ("lsq", "learnable"),
    ("lsq", "backward"),
    *((method, "feedback") for method in ("lsq", "pact", "dsq", "n2uq")),
]


@pytest.mark.parametrize("method, balance", CASES)
def test_nothing_waits(method, balance, network):
    step = Step(method, balance, network)
    with step.mode:
        step()


def test_a_number_that_is_read_is_noticed(network):
    step = Step("lsq", "learnable", network)
    with step.mode, pytest.raises(DataDependentOutputException):
        float(step())


class Step:
    """All of a step but the backward pass and the fused optimizer, which want a real device."""

    def __init__(self, method, balance, network):
        config = build_config(method, 4, gabfusion=balance, ada=True)
        self.model = prepare(copy.deepcopy(network), config).train()
        calibrate(self.model, [torch.rand(2, 3, 64, 64)])
        self.ema = ModelEMA(self.model)
        teacher = copy.deepcopy(network).eval().fuse()
        self.companion = QuantizedTraining(self.model, self.ema.ema, config, teacher, 10)
        detect = self.model.detect
        gains = scale_loss_gains(load_hyp(DEFAULT_FILE), detect.nl, detect.nc, 64)
        self.loss = DetectionLoss(detect.anchors, detect.stride, detect.nc, gains)
        self.mode, moved = FakeTensorMode(allow_non_fake_inputs=True), {}
        with self.mode:
            for module in (self.model, self.ema.ema, teacher, self.loss):
                move(module, self.mode, moved)
            self.images = torch.rand(4, 3, 64, 64, device="cuda").to(memory_format=torch.channels_last)
            self.targets = torch.rand(10, 6, device="cuda")

    def __call__(self):
        self.companion.set_progress(0.3)
        with torch.autocast("cuda", torch.float16):
            raw, maps = self.model(self.images, features=self.companion.features)
            loss, _ = self.loss(raw, self.targets, shared=True)
            loss = loss + sum(self.companion.distillation(self.images, maps, raw).values())
            penalty = self.companion.penalty(4)
            loss = loss if penalty is None else loss + penalty
        for parameter in self.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 10.0)
        self.companion.after_backward(torch.ones((), device="cuda"))
        self.ema.update(self.model)
        return loss


def test_quantizers_are_on_the_device_before_the_fusion_nodes_are_looked_for(network, monkeypatch):
    devices = []
    monkeypatch.setattr(
        sys.modules[prepare.__module__],
        "insert_fusion",
        lambda model, *_: devices.extend(t.device.type for q in quantizers(model).values() for t in q.buffers()),
    )
    prepare(copy.deepcopy(network).to("meta"), build_config("lsq", 4, gabfusion=True))
    assert set(devices) == {"meta"}
