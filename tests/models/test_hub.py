"""The network descriptions in models/hub: their counts, and that each can be quantized and folded."""

import copy

import pytest
import torch
from torch import nn

from models.common import C3, C3TR, TransformerBlock
from models.yolo import Detect, DetectionModel, count_gflops, read_model_yaml
from quant.calibrate import calibrate
from quant.fold import fold
from quant.prepare import prepare
from quant.recipe import build_config
from utils.paths import ROOT

P5 = [8, 16, 32]
# Strides, parameters, state_dict keys, convolutions, BatchNorms, GFLOPs at 640x640.
COUNTS = {
    # Measured with YOLOv5 v7.0: yolov3, yolov5s-ghost; yolov5-panet and -LeakyReLU are its l and s.
    "yolov3": (P5, 61_949_149, 439, 75, 72, 155.89),
    "yolov5s-ghost": (P5, 3_897_605, 529, 90, 87, 8.71),
    "yolov5-panet": (P5, 46_563_709, 613, 104, 101, 108.99),
    "yolov5s-LeakyReLU": (P5, 7_235_389, 349, 60, 57, 16.43),
    # Three pooled copies more into SPP's second convolution, and its first one: 4 * 512 * 512 + 2 * 512 more.
    "yolov3-spp": (P5, 61_949_149 + 1_048_576 + 1_024, 445, 76, 73, 156.73),
    # 512 channels more into the two first convolutions (256 each) of the C3 behind the third branch.
    "yolov5-bifpn": (P5, 46_563_709 + 2 * 512 * 256, 613, 104, 101, 109.83),
    # A bottleneck of 256 channels (two norms, 1x1, 3x3) against 10 square matrices (the embedding, q, k, v, their three
    # projections, the attention's output, fc1, fc2) and the biases of 5 of them.
    "yolov5s-transformer": (P5, 7_235_389 - (4 * 256 + 10 * 256**2) + (10 * 256**2 + 5 * 256), 348, 58, 55, 15.91),
    # Published as yolov5l6: 76.8 million parameters, 111.4 GFLOPs.
    "yolov5-p6": ([8, 16, 32, 64], 76_770_172, 795, 135, 131, 111.24),
    # Measured with this project.
    "yolov3-tiny": ([16, 32], 8_852_366, 71, 13, 11, 13.17),
    "yolov5-fpn": (P5, 41_117_565, 547, 93, 90, 99.77),
    "yolov5-p2": ([4, 8, 16, 32], 47_575_804, 735, 125, 121, 129.75),
    "yolov5-p34": ([8, 16], 5_331_518, 311, 53, 51, 14.91),
    "yolov5-p7": ([8, 16, 32, 64, 128], 144_281_723, 977, 166, 161, 115.87),
}


def small(name: str, nc: int = 2) -> DetectionModel:
    """The network with an eighth of the channels and a tenth of the repeats."""
    torch.manual_seed(0)
    config = {**read_model_yaml(f"{name}.yaml"), "depth_multiple": 0.1, "width_multiple": 0.125}
    return DetectionModel(config, nc=nc)


def test_every_description_is_counted():
    known = {path.stem for path in (ROOT / "models" / "hub").glob("*.yaml")}
    assert set(COUNTS) <= known and all(name in COUNTS or name.endswith("6") for name in known)


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name, monkeypatch):
    # Shapes are enough, without arithmetic.
    monkeypatch.setattr(DetectionModel, "_measure_strides", lambda _: None)
    for of_head in ("set_strides", "initialise_biases"):
        monkeypatch.setattr(Detect, of_head, lambda *_: None)
    with torch.device("meta"):
        model = DetectionModel(f"{name}.yaml")
    kinds = [sum(isinstance(module, kind) for module in model.modules()) for kind in (nn.Conv2d, nn.BatchNorm2d)]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    measured = (parameters, len(model.state_dict()), *kinds, round(count_gflops(model), 2))
    assert measured == COUNTS[name][1:]


@pytest.mark.parametrize("name", COUNTS)
def test_every_description_is_quantized_trained_and_folded(name):
    model = small(name)
    assert model.stride.tolist() == COUNTS[name][0]
    side = 2 * max(COUNTS[name][0])
    images = torch.rand(2, 3, side, side)
    prepare(model, build_config("lsq", "4", None, None, None, model.yaml))
    calibrate(model, [images])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = copy.deepcopy(model.state_dict())
    for module in model.train().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # the deepest maps of random networks are constant, and norming those has huge gradients
    sum(level.square().mean() for level in model(images)).backward()
    optimizer.step()
    assert any(not torch.equal(before[key], value) for key, value in model.state_dict().items() if "step" in key)
    model.eval()
    with torch.no_grad():
        expected, folded = model(images)[1], fold(model)(images)[1]
    for left, right in zip(expected, folded, strict=True):
        # A value on a rounding boundary may fall to the other side, and what follows with it.
        assert ((left - right).abs() <= 1e-3 * left.abs().max()).float().mean() > 0.97


def test_transformer_block_equals_the_formula():
    torch.manual_seed(0)
    block = TransformerBlock(8, 8, 4, 1).eval()
    x = torch.rand(2, 8, 3, 5)
    layer, pixels = block.tr[0], x.flatten(2).transpose(1, 2)  # (B, positions, c)
    pixels = pixels + pixels @ block.linear.weight.T + block.linear.bias
    projections = layer.ma.in_proj_weight.chunk(3), layer.ma.in_proj_bias.chunk(3)
    given = [pixels @ matrix.weight.T for matrix in (layer.q, layer.k, layer.v)]
    query, key, value = (g @ w.T + b for g, w, b in zip(given, *projections, strict=True))
    heads = []
    for head in range(4):
        part = slice(2 * head, 2 * head + 2)
        scores = query[..., part] @ key[..., part].transpose(1, 2) / 2**0.5
        heads.append(scores.softmax(-1) @ value[..., part])
    attended = torch.cat(heads, -1) @ layer.ma.out_proj.weight.T + layer.ma.out_proj.bias + pixels
    expected = attended + attended @ layer.fc1.weight.T @ layer.fc2.weight.T
    torch.testing.assert_close(block(x), expected.transpose(1, 2).reshape(x.shape), rtol=1e-4, atol=1e-5)


def test_c3tr_is_a_c3_around_the_transformer():
    assert [name for name, _ in C3TR(16, 32, 2).named_children()] == [name for name, _ in C3(16, 32).named_children()]
    block = C3TR(16, 32, 2)
    assert len(block.m.tr) == 2 and block.m.conv is None and block(torch.rand(1, 16, 4, 6)).shape == (1, 32, 4, 6)
    assert TransformerBlock(16, 32, 4, 1)(torch.rand(1, 16, 4, 6)).shape == (1, 32, 4, 6)
