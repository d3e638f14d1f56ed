"""The YOLOv5 detector: model YAML -> layers -> ``DetectionModel``, with the ``Detect`` head and its box decoding.

``python models/yolo.py --cfg yolov5s.yaml`` prints the table of layers and the summary of a model.
"""

import argparse
import ast
import copy
import math
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the project's root is not on the path yet
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from models import common
from utils.devices import select_device
from utils.errors import UserError
from utils.log import LOGGER
from utils.paths import ROOT
from utils.yaml_file import read_yaml

BATCH_NORM_EPSILON = 1e-3
BATCH_NORM_MOMENTUM = 0.03
STRIDE_PROBE_SIZE = 256  # pixels: divisible by every stride up to 128

ACTIVATIONS: dict[str, type[nn.Module]] = {
    kind.__name__: kind
    for kind in (
        nn.SiLU, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU, nn.Mish, nn.Hardswish, nn.Hardsigmoid,
        nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Identity,
    )
}  # fmt: skip

# Layers called as kind(input channels, output channels, ...), whose output channels follow the width multiple.
SCALED_LAYERS: dict[str, type[nn.Module]] = {
    kind.__name__: kind
    for kind in (
        common.Conv, common.DWConv, common.DWConvTranspose2d, common.Bottleneck, common.BottleneckCSP, common.CrossConv,
        common.C3, common.C3x, common.C3TR, common.C3Ghost, common.C3SPP, common.GhostConv, common.GhostBottleneck,
        common.SPP, common.SPPF, common.Focus,
    )
} | {"nn.Conv2d": nn.Conv2d, "nn.ConvTranspose2d": nn.ConvTranspose2d}  # fmt: skip
# Of those, the ones that repeat something inside and take the count as their third argument.
REPEATING_LAYERS = {"BottleneckCSP", "C3", "C3x", "C3TR", "C3Ghost"}
PLAIN_WORDS = {"None": None, "True": True, "False": False}


class Detect(nn.Module):
    """The anchor-based detection head: one 1x1 convolution a level, then the decoding of boxes.

    Training: returns the raw maps, one a level, each (B, anchors, H, W, 5 + classes).
    Evaluation: returns (predictions, raw maps); predictions is (B, N, 5 + classes) in float32 with rows ordered by
    level, anchor, y, x and columns centre x, centre y, width, height (input pixels), objectness, class probabilities.
    With ``export`` set only the predictions are returned. Without ``decodes`` predictions is None and the raw maps are
    views, for a caller that decodes a part of them (``confident_rows``).

    Args:
        nc: number of classes.
        anchors: per level a flat list of width, height pairs in pixels, or (as an int) the number of anchors per
            level, which then get placeholder sizes until they are fitted to the data.
        ch: channels of each input map.
    """

    export = False
    decodes = True

    def __init__(self, nc: int, anchors: Sequence[Sequence[float]] | int, ch: Sequence[int]) -> None:
        super().__init__()
        if isinstance(anchors, int):
            anchors = [list(range(2 * anchors))] * len(ch)
        sizes = torch.tensor([list(level) for level in anchors], dtype=torch.float32)
        if len(sizes) != len(ch) or sizes.ndim != 2 or sizes.shape[1] == 0 or sizes.shape[1] % 2:
            raise ValueError(
                f"anchors must be {len(ch)} lists (one per input) of width, height pairs, all equally long; "
                f"got a table of shape {tuple(sizes.shape)}"
            )
        self.nc = nc
        self.no = nc + 5
        self.nl = len(ch)
        self.na = sizes.shape[1] // 2
        # In units of each level's stride once the model knows its strides; in pixels until then.
        self.register_buffer("anchors", sizes.view(self.nl, self.na, 2))
        self.register_buffer("stride", torch.ones(self.nl), persistent=False)
        self.m = nn.ModuleList(nn.Conv2d(channels, self.no * self.na, 1) for channels in ch)

    def forward(self, x: Sequence[Tensor]) -> list[Tensor] | tuple[Tensor, list[Tensor]] | Tensor:
        raw = []
        for convolution, level_input in zip(self.m, x, strict=True):
            y = convolution(level_input)
            batch, _, height, width = y.shape
            y = y.view(batch, self.na, self.no, height, width).permute(0, 1, 3, 4, 2)
            raw.append(y.contiguous() if self.decodes or self.training else y)
        if self.training:
            return raw
        if not self.decodes:
            return None, raw
        predictions = torch.cat([self.decode(level_map, level) for level, level_map in enumerate(raw)], 1)
        return predictions if self.export else (predictions, raw)

    def decode(self, raw: Tensor, level: int) -> Tensor:
        """Turns one raw map (B, anchors, H, W, no) into predictions (B, anchors * H * W, no), always in float32.

        With s = sigmoid(raw): centre = (2 s - 0.5 + cell) * stride, size = (2 s)^2 * anchor.
        """
        batch, anchors, height, width, outputs = raw.shape
        stride = self.stride[level].float()
        anchor_pixels = self.anchors[level].float().view(1, anchors, 1, 1, 2) * stride
        rows = torch.arange(height, device=raw.device, dtype=torch.float32)
        columns = torch.arange(width, device=raw.device, dtype=torch.float32)
        grid_y, grid_x = torch.meshgrid(rows, columns, indexing="ij")
        cell = torch.stack((grid_x, grid_y), -1)
        decoded = _decode_boxes(raw.float().sigmoid(), cell, anchor_pixels, stride)
        return decoded.view(batch, anchors * height * width, outputs)

    @torch.no_grad()
    def confident_rows(self, raw: Sequence[Tensor], threshold: float) -> list[Tensor]:
        """Decodes only what may become a detection: the cells whose objectness is above ``threshold``.

        Of COCO's images a tenth of the cells reach 0.001. Decoding all of them took a fifth of yolov5n's time on a CPU.

        Args:
            raw: maps (B, anchors, H, W, no) of the levels.
            threshold: 0..1.

        Returns:
            Per image (n, no) float32, the rows of ``forward``'s predictions above the threshold, in their order.
        """
        rows, images = [], []
        for values, anchors, stride in zip(raw, self.anchors.float(), self.stride.float(), strict=True):
            image, anchor, row, column = (values[..., 4].float().sigmoid() > threshold).nonzero(as_tuple=True)
            share = values[image, anchor, row, column].float().sigmoid()
            cell = torch.stack((column, row), 1).float()
            rows.append(_decode_boxes(share, cell, anchors[anchor] * stride, stride))
            images.append(image)
        image = torch.cat(images)
        order = image.argsort(stable=True)
        counts = torch.bincount(image, minlength=len(raw[0]))
        return list(torch.cat(rows)[order].split(counts.tolist()))

    @torch.no_grad()
    def set_strides(self, strides: Sequence[float]) -> None:
        """Fixes the strides (pixels per cell) and divides the pixel anchors by them.

        Levels whose anchors run from large to small while strides grow get their anchors in reverse order.
        """
        stride = torch.tensor(strides, dtype=self.anchors.dtype, device=self.anchors.device)
        self.stride.copy_(stride)
        areas = self.anchors.prod(-1).mean(-1)
        if (areas[-1] - areas[0]) * (stride[-1] - stride[0]) < 0:
            LOGGER.info("Anchor levels reversed: their sizes ran against the strides")
            self.anchors.copy_(self.anchors.flip(0))
        self.anchors.div_(stride.view(-1, 1, 1))

    @torch.no_grad()
    def initialise_biases(self) -> None:
        """Starts from 8 objects in a 640 pixel image, and from a class probability of 0.6 / classes.

        Source: focal loss, arXiv 1708.02002, section 3.3 (the prior that keeps the first losses finite).
        """
        for convolution, stride in zip(self.m, self.stride.tolist(), strict=True):
            bias = convolution.bias.view(self.na, self.no)
            bias[:, 4] += math.log(8 / (640 / stride) ** 2)
            bias[:, 5:] += math.log(0.6 / (self.nc - 0.99999))


def _decode_boxes(share: Tensor, cell: Tensor, anchor_pixels: Tensor, stride: Tensor) -> Tensor:
    """Sigmoids (..., no) -> predictions (..., no); cell indices x, y and anchors in pixels are (..., 2)."""
    centre = (share[..., 0:2] * 2 - 0.5 + cell) * stride
    size = (share[..., 2:4] * 2) ** 2 * anchor_pixels
    return torch.cat((centre, size, share[..., 4:]), -1)


@dataclass
class _Row:
    """One row of a model YAML; ``place`` is how messages name it."""

    place: str
    source: int | list[int]
    repeats: int
    name: str
    arguments: list

    def error(self, reason: str) -> UserError:
        return UserError(f"{self.place}: {reason}")


def find_model_yaml(name: str | Path) -> Path:
    """Returns the file, looked up as given, then in ``models/`` and ``models/hub/``. Raises UserError if absent."""
    name = Path(name)
    for candidate in (name, ROOT / "models" / name, ROOT / "models" / "hub" / name, ROOT / name):
        if candidate.is_file():
            return candidate
    known = sorted(path.name for path in (ROOT / "models").rglob("*.yaml"))
    raise UserError(f"Model YAML {name} does not exist. Give a path, or one of: {', '.join(known)}")


def read_model_yaml(path: str | Path) -> dict:
    """Reads a model YAML into a plain dict. Raises UserError if it is absent, no YAML or no mapping."""
    path = find_model_yaml(path)
    config = read_yaml(path)
    if not isinstance(config, dict):
        raise UserError(f"{path}: a model YAML is a mapping with the keys nc, anchors, backbone and head")
    return config


def parse_activation(text: str) -> nn.Module:
    """Builds an activation from text such as ``nn.LeakyReLU(0.1)`` or ``ReLU``: a table look-up, nothing is evaluated.

    Raises:
        ValueError: the text is not an activation of the table with literal arguments.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        call = tree if isinstance(tree, ast.Call) else ast.Call(tree, [], [])
        name = ast.unparse(call.func).removeprefix("torch.").removeprefix("nn.")
        kind = ACTIVATIONS[name]
        positional = [ast.literal_eval(argument) for argument in call.args]
        by_name = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        return kind(*positional, **by_name)
    except (SyntaxError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"'{text}' is not an activation. Write e.g. nn.LeakyReLU(0.1); known: {', '.join(ACTIVATIONS)}"
        ) from error


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _read_rows(config: dict, file: str) -> list[_Row]:
    """Checks the shape of every backbone and head row."""
    rows: list[_Row] = []
    for section in ("backbone", "head"):
        if not isinstance(config.get(section), list) or not config[section]:
            raise UserError(f"{file}: key '{section}' must be a list of rows [from, repeats, module, arguments]")
        for number, row in enumerate(config[section]):
            place = f"{file}: {section} row {number} (layer {len(rows)})"
            if not isinstance(row, list) or len(row) != 4:
                raise UserError(f"{place}: a row is [from, repeats, module, arguments], got {row!r}")
            source, repeats, name, arguments = row
            parsed = _Row(place, source, repeats, name, arguments)
            sources = source if isinstance(source, list) else [source]
            if not sources or not all(_is_count(index) for index in sources):
                raise parsed.error(f"'from' must be a layer number or a list of them, got {source!r}")
            wrong = [index for index in sources if not -max(len(rows), 1) <= index < len(rows)]
            if wrong:
                raise parsed.error(f"'from' names layer {wrong[0]}, but only layers before {len(rows)} exist here")
            if not _is_count(repeats) or repeats < 1:
                raise parsed.error(f"'repeats' must be a whole number of at least 1, got {repeats!r}")
            if not isinstance(name, str):
                raise parsed.error(f"'module' must be a name, got {name!r}")
            if not isinstance(arguments, list):
                raise parsed.error(f"'arguments' must be a list, got {arguments!r}")
            rows.append(parsed)
    return rows


def _resolve_argument(value: object, config: dict) -> object:
    """Replaces the words a YAML row may use; everything else stays what it is."""
    if not isinstance(value, str):
        return value
    if value in PLAIN_WORDS:
        return PLAIN_WORDS[value]
    if value in ("nc", "anchors"):
        return config[value]
    if value.startswith("nn."):
        return parse_activation(value)
    return value


class _Parser:
    """Builds one layer after the other and keeps count of channels."""

    def __init__(self, config: dict, channels: int, file: str) -> None:
        self.config = config
        self.file = file
        self.input_channels = channels
        self.channels: list[int] = []  # of every layer built so far
        self.depth = self._number("depth_multiple", 1.0)
        self.width = self._number("width_multiple", 1.0)
        self.multiple = int(self._number("channel_multiple", 8))
        if not _is_count(config.get("nc")) or config["nc"] < 1:
            raise UserError(f"{file}: key 'nc' must be the number of classes, got {config.get('nc')!r}")
        anchors = config.get("anchors")
        if not isinstance(anchors, list) and not (_is_count(anchors) and anchors > 0):
            raise UserError(f"{file}: key 'anchors' must be a list per level or the number of anchors per level")
        anchors_per_level = (
            len(anchors[0]) // 2 if isinstance(anchors, list) and isinstance(anchors[0], list) else anchors
        )
        self.outputs = anchors_per_level * (config["nc"] + 5) if _is_count(anchors_per_level) else 0

    def _number(self, key: str, default: float) -> float:
        value = self.config.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise UserError(f"{self.file}: key '{key}' must be a number above 0, got {value!r}")
        return value

    def _channels_of(self, source: int) -> int:
        return self.channels[source] if self.channels else self.input_channels

    def build(self, row: _Row) -> nn.Module:
        """Returns the layer of a row and appends its output channels. Raises UserError naming the row."""
        try:
            arguments = [_resolve_argument(value, self.config) for value in row.arguments]
            layer, channels = self._layer(row, arguments)
        except UserError:
            raise
        except (TypeError, ValueError, RuntimeError, IndexError, ArithmeticError) as error:
            raise row.error(f"{row.name} does not accept the arguments {row.arguments}: {error}") from error
        self.channels.append(channels)
        return layer

    def _layer(self, row: _Row, arguments: list) -> tuple[nn.Module, int]:
        sources = row.source if isinstance(row.source, list) else [row.source]
        inputs = [self._channels_of(source) for source in sources]
        repeats = max(round(row.repeats * self.depth), 1) if row.repeats > 1 else row.repeats
        if row.name == "Detect":
            return Detect(*arguments, inputs), sum(inputs)
        if row.name == "Concat":
            return common.Concat(*arguments), sum(inputs)
        if row.name == "Add":
            if len(inputs) < 2 or len(set(inputs)) > 1:
                raise row.error(
                    f"Add needs two or more layers of equally many channels, but {sources} have {inputs}. Put a "
                    "Conv with 1x1 kernel in front of those that differ"
                )
            return common.Add(*arguments), inputs[0]
        if len(sources) > 1:
            raise row.error(f"{row.name} reads one layer, but 'from' lists {len(sources)}")
        if row.name in SCALED_LAYERS:
            return self._scaled_layer(row.name, inputs[0], repeats, arguments)
        if row.name == "Contract":
            gain = arguments[0] if arguments else 2
            return common.Contract(gain), inputs[0] * gain**2
        if row.name == "Expand":
            gain = arguments[0] if arguments else 2
            return common.Expand(gain), inputs[0] // gain**2
        if row.name == "nn.BatchNorm2d":
            return nn.BatchNorm2d(inputs[0]), inputs[0]
        kind = getattr(nn, row.name.removeprefix("nn."), None) if row.name.startswith("nn.") else None
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            known = [*SCALED_LAYERS, "Concat", "Add", "Contract", "Expand", "Detect", "nn.Upsample and others of nn"]
            raise row.error(f"module '{row.name}' is not known. Known: {', '.join(known)}")
        layers = [kind(*arguments) for _ in range(repeats)]
        return (layers[0] if repeats == 1 else nn.Sequential(*layers)), inputs[0]

    def _scaled_layer(self, name: str, channels: int, repeats: int, arguments: list) -> tuple[nn.Module, int]:
        if not arguments or not _is_count(arguments[0]) or arguments[0] < 1:
            raise ValueError("the first argument must be the number of output channels")
        out_channels, *rest = arguments
        if out_channels != self.outputs:  # a convolution that makes raw predictions keeps their number
            out_channels = math.ceil(out_channels * self.width / self.multiple) * self.multiple
        if name in REPEATING_LAYERS:
            rest.insert(0, repeats)
            repeats = 1
        kind = SCALED_LAYERS[name]
        layers = [kind(channels if index == 0 else out_channels, out_channels, *rest) for index in range(repeats)]
        return (layers[0] if repeats == 1 else nn.Sequential(*layers)), out_channels


def parse_model(config: dict, channels: int = 3, file: str = "model YAML") -> tuple[nn.Sequential, list[int]]:
    """Builds the layers of a model.

    Args:
        config: a model YAML as a dict: nc, anchors, backbone, head, and optionally depth_multiple, width_multiple,
            channel_multiple, activation.
        channels: channels of the input image.
        file: how messages name the YAML.

    Returns:
        The layers, each with ``i`` (index), ``f`` (where its input comes from), ``type``, ``np`` (parameters); and the
        sorted indices of the layers whose output is read later than by the next layer.

    Raises:
        UserError: a key or row is wrong; the text names file, row and reason.
    """
    parser = _Parser(config, channels, file)
    layers, save = [], set()
    for index, row in enumerate(_read_rows(config, file)):
        layer = parser.build(row)
        layer.i, layer.f, layer.type, layer.arguments = index, row.source, row.name, row.arguments
        layer.np = sum(parameter.numel() for parameter in layer.parameters())
        sources = row.source if isinstance(row.source, list) else [row.source]
        save.update(source % index for source in sources if source != -1)
        layers.append(layer)
    model = nn.Sequential(*layers)
    if config.get("activation"):
        try:
            common.set_default_activation(model, parse_activation(str(config["activation"])))
        except ValueError as error:
            raise UserError(f"{file}: key 'activation': {error}") from error
        for layer in layers:
            layer.np = sum(parameter.numel() for parameter in layer.parameters())
    return model, sorted(save)


class DetectionModel(nn.Module):
    """A YOLOv5 detector: RGB images (B, ch, H, W) in 0..1, sides multiples of ``image_stride`` -> ``Detect``'s output.

    Attributes: ``model`` (nn.Sequential of the layers), ``save`` (layers whose output is kept), ``yaml`` (plain dict),
    ``names`` (int -> str), ``nc``, ``stride`` (tensor, pixels per cell of each level), ``image_stride`` (int, the
    largest stride of any layer: the levels of yolov5-p34 end at 16, its backbone at 32), ``inplace``.

    Args:
        cfg: a model YAML (path, or name of a file in ``models/``), or its content.
        ch: channels of the image, unless the YAML says.
        nc: number of classes in place of the YAML's.
        anchors: pixel anchors, or their number per level, in place of the YAML's.

    Raises:
        UserError: the YAML is absent or wrong.
    """

    def __init__(
        self,
        cfg: str | Path | dict = "yolov5s.yaml",
        ch: int = 3,
        nc: int | None = None,
        anchors: Sequence[Sequence[float]] | float | None = None,
    ) -> None:
        super().__init__()
        if isinstance(cfg, dict):
            self.yaml_file, self.yaml = str(cfg.get("yaml_file", "model YAML")), copy.deepcopy(cfg)
        else:
            self.yaml_file, self.yaml = Path(cfg).name, read_model_yaml(cfg)
        self.yaml["ch"] = self.yaml.get("ch", ch)
        if nc is not None and nc != self.yaml.get("nc"):
            LOGGER.debug(f"{self.yaml_file}: nc={self.yaml.get('nc')} replaced by nc={nc}")
            self.yaml["nc"] = nc
        if anchors is not None:
            counted = isinstance(anchors, int | float)
            self.yaml["anchors"] = round(anchors) if counted else [list(level) for level in anchors]
        self.model, self.save = parse_model(self.yaml, self.yaml["ch"], self.yaml_file)
        self.nc = self.yaml["nc"]
        self.names = {index: str(index) for index in range(self.nc)}
        self.inplace = self.yaml.get("inplace", True)
        if not isinstance(self.model[-1], Detect):
            raise UserError(f"{self.yaml_file}: the last row must be Detect, found {self.model[-1].type}")
        self._set_up_batch_norm()
        self.detect.set_strides(self._measure_strides())
        self.detect.initialise_biases()

    @property
    def detect(self) -> Detect:
        """The detection head, which is the last layer."""
        return self.model[-1]

    @property
    def stride(self) -> Tensor:
        """Pixels per cell of each level (levels,)."""
        return self.model[-1].stride

    @property
    def feature_layers(self) -> list[int]:
        """Indices of the layers that feed ``Detect``."""
        return [source % self.detect.i for source in self.detect.f]

    def forward(self, x: Tensor, features: Sequence[int] = ()):
        """Runs the network.

        Args:
            x: images (B, ch, H, W).
            features: indices of layers whose output is wanted too.

        Returns:
            ``Detect``'s output; with ``features``, the pair (output, {index: that layer's output}). Those are the raw
            outputs, before any reader quantizes them.
        """
        outputs: list[Tensor | None] = []
        for layer in self.model:
            if isinstance(layer.f, list):
                x = [x if source == -1 else outputs[source] for source in layer.f]
            elif layer.f != -1:
                x = outputs[layer.f]
            x = layer(x)
            outputs.append(x if layer.i in self.save or layer.i in features else None)
        return (x, {index: outputs[index] for index in features}) if features else x

    def fuse(self) -> "DetectionModel":
        """Folds every BatchNorm into its convolution, in place, where that is a plain float one. Returns the model."""
        for module in self.modules():
            if isinstance(module, common.Conv):
                module.fuse()
        return self

    def info(self, image_size: int = 640) -> str:
        """Returns one line: convolutions, parameters, and GFLOPs (2 per multiply-add, convolutions only)."""
        parameters = sum(parameter.numel() for parameter in self.parameters())
        convolutions = sum(isinstance(module, nn.Conv2d) for module in self.modules())
        name = self.yaml_file.removesuffix(".yaml")
        return (
            f"{name}: {len(self.model)} layers, {convolutions} convolutions, {parameters:,} parameters, "
            f"{count_gflops(self, image_size):.2f} GFLOPs at {image_size}x{image_size}"
        )

    def table(self) -> str:
        """Returns the table of layers: index, from, parameters, module, arguments."""
        lines = [f"{'':>3}{'from':>18}{'parameters':>12}  {'module':<16}arguments"]
        lines += [
            f"{layer.i:>3}{layer.f!s:>18}{layer.np:>12}  {layer.type:<16}{layer.arguments}" for layer in self.model
        ]
        return "\n".join(lines)

    def _set_up_batch_norm(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = BATCH_NORM_EPSILON
                module.momentum = BATCH_NORM_MOMENTUM

    def _measure_strides(self) -> list[float]:
        """Strides of the levels, by a blank image; sets ``image_stride``. A row that does not fit its inputs is named.

        Not on the meta device: its first activation function imports PyTorch's compiler. Loading yolov5n.pt takes
        0.12 s in place of 2.1 s.
        """
        size = STRIDE_PROBE_SIZE
        detect = self.model[-1]
        modes = {module: module.training for module in self.modules()}
        like = next(self.parameters())
        image = torch.zeros(1, self.yaml["ch"], size, size, device=like.device, dtype=like.dtype)
        self.eval()
        with _place_of_failure(self), torch.no_grad():
            _, maps = self(image, range(detect.i))
        for module, training in modes.items():
            module.training = training
        self.image_stride = max(size // made.shape[-2] for made in maps.values())
        return [size / maps[source % detect.i].shape[-2] for source in detect.f]


@contextmanager
def _place_of_failure(model: DetectionModel):
    """Turns a shape mismatch inside the network into a UserError that names the row of the YAML."""
    current: list[nn.Module] = []
    hooks = [layer.register_forward_pre_hook(lambda layer, _: current.append(layer)) for layer in model.model]
    try:
        yield
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        layer = current[-1]
        backbone = len(model.yaml["backbone"])
        section, number = ("backbone", layer.i) if layer.i < backbone else ("head", layer.i - backbone)
        place = f"{model.yaml_file}: {section} row {number} (layer {layer.i})"
        raise UserError(f"{place}: {layer.type} does not fit what it reads from {layer.f}: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()


def _run_on_meta(model: DetectionModel, size: int, features: Sequence[int] = ()):
    """One evaluation-mode pass without arithmetic: tensors on the meta device have shapes only."""
    tensors = {name: tensor.detach().to("meta") for name, tensor in model.named_parameters()}
    tensors |= {name: tensor.to("meta") for name, tensor in model.named_buffers()}
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        image = torch.empty(1, model.yaml["ch"], size, size, device="meta", dtype=next(iter(tensors.values())).dtype)
        return torch.func.functional_call(model, tensors, (image,), {"features": features})
    finally:
        for module, training in modes.items():
            module.training = training


@torch.no_grad()
def count_gflops(model: DetectionModel, image_size: int = 640) -> float:
    """Returns 1e-9 * 2 * multiply-adds of all convolutions for one square image of ``image_size`` pixels."""
    operations = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal operations
        # Each output value (for a transposed convolution: each input value) meets one filter of the weight.
        values = inputs[0] if isinstance(module, nn.ConvTranspose2d) else output
        operations += 2 * values.numel() * module.weight[0].numel()

    kinds = (nn.Conv2d, nn.ConvTranspose2d)
    hooks = [module.register_forward_hook(count) for module in model.modules() if isinstance(module, kinds)]
    try:
        _run_on_meta(model, image_size)
    finally:
        for hook in hooks:
            hook.remove()
    return operations / 1e9


def model_from_weights(weights) -> DetectionModel:
    """Builds the float model a ``utils.checkpoint.Weights`` describes and loads all of its tensors.

    Raises:
        UserError: tensors are missing, left over or of another shape (a quantized checkpoint needs ``quant.prepare``).
    """
    model = DetectionModel(weights.model_yaml)
    try:
        model.load_state_dict(weights.state_dict, strict=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{weights.path}: its tensors do not fit its model description: {reason}") from error
    model.names = dict(weights.names)
    return model


def _profile(model: DetectionModel, batch_size: int, device: torch.device, by_layer: bool) -> None:
    """Logs milliseconds of an evaluation pass on a 640 pixel batch, in all or for each layer."""
    image = torch.rand(batch_size, model.yaml["ch"], 640, 640, device=device)
    moments: list[float] = []

    def stamp(*_) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        moments.append(time.perf_counter())

    hooks = [layer.register_forward_hook(stamp) for layer in model.model]
    with torch.no_grad():
        model.eval()(image)
        moments.clear()
        stamp()
        model(image)
    for hook in hooks:
        hook.remove()
    if by_layer:
        for layer, start, end in zip(model.model, moments, moments[1:], strict=False):
            LOGGER.info(f"{layer.i:>3} {layer.type:<16}{(end - start) * 1e3:8.2f} ms")
    LOGGER.info(f"{(moments[-1] - moments[0]) * 1e3:.1f} ms for a batch of {batch_size} at 640x640 on {device}")


def main(arguments: list[str] | None = None) -> None:
    """Command line: builds a model and prints its layers."""
    parser = argparse.ArgumentParser(description="Print the layers of a model YAML.")
    parser.add_argument("--cfg", default="yolov5s.yaml", help="model YAML")
    parser.add_argument("--batch-size", type=int, default=1, help="images per profiled pass")
    parser.add_argument("--device", default="", help="cpu, or the number of a GPU")
    parser.add_argument("--profile", action="store_true", help="time one pass")
    parser.add_argument("--line-profile", action="store_true", help="time one pass layer by layer")
    parser.add_argument("--test", action="store_true", help="build every YAML in models/")
    options = parser.parse_args(arguments)
    if options.test:
        for path in sorted((ROOT / "models").rglob("*.yaml")):
            LOGGER.info(DetectionModel(path).info())
        return
    device = select_device(options.device)
    model = DetectionModel(options.cfg).to(device)
    LOGGER.info(model.table())
    LOGGER.info(model.info())
    if options.profile or options.line_profile:
        _profile(model, options.batch_size, device, options.line_profile)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        LOGGER.error(str(error))
        sys.exit(1)
