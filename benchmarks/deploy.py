"""Size and speed of exported files in onnxruntime and OpenVINO, beside float and other tools' 8-bit files.

    python benchmarks/deploy.py --weights yolov5n.pt --models yolov5n yolov5s

A model without weights among ``--weights`` has random ones: times do not depend on them. Quantized networks are
calibrated on drawn images, 4-bit weights and inputs, first and last layers 8 bits. All files take turns; a round is one
run that warms up and three that count. Ratios are medians over rounds. Without OpenVINO or NNCF their rows are missing.
"""

from __future__ import annotations

import argparse
import collections
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import deploy_files  # noqa: E402
import numpy as np  # noqa: E402
import onnx  # noqa: E402
import onnxruntime  # noqa: E402
import torch  # noqa: E402
from common import machine, write_section  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from exporting.pictures import drawn_images  # noqa: E402
from models.yolo import DetectionModel, count_gflops  # noqa: E402
from utils.log import LOGGER  # noqa: E402

FLOATS = ("onnxruntime, float32", "OpenVINO, float32")
NNCF = "OpenVINO, INT8 by NNCF"
SPEED, OUTPUT8 = "speed file", "speed file, activation.output: 8"
COUNTED = 3


@dataclass
class Row:
    """One line of the table: a file in a runtime."""

    path: Path
    run: Callable[[np.ndarray], object]
    rounds: list[float] = field(default_factory=list)  # milliseconds, the median of each round


def onnxruntime_session(model: str | bytes, threads: int, profile: str = "") -> onnxruntime.InferenceSession:
    """A session whose threads do not spin while others are measured."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, profile
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def onnxruntime_runner(path: Path, threads: int) -> Callable[[np.ndarray], object]:
    session = onnxruntime_session(str(path), threads)
    return lambda image: session.run(None, {deploy_files.INPUT: image})


def openvino_request(model, threads: int, precision: str = "f32", profile: bool = False):
    """An inference request of a path or an ``openvino.Model``."""
    core = deploy_files.module("openvino").Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    settings |= {"INFERENCE_PRECISION_HINT": precision, "PERF_COUNT": profile}
    return core.compile_model(model, "CPU", settings).create_infer_request()


def openvino_runner(path: Path, threads: int, precision: str = "f32") -> Callable[[np.ndarray], object]:
    request = openvino_request(str(path), threads, precision)
    return lambda image: request.infer([image], share_inputs=True)


def rows_of(files: dict[str, Path], size: int, threads: int, folder: Path) -> dict[str, Row]:
    """All rows that the installed packages allow."""
    float_file = files["float"]
    own = deploy_files.write_onnxruntime_int8(float_file, size, folder / "onnxruntime_int8.onnx")
    onnx_files = {
        FLOATS[0]: float_file,
        "onnxruntime, its own static INT8": own,
        "onnxruntime, storage file": files["storage"],
        f"onnxruntime, {SPEED}": files["speed"],
        f"onnxruntime, {OUTPUT8}": files["speed, output 8"],
    }
    rows = {name: Row(path, onnxruntime_runner(path, threads)) for name, path in onnx_files.items()}
    if deploy_files.module("openvino") is None:
        LOGGER.warning("OpenVINO is left out: pip install openvino")
        return rows
    nncf = deploy_files.write_nncf_int8(float_file, size, folder / "nncf_int8.xml")
    openvino_files = {
        FLOATS[1]: (float_file, "f32"),
        "OpenVINO, bfloat16": (float_file, "bf16"),
        NNCF: (nncf, "f32"),
        "OpenVINO, storage file": (files["storage"], "f32"),
        f"OpenVINO, {SPEED}": (files["speed"], "f32"),
        f"OpenVINO, {OUTPUT8}": (files["speed, output 8"], "f32"),
    }
    for name, (path, precision) in openvino_files.items():
        if path is not None:
            converted = path.with_suffix(".xml")
            rows[name] = Row(converted, openvino_runner(converted, threads, precision))
    return rows


def take_turns(rows: dict[str, Row], image: np.ndarray, rounds: int) -> None:
    """Fills in the milliseconds of every round; the first round is not kept."""
    for number in range(rounds + 1):
        for row in rows.values():
            row.run(image)
            seconds = []
            for _ in range(COUNTED):
                started = time.perf_counter()
                row.run(image)
                seconds.append(time.perf_counter() - started)
            if number:
                row.rounds.append(statistics.median(seconds) * 1e3)


def faster(row: Row, references: list[Row]) -> float:
    """How many times as fast as the fastest of ``references``: median over rounds."""
    quickest = min(references, key=lambda reference: statistics.median(reference.rounds))
    return statistics.median(other / own for own, other in zip(row.rounds, quickest.rounds, strict=True))


def profile_onnxruntime(path: Path, image: np.ndarray, threads: int, folder: Path, runs: int = 12) -> dict[str, float]:
    """Milliseconds an image of every kind of operator, the median over runs."""
    session = onnxruntime_session(str(path), threads, str(folder / "profile"))
    for _ in range(runs):
        session.run(None, {deploy_files.INPUT: image})
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    kernels = [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
    single: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    for event in kernels:
        single[event["name"], event["args"]["op_name"]].append(event["dur"] / 1e3)
    found: dict[str, float] = collections.Counter()
    for (_, operator), times in single.items():
        found[operator] += statistics.median(times)
    return dict(found)


def profile_openvino(path: Path, image: np.ndarray, threads: int, runs: int = 20) -> dict[str, float]:
    """Milliseconds an image of every kind of kernel.

    OpenVINO reports the mean of all runs, the first of which prepares kernels; the first quarter is taken out.
    """
    request = openvino_request(str(path), threads, profile=True)
    sums: dict[int, dict[str, float]] = {}
    early = runs // 4
    for number in range(1, runs + 1):
        request.infer([image])
        if number in (early, runs):
            sums[number] = collections.Counter()
            for part in request.profiling_info:
                kind = f"{part.node_type} {part.exec_type}"
                sums[number][kind] += part.real_time.total_seconds() * 1e3 * number
    found = {kind: (value - sums[early][kind]) / (runs - early) for kind, value in sums[runs].items()}
    return {kind: value for kind, value in found.items() if value > 0}


def large_convolution(channels: int = 256, side: int = 64) -> onnx.ModelProto:
    """A 3x3 convolution of codes with quantized results, large enough for nothing else to matter."""
    generator = np.random.default_rng(0)
    constants = {
        "step": np.float32(0.1), "zero": np.uint8(3),
        "w": generator.integers(-7, 8, (channels, channels, 3, 3), np.int8),
        "w_step": np.full(channels, 0.01, np.float32), "out_step": np.float32(2), "out_zero": np.uint8(128),
        "b": np.zeros(channels, np.int32), "b_step": np.full(channels, 0.001, np.float32),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", [deploy_files.INPUT, "step", "zero"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "step", "zero"], ["x"]),
        helper.make_node("DequantizeLinear", ["w", "w_step"], ["weight"], axis=0),
        helper.make_node("DequantizeLinear", ["b", "b_step"], ["bias"], axis=0),
        helper.make_node("Conv", ["x", "weight", "bias"], ["y"], pads=[1] * 4, kernel_shape=[3, 3]),
        helper.make_node("QuantizeLinear", ["y", "out_step", "out_zero"], ["y_codes"]),
        helper.make_node("DequantizeLinear", ["y_codes", "out_step", "out_zero"], ["z"]),
        helper.make_node("GlobalAveragePool", ["z"], ["pooled"]),
    ]
    given = helper.make_tensor_value_info(deploy_files.INPUT, TensorProto.FLOAT, [1, channels, side, side])
    taken = helper.make_tensor_value_info("pooled", TensorProto.FLOAT, [1, channels, 1, 1])
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "large", [given], [taken], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def integer_limits(threads: int, folder: Path) -> dict[str, float]:
    """Billions of 8-bit multiply-adds a second of one large convolution, alone by the runtime's own profile."""
    model = large_convolution()
    path = folder / "large.onnx"
    onnx.save_model(model, str(path))
    channels, side = (model.graph.input[0].type.tensor_type.shape.dim[index].dim_value for index in (1, 2))
    image = np.random.default_rng(0).random((1, channels, side, side), np.float32)
    multiplications = 9 * channels**2 * side**2
    times = {"onnxruntime": profile_onnxruntime(path, image, threads, folder)["QLinearConv"]}
    if deploy_files.module("openvino") is not None:
        profile = profile_openvino(path, image, threads)
        times["OpenVINO"] = sum(value for kind, value in profile.items() if kind.startswith("Convolution"))
    return {runtime: multiplications / value / 1e6 for runtime, value in times.items()}


def table(rows: dict[str, Row]) -> list[str]:
    """The table of sizes and times."""
    floats = {name: rows[name] for name in FLOATS if name in rows}
    heads = ["runtime, file", "MB", "size: float ONNX", "ms", "times as fast as: fastest float32"]
    heads += ["float32, same runtime", "NNCF's INT8"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    whole = deploy_files.megabytes(rows[FLOATS[0]].path)
    for name, row in rows.items():
        size = deploy_files.megabytes(row.path)
        own = next(other for key, other in floats.items() if key.split(",")[0] == name.split(",")[0])
        ratios = [f"{faster(row, references):.2f}" for references in (list(floats.values()), [own])]
        ratios.append(f"{faster(row, [rows[NNCF]]):.2f}" if NNCF in rows else "")
        milliseconds = statistics.median(row.rounds)
        lines.append(f"| {name} | {size:.2f} | 1/{whole / size:.2f} | {milliseconds:.1f} | {' | '.join(ratios)} |")
    return lines


def profile_lines(title: str, profile: dict[str, float], limit: float, multiplications: float) -> list[str]:
    """Where the time goes, and how long the multiplications alone would take at the measured limit."""
    total = sum(profile.values())
    parts = [f"{kind} {value / total:.0%}" for kind, value in sorted(profile.items(), key=lambda item: -item[1])]
    shortest = multiplications / limit * 1e3
    return [
        f"* {title}: {total:.1f} ms in operators; {', '.join(parts[:12])}. "
        f"Integer limit: {limit:.0f} billion multiply-adds a second, at which its {multiplications:.2f} billion "
        f"take {shortest:.1f} ms, {shortest / total:.0%} of that."
    ]


def profiles(rows: dict[str, Row], name: str, image: np.ndarray, threads: int, folder: Path) -> list[str]:
    """A profile of the file that each runtime runs in integers."""
    multiplications = count_gflops(DetectionModel(f"{name}.yaml"), image.shape[-1]) / 2
    limits = integer_limits(threads, folder)
    found = profile_onnxruntime(rows[f"onnxruntime, {OUTPUT8}"].path, image, threads, folder)
    lines = profile_lines(f"onnxruntime, {OUTPUT8}", found, limits["onnxruntime"], multiplications)
    if f"OpenVINO, {SPEED}" in rows:
        found = profile_openvino(rows[f"OpenVINO, {SPEED}"].path, image, threads)
        lines += profile_lines(f"OpenVINO, {SPEED}", found, limits["OpenVINO"], multiplications)
    return lines


def versions() -> str:
    """Versions of what is compared."""
    found = [f"onnxruntime {onnxruntime.__version__}"]
    for name in ("openvino", "nncf"):
        package = deploy_files.module(name)
        found += [f"{name} {package.__version__.split('-')[0]}"] if package else []
    return ", ".join(found)


def measure(name: str, weights: Path | None, options: argparse.Namespace) -> None:
    """Builds, measures and writes one model's section."""
    size, threads = options.imgsz, options.threads
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files = deploy_files.write_ours(name, weights, size, folder)
        rows = rows_of(files, size, threads, folder)
        image = drawn_images((size, size), 1)[0].unsqueeze(0).numpy()
        take_turns(rows, image, options.rounds)
        lines = table(rows)
        lines += ["", *profiles(rows, name, image, threads, folder)]
    kind = "official weights" if weights else "random weights"
    given = f" --weights {weights.name}" if weights else ""
    head = [f"## Deployment: {name}, {size} px, batch 1, {threads} threads", ""]
    head += [f"`python benchmarks/deploy.py --models {name}{given} --imgsz {size} --rounds {options.rounds}`", ""]
    head += [f"{date.today().isoformat()}, {machine()}, {versions()}; {kind}, 4-bit weights and inputs.", ""]
    print("\n".join(head + lines))
    write_section(f"deploy {name} {size} {threads} threads", head + lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["yolov5n", "yolov5s"])
    parser.add_argument("--weights", nargs="*", type=Path, default=[], help="checkpoints named after their model")
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    given = {path.stem: path for path in options.weights}
    for name in options.models:
        measure(name, given.get(name), options)


if __name__ == "__main__":
    main()
