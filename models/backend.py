"""One face for weights files of every kind: PyTorch checkpoints (YOLOv5's and ours), ONNX, OpenVINO, TorchScript.

    backend = load_backend("best.onnx", torch.device("cpu"))
    decoded, raw = backend(images)

``decoded`` is (B, N, 5 + classes): box centre, width and height in input pixels, objectness, class probabilities. A
file that ends in suppression (``export.py --nms``) gives its detections instead; ``suppress`` takes either.
"""

import ast
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from models.yolo import DetectionModel, model_from_weights
from utils.checkpoint import Weights, read_weights
from utils.downloads import find_weights
from utils.errors import UserError
from utils.log import LOGGER
from utils.nms import non_max_suppression
from utils.suppression import Suppression

DEFAULT_STRIDE = 32
OPENVINO_SUFFIX = "_openvino_model"
LARGEST_STRIDE = 1024  # YOLOv5's P7 models have 128


class Backend:
    """A loaded detector that is called with images.

    Attributes:
        stride: the sides of an image must be multiples of it (pixels).
        names: class index -> name; ``nc`` is their number.
        fixed_batch: images per call if the file takes no other number, else None. Calls with another number work: they
            are cut into pieces, and the last one is filled up.
        fixed_size: (height, width) if the file takes no other, else None.
        is_pt: whether this is a PyTorch model, which also returns raw maps.
        suppression: how the file itself suppresses overlapping boxes, or None.
        metadata: what the file says of itself, as text.
    """

    is_pt = False
    fixed_batch: int | None = None
    fixed_size: tuple[int, int] | None = None
    suppression: Suppression | None = None
    metadata: Mapping[str, str] = {}

    def __init__(self, path: Path, stride: int, names: Mapping[int, str], device: torch.device) -> None:
        self.path, self.stride, self.names, self.device = path, int(stride), dict(names), device

    @property
    def nc(self) -> int:
        return len(self.names)

    def __call__(self, images: Tensor) -> tuple[Tensor | list[Tensor], list[Tensor] | None]:
        """Images (B, 3, H, W), RGB, 0..1 -> (decoded (B, N, 5 + classes) on ``device``, raw maps or None).

        With ``suppression`` the first is a list: of each image (n, 6) x1, y1, x2, y2, confidence, class.

        Raises:
            UserError: the file does not take images of this size.
        """
        size = tuple(images.shape[-2:])
        if self.fixed_size and size != self.fixed_size:
            height, width = self.fixed_size
            given = f"--imgsz {height}" if height == width else f"--imgsz {height} {width}"
            raise UserError(
                f"{self.path} takes images of {height}x{width} pixels and got {size[0]}x{size[1]}: pass {given}, or "
                "export with --dynamic"
            )
        if size[0] % self.stride or size[1] % self.stride:
            raise UserError(f"{self.path}: image sides must be multiples of {self.stride}, got {size[0]}x{size[1]}")
        return self.run(images)

    def run(self, images: Tensor) -> tuple[Tensor | list[Tensor], list[Tensor] | None]:
        raise NotImplementedError

    def warm_up(self, size: tuple[int, int], batch_size: int = 1) -> None:
        """Runs a blank batch, so that a first measured one has no start-up costs in it."""
        self(torch.zeros(batch_size, 3, *(self.fixed_size or size), device=self.device))


class TorchBackend(Backend):
    """A checkpoint, its tensors channels last: 1.4 times as fast on a CPU. Float networks have their BatchNorm folded;
    quantized ones compute as they were trained, with their weights quantized once."""

    is_pt = True

    def __init__(self, path: Path, device: torch.device, half: bool = False) -> None:
        model, _ = load_network(path)
        if half and getattr(model, "quantization", None):
            LOGGER.warning(f"{path}: quantized models compute in float32; --half ignored")
            half = False
        model = model.fuse().eval().to(device)
        if getattr(model, "quantization", None):
            from quant.compilation import compile_quantizers  # only now, see ``load_network``
            from quant.evaluation import freeze_weights

            freeze_weights(model)
            if device.type == "cpu":
                compile_quantizers(model, required=False)
        model = model.to(memory_format=torch.channels_last)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.model: nn.Module = model.half() if half else model
        self.half = half
        super().__init__(path, model.image_stride, model.names, device)

    @torch.inference_mode()
    def run(self, images: Tensor) -> tuple[Tensor, list[Tensor] | None]:
        images = images.to(self.device)
        return self.model(images.half() if self.half else images.float())


class ExportedBackend(Backend):
    """A file that another runtime computes, on arrays of a batch size that may be fixed."""

    half = False

    def run(self, images: Tensor) -> tuple[Tensor | list[Tensor], None]:
        images = images.detach().to("cpu", torch.float16 if self.half else torch.float32)
        pieces = images.split(self.fixed_batch or max(len(images), 1))
        outputs = [self._run_piece(piece) for piece in pieces]
        if self.suppression is None:
            return torch.cat([decoded for decoded, *_ in outputs]).float().to(self.device), None
        tables = [(rows, int(count)) for table, counts in outputs for rows, count in zip(table, counts, strict=True)]
        return [rows[:count].float().to(self.device) for rows, count in tables], None

    def _run_piece(self, images: Tensor) -> list[Tensor]:
        missing = (self.fixed_batch or len(images)) - len(images)
        padded = torch.cat([images, images.new_zeros(missing, *images.shape[1:])]) if missing else images
        return [output[: len(images)] for output in self.infer(padded.contiguous())]

    def infer(self, images: Tensor) -> list[Tensor]:
        """One call of the runtime: a batch it takes -> its outputs, each with the batch as its first axis."""
        raise NotImplementedError


class OnnxBackend(ExportedBackend):
    """An ONNX file in onnxruntime, with as many threads as PyTorch uses."""

    def __init__(self, path: Path, device: torch.device, data: str | Path | None = None) -> None:
        self.session = _open_onnx(path, device)
        given = self.session.get_inputs()[0]
        self.input_name = given.name
        self.output_names = [output.name for output in self.session.get_outputs()]
        self.half = given.type == "tensor(float16)"
        batch, _, height, width = given.shape
        self.fixed_batch = batch if isinstance(batch, int) else None
        self.fixed_size = (height, width) if isinstance(height, int) and isinstance(width, int) else None
        self.metadata = dict(self.session.get_modelmeta().custom_metadata_map)
        self.suppression = Suppression.from_metadata(self.metadata)
        last = self.session.get_outputs()[0].shape[-1]
        says = isinstance(last, int) and not self.suppression  # after suppression there are always six
        names = read_names(path, self.metadata, data, last if says else None)
        super().__init__(path, read_stride(path, self.metadata), names, device)

    def infer(self, images: Tensor) -> list[Tensor]:
        names = self.output_names if self.suppression else self.output_names[:1]
        return [torch.from_numpy(output) for output in self.session.run(names, {self.input_name: images.numpy()})]


def suppress(
    rows: Tensor | Sequence[Tensor],
    suppression: Suppression | None,
    confidence_threshold: float,
    iou_threshold: float,
    classes: Sequence[int] | None = None,
    agnostic: bool = False,
    max_detections: int = 300,
    **options,
) -> list[Tensor]:
    """``non_max_suppression`` of what a backend gave, or what is asked for of detections that are suppressed already.

    Args:
        rows: (B, N, 5 + classes), or with ``suppression`` of each image (n, 6).
        suppression: the backend's. Its IoU threshold stands, and its confidence threshold where that is the higher one.
    """
    if suppression is None:
        return non_max_suppression(
            rows, confidence_threshold, iou_threshold, classes, agnostic, max_detections=max_detections, **options
        )
    wanted = None if classes is None else torch.as_tensor(list(classes))
    found = []
    for detections in rows:
        keep = detections[:, 4] > confidence_threshold
        if wanted is not None:
            keep &= (detections[:, 5:6] == wanted.to(detections)).any(1)
        found.append(detections[keep][:max_detections])
    return found


def load_network(path: str | Path) -> tuple[DetectionModel, Weights]:
    """Rebuilds the network of a checkpoint, float or quantized, on the CPU, in training mode, BatchNorm not folded.

    Raises:
        UserError: no such file, or not a checkpoint of a YOLOv5 detector.
    """
    weights = read_weights(path)
    if weights.quantization is None:
        return model_from_weights(weights), weights
    # Only now: float models must work without the quantization code, and ``quant`` imports ``models``.
    from quant.prepare import model_from_checkpoint

    return model_from_checkpoint(weights.checkpoint), weights


def load_backend(
    path: str | Path, device: torch.device | str = "cpu", data: str | Path | None = None, half: bool = False
) -> Backend:
    """Loads a weights file.

    Args:
        path: ``.pt`` (YOLOv5's or this project's), ``.onnx``, ``.torchscript``, or an OpenVINO folder or ``.xml``.
        device: where a PyTorch model computes, and where the results lie.
        data: a data set YAML, asked for class names if an exported file does not say them.
        half: compute in 16 bits: float16 in PyTorch float models, what the processor has in OpenVINO.

    Raises:
        UserError: no such file, a kind of file that is not supported, a broken one, or its runtime is not installed.
    """
    path, device = find_weights(path), torch.device(device)
    if not path.exists():
        raise UserError(
            f"{path}: no such file. Give a checkpoint (.pt) or an exported model (.onnx, .torchscript, "
            f"...{OPENVINO_SUFFIX}) with --weights"
        )
    loaders: dict[str, Callable[[], Backend]] = {
        ".pt": lambda: TorchBackend(path, device, half),
        ".onnx": lambda: OnnxBackend(path, device, data),
        ".torchscript": lambda: _torchscript(path, device, data),
        ".xml": lambda: _openvino(path, device, data, half),
    }
    suffix = ".xml" if path.is_dir() else path.suffix.lower()
    if suffix not in loaders:
        raise UserError(
            f"{path}: '{path.suffix}' files are not supported, only {', '.join(loaders)} and OpenVINO folders"
        )
    return loaders[suffix]()


def is_exported(path: str | Path) -> bool:
    """Whether the path names a file (or an OpenVINO folder) that another runtime than PyTorch's modules computes.

    What is not there is told by its name.
    """
    path = Path(path)
    if path.suffix.lower() in (".onnx", ".torchscript", ".xml") or any(path.glob("*.xml")):
        return True
    return path.name.endswith(OPENVINO_SUFFIX)


def _openvino(path: Path, device: torch.device, data: str | Path | None, half: bool) -> Backend:
    from models.openvino_backend import OpenVinoBackend  # it derives from a class of this file

    return OpenVinoBackend(path, device, data, half)


def _torchscript(path: Path, device: torch.device, data: str | Path | None) -> Backend:
    from models.torchscript_backend import TorchScriptBackend

    return TorchScriptBackend(path, device, data)


def open_session(content: bytes | str, name: str, providers: tuple[str, ...] = ()):
    """Opens an ONNX model (its bytes or its path) in onnxruntime; ``name`` is what messages call it.

    Raises:
        UserError: onnxruntime is not installed, or refuses the model.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"{name}: running ONNX files needs onnxruntime: pip install onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    # Between two calls its threads would otherwise wait busily and take the cores from what PyTorch does meanwhile.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    wanted = [provider for provider in providers if provider in onnxruntime.get_available_providers()]
    if len(wanted) < len(providers):
        LOGGER.warning(f"{name}: this onnxruntime has no {' or '.join(providers)}; it computes on the CPU")
    try:
        return onnxruntime.InferenceSession(content, options, providers=[*wanted, "CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no base class of their own
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{name}: onnxruntime cannot load it: {reason}") from error


def _open_onnx(path: Path, device: torch.device):
    session = open_session(str(path), str(path), ("CUDAExecutionProvider",) if device.type == "cuda" else ())
    given = session.get_inputs()
    if len(given) != 1 or len(given[0].shape) != 4 or len(session.get_outputs()[0].shape) != 3:
        raise UserError(
            f"{path}: expected one input (batch, 3, height, width) and an output (batch, boxes, 5 + classes)"
        )
    return session


def read_stride(path: Path, metadata: Mapping[str, str]) -> int:
    """The stride that a file's metadata names, else 32 with a warning."""
    stride = metadata_stride(metadata)
    if stride is None:
        LOGGER.warning(f"{path}: no stride in its metadata, assuming {DEFAULT_STRIDE}")
        return DEFAULT_STRIDE
    return stride


def metadata_stride(metadata: Mapping[str, str]) -> int | None:
    """The stride that an ONNX file says, in pixels; None if it says none that makes sense."""
    try:
        stride = int(metadata["stride"])
    except (KeyError, ValueError):
        return None
    return stride if 1 <= stride <= LARGEST_STRIDE else None


def metadata_names(metadata: Mapping[str, str], columns: int | None) -> dict[int, str] | None:
    """The class names that an ONNX file says, by index; None if it says none, or not those of all classes.

    Args:
        columns: of the output, 5 + classes; None if the file does not say.
    """
    text = metadata.get("names", "")
    for parse in (ast.literal_eval, json.loads):
        try:
            names = parse(text)
            if not isinstance(names, (dict, list, tuple)):
                continue
            pairs = names.items() if isinstance(names, dict) else enumerate(names)
            found = {int(index): str(name) for index, name in pairs}
        except (ValueError, SyntaxError, TypeError, OverflowError, RecursionError, MemoryError):
            continue
        count = len(found) if columns is None else columns - 5
        if found and sorted(found) == list(range(count)):
            return dict(sorted(found.items()))
    return None


def read_names(path: Path, metadata: Mapping[str, str], data: str | Path | None, columns: int | None) -> dict[int, str]:
    """Class names: the file's own, else the data set's, else class0, class1 ... for as many as the output has.

    Raises:
        UserError: none of these is there.
    """
    names = metadata_names(metadata, columns)
    if names is not None:
        return names
    if data is not None:
        from utils.dataset_yaml import load_dataset_yaml

        return load_dataset_yaml(data).names
    if columns is None:
        raise UserError(f"{path}: holds no class names: give a data set YAML with --data")
    LOGGER.warning(f"{path}: no class names in its metadata, calling them class0 to class{columns - 6}")
    return {index: f"class{index}" for index in range(columns - 5)}
