"""Detect as matrix products, for files that run in integers.

Traced as it is, the head is a convolution of 3 * (5 + classes) channels, a transposition of its whole result, a split
and two concatenations: in OpenVINO a quarter of a 4-bit yolov5n's time at 640 pixels. Here each anchor has a product

    (H * W, C) codes  x  (C, 5 + classes) weights

whose rows are rows of the result already. What is transposed are the codes in front, of one byte and fewer channels.
With s = sigmoid(product + bias) boxes are decoded as s * (linear + quadratic * s) + cells, where all constants have
5 + classes columns: one fused kernel in OpenVINO. (A product for the boxes alone, decoded and put in front of the rest,
took 1.03 times as long there and 1.06 times in onnxruntime.)

The zero point z of the input joins the bias, b - z * step * sum of the weights: OpenVINO multiplies matrices in
integers only if the codes have none.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.yolo import Detect
from quant.fold import ActivationGrid, IntegerConv2d
from quant.onnx_graph import TracedGrid, integer_weight


class IntegerProduct(nn.Module):
    """x (B, N, C) -> x @ W^T + bias (B, N, rows), with rows of a 1x1 ``IntegerConv2d``; x is codes * step."""

    def __init__(self, convolution: IntegerConv2d, grid: ActivationGrid, first: int, last: int) -> None:
        super().__init__()
        codes, scale = convolution.weight_codes[first:last].flatten(1), convolution.weight_scale[first:last]
        sums = codes.sum(1).double() * scale.double() * grid.output_step.double() * grid.output_zero_point
        bias = torch.zeros(len(codes)) if convolution.bias is None else convolution.bias[first:last]
        self.register_buffer("weight", codes.clone())
        self.register_buffer("scale", scale.clone())
        self.register_buffer("bias", (bias.double() - sums).float())
        self.bits = int(convolution.container_bits)

    def forward(self, x: Tensor) -> Tensor:
        return x @ integer_weight(self.weight, self.scale, self.bits, 1).transpose(0, 1) + self.bias


class MatrixLevel(nn.Module):
    """One level: features (B, C, H, W) -> per anchor (B, H * W, 5 + classes), decoded."""

    def __init__(self, detect: Detect, level: int, grid_name: str) -> None:
        super().__init__()
        convolution = detect.m[level]
        grid = convolution.input_quantizer
        # A number, not the tensor's own: readers of a file with open sizes know how long a row is.
        self.columns = detect.no
        self.stride = float(detect.stride[level])
        anchors = detect.anchors[level].float() * self.stride
        linear, quadratic = torch.ones(self.columns), torch.zeros(detect.na, self.columns)
        linear[:2], linear[2:4], quadratic[:, 2:4] = 2 * self.stride, 0, 4 * anchors.cpu()
        self.register_buffer("linear", linear.to(anchors.device))
        self.register_buffer("quadratic", quadratic.to(anchors.device))
        without_zero_point = copy.deepcopy(grid)
        without_zero_point.output_zero_point = 0
        self.grid = TracedGrid(without_zero_point, grid_name)
        starts = [anchor * detect.no for anchor in range(detect.na)]
        self.products = nn.ModuleList(IntegerProduct(convolution, grid, start, start + detect.no) for start in starts)

    def forward(self, x: Tensor) -> list[Tensor]:
        batch, channels, height, width = x.shape
        rows = self.grid(x).permute(0, 2, 3, 1).reshape(batch, height * width, channels)
        found = []
        for index, product in enumerate(self.products):
            values = product(rows).sigmoid()
            boxes = self.decode(values.reshape(batch, height, width, self.columns), index)
            found.append(boxes.reshape(batch, height * width, self.columns))
        return found

    def decode(self, s: Tensor, anchor: int) -> Tensor:
        """Sigmoids (B, H, W, columns) -> centre = (2 s - 0.5 + cell) * stride, size = (2 s)^2 * anchor, the rest."""
        _, height, width, _ = s.shape
        columns = self.columns
        across, down = (
            (torch.arange(side, device=s.device, dtype=torch.float32) - 0.5) * self.stride for side in (width, height)
        )
        # The runtime pads them with zeros: constants of 85 columns would be a tenth of a small file.
        across, down = (
            F.pad(across.view(1, 1, -1, 1), (0, columns - 1)),
            F.pad(down.view(1, -1, 1, 1), (1, columns - 2)),
        )
        return s * (s * self.quadratic[anchor] + self.linear) + across + down


class MatrixDetect(nn.Module):
    """Takes the place of a folded ``Detect`` for tracing; returns its predictions (B, N, 5 + classes)."""

    def __init__(self, detect: Detect, grid_names: list[str]) -> None:
        super().__init__()
        self.f, self.i = detect.f, detect.i
        self.m = nn.ModuleList(MatrixLevel(detect, level, name) for level, name in enumerate(grid_names))

    def forward(self, x: list[Tensor]) -> Tensor:
        return torch.cat([rows for level, features in zip(self.m, x, strict=True) for rows in level(features)], 1)


def matrix_head(folded: nn.Module) -> nn.Module:
    """Returns a copy of a folded detector for ``quant.onnx_graph.traceable`` whose head is matrix products.

    A head that cannot be written so (its convolutions are not 1x1 over codes of their own) stays as it is.

    Args:
        folded: from ``quant.fold.fold``, with a ``Detect`` as its last layer.
    """
    detect = folded.model[-1]
    names = {module: name for name, module in folded.named_modules()}
    convolutions = list(detect.m)
    for convolution in convolutions:
        grid = getattr(convolution, "input_quantizer", None)
        plain = isinstance(convolution, IntegerConv2d) and convolution.output_quantizer is None
        if not plain or not isinstance(grid, ActivationGrid) or convolution.weight_codes.shape[2:] != (1, 1):
            return folded
    replaced = copy.copy(folded)
    replaced._modules = dict(folded._modules)
    replaced.model = nn.Sequential(*folded.model)
    replaced.model[-1] = MatrixDetect(detect, [names[c.input_quantizer] for c in convolutions])
    return replaced
