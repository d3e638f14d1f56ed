"""What --gabfusion and --ada cost where the network is used: nodes, bytes and time of exported files without and with.

    python benchmarks/inference_cost.py --without runs/core/deeppcb_lsq_w4a4_base_seed0 \\
        --with runs/core/deeppcb_lsq_w4a4_both_seed0

Both folders hold a run of train.py (several are compared in pairs). Files of a pair take turns on the same image, and
the ratio of their times is a median over rounds, with the middle half of the rounds. A file beside itself shows what a
ratio is worth on the machine.
"""

from __future__ import annotations

import argparse
import collections
import statistics
import sys
import tempfile
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import onnx  # noqa: E402
import torch  # noqa: E402
from common import machine, write_section  # noqa: E402
from deploy import Row, onnxruntime_runner, take_turns, versions  # noqa: E402

from exporting.onnx_files import OnnxPlan, OnnxWriter  # noqa: E402
from exporting.pictures import drawn_images  # noqa: E402
from exporting.subject import Subject, read_subject  # noqa: E402
from quant.gabfusion import fusion_nodes  # noqa: E402
from utils.command import exit_code  # noqa: E402
from utils.errors import UserError  # noqa: E402
from utils.log import LOGGER  # noqa: E402

PLANS = {"speed": OnnxPlan(), "storage": OnnxPlan(int4_weights=True)}
HEADER = ("run", "file", "nodes without", "with", "same operators", "graph bytes without", "with", "file bytes without")
HEADER += ("with", "time with / without")
HEADER += ("without / itself",)


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--without", nargs="+", type=Path, required=True, help="run folders of train.py without --gabfusion")
    add("--with", nargs="+", type=Path, required=True, dest="fused", help="as many with it, in the same order")
    add("--imgsz", type=int, default=640, help="side in pixels")
    add("--rounds", type=int, default=40)
    add("--threads", type=int, default=1)
    add("--document", type=Path, default=ROOT / "docs" / "results.md", help="file that gets the table")
    return parser.parse_args(arguments)


def read_run(folder: Path, size: int, fused: bool) -> Subject:
    """The run's last checkpoint.

    Raises:
        UserError: there is none, or it has fusion nodes where it should not, or the other way round.
    """
    file = folder / "weights" / "last.pt"
    if not file.is_file():
        raise UserError(f"{folder}: no weights/last.pt in it; give the folder of a run of train.py")
    subject = read_subject(file, [size], torch.device("cpu"))
    if bool(fusion_nodes(subject.trained)) != fused:
        raise UserError(f"{folder}: trained {'without' if fused else 'with'} --gabfusion")
    return subject


def operators(model: onnx.ModelProto) -> dict[str, int]:
    """Operator -> how many nodes, those in the graph's own functions too."""
    graphs = [model.graph, *model.functions]
    return dict(collections.Counter(node.op_type for graph in graphs for node in graph.node))


def ratio(own: Row, other: Row) -> str:
    """Time of ``own`` over that of ``other`` with its quartiles."""
    shares = [a / b for a, b in zip(own.rounds, other.rounds, strict=True)]
    low, middle, high = statistics.quantiles(shares, n=4)
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def compare(folders: tuple[Path, Path], options: argparse.Namespace, scratch: Path) -> list[str]:
    """One line of the table for each kind of file of a pair of runs."""
    writers = [OnnxWriter(read_run(folder, options.imgsz, fused)) for fused, folder in enumerate(folders)]
    image = drawn_images((options.imgsz, options.imgsz), 1)[0].unsqueeze(0).numpy()
    lines = []
    for kind, plan in PLANS.items():
        models = [writer.build(plan).model for writer in writers]
        files = [scratch / f"{kind}_{name}.onnx" for name in ("without", "with")]
        for model, file in zip(models, files, strict=True):
            onnx.save_model(model, str(file))
        found = [operators(model) for model in models]
        rows = {
            name: Row(file, onnxruntime_runner(file, options.threads))
            for name, file in (("without", files[0]), ("with", files[1]), ("itself", files[0]))
        }
        take_turns(rows, image, options.rounds)
        cells = [folders[1].name, kind, *(str(sum(count.values())) for count in found)]
        cells += ["yes" if found[0] == found[1] else "NO", *(f"{model.graph.ByteSize():,}" for model in models)]
        cells += [f"{file.stat().st_size:,}" for file in files]
        cells += [ratio(rows["with"], rows["without"]), ratio(rows["without"], rows["itself"])]
        lines.append(f"| {' | '.join(cells)} |")
        LOGGER.info(lines[-1])
    return lines


def run(options: argparse.Namespace) -> None:
    """Compares all pairs and writes the table."""
    if len(options.without) != len(options.fused):
        raise UserError(f"--without names {len(options.without)} runs, --with {len(options.fused)}: give pairs")
    torch.set_num_threads(options.threads)
    lines = ["## What GABFusion and ADA cost in the exported file", ""]
    command = f"--without {' '.join(map(str, options.without))} --with {' '.join(map(str, options.fused))}"
    lines += [f"`python benchmarks/inference_cost.py {command} --imgsz {options.imgsz} --rounds {options.rounds}`", ""]
    lines += [
        f"{date.today().isoformat()}, {machine()}, {versions()}; {options.imgsz} px, batch 1, {options.rounds} rounds "
        "in which the files take turns. Brackets: the middle half of the rounds. *Without / itself*: the same file "
        "loaded twice, so what chance does to a ratio. Graph: without the metadata, which hold the training's command "
        "line.",
        "",
        f"| {' | '.join(HEADER)} |",
        "|---" * len(HEADER) + "|",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        for pair in zip(options.without, options.fused, strict=True):
            lines += compare(pair, options, Path(scratch))
    write_section("inference cost", lines, options.document)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = parse_options(arguments)
    return exit_code("benchmarks/inference_cost.py", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
