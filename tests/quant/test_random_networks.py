"""Property: whatever network is put together of the detector's blocks, its file computes the network's codes.

Each example is prepared, calibrated, folded, exported and run by onnxruntime; every quantizer and every layer is then
judged on the runtime's own inputs. More examples than the usual few: ``EXAMPLES=200 python -m pytest`` this file.
"""

import os
import random

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_detector import images
from torch import Tensor, nn

from models.common import C3, SPPF, Add, Concat, Conv
from quant import QuantConfig, calibrate, fold, prepare, set_strength
from quant.gabfusion import fusion_nodes
from quant.onnx_graph import build, trace, traceable
from quant.prepare import fusion_points
from quant.registry import QUANTIZERS
from quant.trace import trace_flow
from quant.verify import references, verify

SIDE = 16
KINDS = ("conv", "grouped", "down", "up", "c3", "sppf", "concat", "residual", "sum")
ACTIVATIONS = (nn.SiLU, nn.ReLU, lambda: nn.LeakyReLU(0.1), nn.Identity)


class RandomNetwork(nn.Module):
    """Blocks in the order of ``kinds``; channels are often odd. Images (B, 3, 16, 16) -> (B, positions, 6)."""

    def __init__(self, kinds: list[str], seed: int) -> None:
        super().__init__()
        self.random = random.Random(seed)
        torch.manual_seed(seed)
        self.blocks, self.inputs = nn.ModuleList(), []
        channels, sides = [3], [SIDE]
        for kind in ["conv", *kinds]:
            block, inputs, width, side = self._block(kind, channels, sides)
            self.blocks.append(block)
            self.inputs.append(inputs)
            channels.append(width)
            sides.append(side)
        self.last = nn.Conv2d(channels[-1], 6, 1)
        self._randomise_norms()

    def _block(self, kind: str, channels: list[int], sides: list[int]) -> tuple[nn.Module, list[int], int, int]:
        """A block, the numbers of the tensors it reads, its channels and its side."""
        newest, side, width = len(channels) - 1, sides[-1], channels[-1]
        chosen, act = self.random.randint(3, 13), self.random.choice(ACTIVATIONS)()
        if kind == "down" and side > 4:
            return Conv(width, chosen, 3, 2, act=act), [newest], chosen, side // 2
        if kind == "up" and side < SIDE:
            return nn.Upsample(scale_factor=2), [newest], width, side * 2
        if kind == "grouped":
            groups = self.random.choice([g for g in range(1, width + 1) if width % g == 0])
            return Conv(width, groups * 3, 3, g=groups, act=act), [newest], groups * 3, side
        if kind == "c3":
            block = C3(width, chosen, self.random.randint(1, 2), self.random.random() < 0.5)
            return block, [newest], chosen, side
        if kind == "sppf":
            return SPPF(width, chosen, 5), [newest], chosen, side
        if kind == "concat":  # a branch may be read twice
            fitting = [number for number in range(len(channels)) if sides[number] == side]
            inputs = [newest, *self.random.choices(fitting, k=self.random.randint(1, 2))]
            return Concat(), inputs, sum(channels[number] for number in inputs), side
        if kind in ("residual", "sum"):
            fitting = [n for n in range(newest) if (sides[n], channels[n]) == (side, width)]
            if kind == "sum" and fitting:
                return Add(), [newest, self.random.choice(fitting)], width, side
            return Residual(Conv(width, width, 3, act=act)), [newest], width, side
        return Conv(width, chosen, self.random.choice([1, 3]), act=act), [newest], chosen, side

    def _randomise_norms(self) -> None:
        for norm in self.modules():
            if isinstance(norm, nn.BatchNorm2d):
                nn.init.uniform_(norm.weight, 0.5, 2.0)
                norm.weight.data[::3] *= -1
                norm.weight.data[1::5] = 0
                nn.init.normal_(norm.bias, 0.0, 0.5)
                norm.running_mean.normal_(0, 0.2)
                norm.running_var.uniform_(0.1, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        tensors = [x]
        for block, inputs in zip(self.blocks, self.inputs, strict=True):
            read = [tensors[number] for number in inputs]
            tensors.append(block(read if isinstance(block, Concat | Add) else read[0]))
        return self.last(tensors[-1]).flatten(2).transpose(1, 2)


class Residual(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


def prepared(network: nn.Module, method: str, bits: int, gabfusion: bool, output: int | None) -> nn.Module:
    keys = {"method": method, "weight": {"bits": bits}, "activation": {"bits": bits, "output": output}}
    example = images(1, SIDE, SIDE)
    joins = fusion_points(
        network.eval(), "neck", trace_flow(network, example)
    )  # none where it joins copies of one tensor
    config = QuantConfig.from_dict(keys | {"gabfusion": {"enabled": gabfusion and bool(joins)}})
    prepare(network, config, example)
    calibrate(network, [images(4, SIDE, SIDE, seed=2)])
    for node in fusion_nodes(network).values():
        node.logits.data.copy_(torch.linspace(0.4, -0.2, len(node.logits)))
    set_strength(network, 0.0)
    return network.eval()


@settings(
    max_examples=int(os.environ.get("EXAMPLES", "10")), deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=3, max_size=7),
    seed=st.integers(0, 10_000),
    method=st.sampled_from(sorted(QUANTIZERS)),
    bits=st.sampled_from([2, 3, 4, 8]),
    gabfusion=st.booleans(),
    output=st.sampled_from([None, None, 8]),
    int4=st.booleans(),
)
def test_a_file_computes_the_codes_of_its_network(kinds, seed, method, bits, gabfusion, output, int4):
    network = prepared(RandomNetwork(kinds, seed), method, bits, gabfusion, output)
    folded = fold(network)
    traced = trace(traceable(folded), torch.zeros(1, 3, SIDE, SIDE))
    file = build(traced, 21 if int4 else 17, int4)
    result = verify(folded, file, references(folded, list(images(2, SIDE, SIDE)), trained=network))
    assert result.holds, f"{kinds}\n{result.table()}"
    convolutions = sum(isinstance(module, nn.Conv2d) for module in network.modules())
    assert result.layers.compared > 100 * convolutions / 2 and result.quantizers.unexplained == 0
    assert result.layers.unexplained == 0
