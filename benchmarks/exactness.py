"""Do exported files compute the network's codes? Every method at 2, 3, 4 and 8 bits, with and without GABFusion.

    python benchmarks/exactness.py --weights float_best.pt --data bccd.yaml --imgsz 160

A float checkpoint is quantized by calibration, its branch weights are moved away from 1, and it is folded and built as
the ONNX file that ``export.py`` writes. onnxruntime runs it; ``quant.verify`` compares all codes.
"""

from __future__ import annotations

import argparse
import copy
from datetime import date
from pathlib import Path

from common import LOGGER, machine, write_section  # first: it lets Python find the project

import torch  # isort: skip
from torch import Tensor

from exporting.pictures import verification_images
from models.yolo import DetectionModel
from quant import QuantConfig, calibrate, fold, prepare, set_strength
from quant.gabfusion import fusion_nodes
from quant.onnx_graph import build, trace, traceable
from quant.registry import QUANTIZERS
from quant.verify import Verification, references, verify
from utils.checkpoint import read_weights

BITS = (8, 4, 3, 2)
CALIBRATION_IMAGES = 16


def quantize(network: DetectionModel, method: str, bits: int, gabfusion: bool, images: list[Tensor]) -> DetectionModel:
    """A calibrated copy; with GABFusion the factors of its branches lie up to 20 % from 1."""
    keys = {"method": method, "weight": {"bits": bits}, "activation": {"bits": bits}}
    model = prepare(copy.deepcopy(network).eval(), QuantConfig.from_dict(keys | {"gabfusion": {"enabled": gabfusion}}))
    calibrate(model, [torch.stack(images)])
    for node in fusion_nodes(model).values():
        node.logits.data.copy_(torch.linspace(0.2, -0.2, len(node.logits)))
    set_strength(model, 0.0)
    return model.eval()


def compare(model: DetectionModel, images: list[Tensor]) -> Verification:
    """Folds, builds and runs the network on images (3, H, W)."""
    folded = fold(model)
    folded.model[-1].export = True
    exported = build(trace(traceable(folded), torch.zeros(1, *images[0].shape)))
    return verify(folded, exported, (one for image in images for one in references(folded, [image], 1, model)))


def row(method: str, bits: int, gabfusion: bool, result: Verification) -> str:
    """One line of the table."""
    layers = result.layers
    return (
        f"| {method} | {bits} | {'yes' if gabfusion else 'no'} | {result.quantizers.different} "
        f"| {layers.compared:,} | {layers.different - layers.unexplained} | {layers.farthest:.0e} "
        f"| {result.quantizers.unexplained + layers.unexplained} | {result.without_flip} of {result.images} "
        f"| {result.largest_relative:.1e} |"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="float checkpoint")
    parser.add_argument("--data", required=True, help="data set YAML; its val images are taken")
    parser.add_argument("--imgsz", type=int, default=160)
    parser.add_argument("--images", type=int, default=8, help="compared")
    parser.add_argument("--bits", nargs="+", type=int, default=list(BITS))
    parser.add_argument("--methods", nargs="+", default=sorted(QUANTIZERS))
    options = parser.parse_args()
    weights = read_weights(options.weights)
    network = DetectionModel(weights.model_yaml)
    network.load_state_dict(weights.state_dict)
    size = options.imgsz, options.imgsz
    images, _ = verification_images(options.data, weights, size, options.images + CALIBRATION_IMAGES)
    command = f"python benchmarks/exactness.py --weights {Path(options.weights).name} --data {Path(options.data).name}"
    command += f" --imgsz {options.imgsz} --images {options.images}"
    lines = [f"## Codes of exported files: {Path(options.data).stem}, {options.imgsz} px", "", f"`{command}`", ""]
    lines += [
        f"{date.today().isoformat()}, {machine()}. Calibrated networks. *Quantizers*: codes that differ where both "
        "sides quantize the same floats. *Codes*: of all layers, each fed what the runtime fed it; of them *differ* "
        "lie on a rounding boundary, within so many *steps*, and *no reason* do not. *Without a flip*: images of which "
        "no code differs when both run freely. *Outputs*: the largest relative L2 distance of an image.",
        "",
        "| method | bits | GABFusion | quantizers | codes | differ | steps | no reason | without a flip | outputs |",
        "|---" * 10 + "|",
    ]
    for method in options.methods:
        for bits in options.bits:
            for gabfusion in (False, True):
                model = quantize(network, method, bits, gabfusion, images[:CALIBRATION_IMAGES])
                lines.append(row(method, bits, gabfusion, compare(model, images[CALIBRATION_IMAGES:])))
                LOGGER.info(lines[-1])
    write_section(f"exactness {Path(options.data).stem}", lines)


if __name__ == "__main__":
    main()
