"""Which formats there are, what YOLOv5 calls them, and what to do instead of those that are not written."""

from collections.abc import Sequence

from utils.errors import UserError

FORMATS = ("onnx", "openvino", "torchscript")
# Other names for these: file endings, and what people type.
ALIASES = {"ov": "openvino", "xml": "openvino", "jit": "torchscript", "pt": "torchscript", "ts": "torchscript"}

_FROM_ONNX = "export --include onnx and convert that file: "
_TENSORFLOW = _FROM_ONNX + "onnx2tf -i best.onnx (float models; quantized ones run in onnxruntime and OpenVINO)"
_TENSORRT = (
    "export --include onnx and, where TensorRT is installed, run trtexec --onnx=best.onnx --saveEngine=best.engine "
    "--int8 (train with target: tensorrt in the recipe; --fp16 for float models)"
)
# YOLOv5's other formats -> what to do instead.
REPLACEMENTS = {
    "engine": _TENSORRT,
    "tensorrt": _TENSORRT,
    "coreml": "export --include torchscript and convert that file with coremltools on a Mac",
    "mlmodel": "export --include torchscript and convert that file with coremltools on a Mac",
    "saved_model": _TENSORFLOW,
    "pb": _TENSORFLOW,
    "tflite": _TENSORFLOW,
    "edgetpu": _TENSORFLOW,
    "tfjs": _TENSORFLOW,
    "paddle": _FROM_ONNX + "x2paddle --framework=onnx --model=best.onnx --save_dir=best_paddle_model",
    "ncnn": "export --include torchscript and convert that file: pnnx best.torchscript",
}


def choose_formats(names: Sequence[str]) -> list[str]:
    """The formats that ``--include`` names, without repeats, in the order of ``FORMATS``.

    Args:
        names: words, several of them in one where commas are between.

    Raises:
        UserError: a format that is not written here, with what to do instead.
    """
    words = [word for name in names for word in name.lower().split(",") if word]
    chosen = {ALIASES.get(word, word) for word in words}
    for word in words:
        if word in REPLACEMENTS:
            raise UserError(f"--include {word}: not a format this project writes; {REPLACEMENTS[word]}")
        if ALIASES.get(word, word) not in FORMATS:
            raise UserError(f"--include {word}: not a format this project writes; use {', '.join(FORMATS)}")
    if not chosen:
        raise UserError(f"--include: name a format: {', '.join(FORMATS)}")
    return [name for name in FORMATS if name in chosen]
