"""What an exported file says of itself."""

import json
import shlex
from pathlib import Path

from models.yolo import DetectionModel
from utils.checkpoint import Weights

# Options of train.py that a file repeats, in the order they are typed. Paths lose their folder: a file that leaves the
# house does not tell how its folders are called.
_PATHS = ("weights", "data", "hyp", "recipe", "teacher")
_OPTIONS = (*_PATHS, "imgsz", "epochs", "batch_size", "optimizer", "quant", "bits", "gabfusion", "ada", "seed")


def describe(network: DetectionModel, weights: Weights) -> dict[str, str]:
    """The file's metadata: ``stride`` and ``names`` as YOLOv5's own tools expect them, ``bits`` as JSON,
    ``method``, and ``training``, the command that trained it, where the checkpoint knows it."""
    bits = {"weights": 32, "activations": 32}
    method = "float"
    if weights.quantization is not None:
        config = weights.quantization
        method = config["method"]
        bits = {
            "weights": config["weight"]["bits"],
            "activations": config["activation"]["bits"],
            "first_layer": config["first_layer_bits"],
            "detect": config["detect_bits"],
        }
        if config["activation"].get("output"):
            bits["outputs"] = config["activation"]["output"]
    found = {
        "stride": str(network.image_stride),
        "names": str(network.names),
        "bits": json.dumps(bits),
        "method": method,
    }
    command = training_command(weights)
    return found | ({"training": command} if command else {})


def training_command(weights: Weights) -> str:
    """The ``train.py`` command that wrote a checkpoint, without folders; empty for other people's."""
    words = []
    for name in _OPTIONS:
        value = weights.trained_with(name)
        if value is None or value is False or value == "":
            continue
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words.append(Path(str(value)).name if name in _PATHS else str(value))
    return shlex.join(["python", "train.py", *words]) if words else ""
