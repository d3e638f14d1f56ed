"""Do exported files compute the network's codes, and find what it finds? Every method at 8, 4, 3 and 2 bits.

    python benchmarks/exactness.py --weights runs/train/exp/weights/float_best.pt --data shapes.yaml

For each method and bit width, without and with GABFusion, a float checkpoint is quantized and trained for --epochs (0:
calibrated only), exported as the ONNX speed file, and compared with what was trained as ``export.py --verify`` does.
A row takes half a minute on two cores at the default size. The table goes to docs/results.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import onnx  # noqa: E402
import torch  # noqa: E402
from common import machine, write_section  # noqa: E402

import train  # noqa: E402
from exporting.agreement import Agreement, compare_on_data  # noqa: E402
from exporting.onnx_files import OnnxPlan, OnnxWriter  # noqa: E402
from exporting.subject import Subject, read_subject  # noqa: E402
from quant.gabfusion import fusion_nodes  # noqa: E402
from quant.registry import QUANTIZERS  # noqa: E402
from utils.command import exit_code  # noqa: E402
from utils.devices import limit_threads  # noqa: E402
from utils.log import LOGGER  # noqa: E402

BITS = (8, 4, 3, 2)
# For short trainings: the float network teaches nothing, and branch weights move within the few steps that there are.
RECIPE = "distillation: false\ngabfusion: {enabled: %s, learning_rate: 30}\n"
HEADER = (
    "method", "bits", "GABFusion", "mAP50", "mAP50-95", "file minus network", "chance", "codes", "on a boundary",
    "steps", "no reason", "without a flip",
)  # fmt: skip
EXPLANATION = (
    "*mAP* is the network's; *file minus network* the larger of the two differences, and *chance* its standard error "
    "over redrawn images: at few bits a code on a boundary becomes another network's noise. *Codes*: of all quantizers "
    "and layers, each fed what the runtime fed it; of them *on a boundary* differ where the value in front of the "
    "rounding lies within so many *steps* of a boundary, and *no reason* differ elsewhere. *Without a flip*: images of "
    "which no code differs when both run freely. *GABFusion* gives the largest distance of a branch's factor from 1."
)


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--weights", required=True, help="float checkpoint of the data set's classes")
    add("--data", default="shapes.yaml", help="data set YAML; its val images are compared")
    add("--imgsz", type=int, default=128, help="side in pixels")
    add("--epochs", type=int, default=1, help="quantized epochs; 0: calibrated only")
    add("--bits", nargs="+", type=int, default=list(BITS))
    add("--methods", nargs="+", default=sorted(QUANTIZERS), choices=sorted(QUANTIZERS))
    return parser.parse_args(arguments)


def quantize(options: argparse.Namespace, method: str, bits: int, gabfusion: bool, folder: Path) -> Path:
    """The checkpoint that ``train.py`` leaves in ``folder``."""
    name = f"{method}-{bits}{'-gabfusion' * gabfusion}"
    arguments = ["--weights", options.weights, "--data", options.data, "--imgsz", str(options.imgsz)]
    arguments += ["--quant", method, "--bits", str(bits), "--epochs", str(options.epochs), "--device", "cpu"]
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE % str(gabfusion).lower(), encoding="utf-8")
    arguments += ["--recipe", str(recipe)]
    arguments += ["--noval", "--noplots", "--workers", "0", "--project", str(folder), "--name", name]
    train.main(train.parse_arguments(arguments))
    return folder / name / "weights" / "last.pt"


def compare(checkpoint: Path, options: argparse.Namespace) -> tuple[Subject, Agreement]:
    """Exports the speed file and compares it with the network on the data."""
    subject = read_subject(checkpoint, [options.imgsz], torch.device("cpu"))
    file = checkpoint.with_suffix(".onnx")
    onnx.save_model(OnnxWriter(subject).build(OnnxPlan()).model, str(file))
    (found,) = compare_on_data(subject, [file], options.data)
    return subject, found


def row(method: str, bits: int, subject: Subject, found: Agreement) -> str:
    """One line of the table."""
    factors = [float((node.factors().detach() - 1).abs().max()) for node in fusion_nodes(subject.trained).values()]
    counts = found.codes.quantizers, found.codes.layers
    unexplained = sum(count.unexplained for count in counts)
    boundary = sum(count.different for count in counts) - unexplained
    cells = [
        method, str(bits), f"{max(factors):.3f}" if factors else "no", f"{found.reference_map50:.4f}",
        f"{found.reference_map:.4f}", f"{found.difference:+.4f}", f"{found.error:.4f}",
        f"{sum(count.compared for count in counts):,}", f"{boundary:,}",
        f"{max(count.farthest for count in counts):.0e}" if boundary else "-", str(unexplained),
        f"{found.codes.without_flip} of {found.codes.images}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def run(options: argparse.Namespace) -> None:
    """Trains, exports and compares every row, and writes the table."""
    limit_threads()
    data, weights = Path(options.data).name, Path(options.weights).name
    command = f"python benchmarks/exactness.py --weights {weights} --data {data} --imgsz {options.imgsz}"
    command += f" --epochs {options.epochs}"
    command += f" --methods {' '.join(options.methods)}" if options.methods != sorted(QUANTIZERS) else ""
    kind = f"quantized epochs: {options.epochs}" if options.epochs else "calibrated only"
    lines = [f"## Codes and accuracy of exported files: {Path(data).stem}, {options.imgsz} px", "", f"`{command}`", ""]
    lines += [f"{date.today().isoformat()}, {machine()}. Networks: {kind}. {EXPLANATION}", ""]
    lines += [f"| {' | '.join(HEADER)} |", "|---" * len(HEADER) + "|"]
    with tempfile.TemporaryDirectory() as folder:
        for method in options.methods:
            for bits in options.bits:
                for gabfusion in (False, True):
                    checkpoint = quantize(options, method, bits, gabfusion, Path(folder))
                    lines.append(row(method, bits, *compare(checkpoint, options)))
                    LOGGER.info(lines[-1])
    write_section(f"exactness {Path(data).stem}", lines)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = parse_options(arguments)
    return exit_code("benchmarks/exactness.py", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
