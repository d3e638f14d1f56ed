"""Where the time of a whole ``val.py`` goes, for a float and a 4-bit checkpoint, beside the network alone.

    python benchmarks/val_speed.py --weights yolov5n.pt --data coco.yaml

Each checkpoint is measured in a process of its own by the command as users type it, from the start of Python to the
last line it prints. The same process then runs the bare network over the same batches once more. Without
``--quantized`` the 4-bit checkpoint is made of the float one by calibration (``train.py --epochs 0``).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

BORN = time.time()
ROOT = Path(__file__).resolve().parents[1]

# Stage -> what it is, in the order of the table.
STAGES = {
    "libraries": "starting Python, importing torch, NumPy and OpenCV",
    "own imports": "importing everything else",
    "weights": "reading the checkpoint, building the network",
    "data set": "scanning the data set, starting the loader",
    "waiting": "waiting for batches (decoding, letterbox: in the loader's process)",
    "to float": "bytes to floats",
    "network": "the network's forward pass",
    "decoding": "decoding the confident rows",
    "suppression": "non-maximum suppression",
    "matching": "matching with labels, confusion matrix",
    "metrics": "average precision",
    "pictures": "charts and pictures",
    "json": "JSON file, pycocotools",
    "rest": "everything else",
}


class Clock:
    """Seconds by stage; a stage inside another is not counted twice."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.inside: list[float] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the time of the block, less that of blocks inside, to stage ``name``."""
        self.inside.append(0.0)
        started = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - started
            self.seconds[name] += took - self.inside.pop()
            if self.inside:
                self.inside[-1] += took

    def watch(self, owner: object, attribute: str, name: str) -> None:
        """Counts all calls of ``owner.attribute`` as stage ``name``."""
        function = getattr(owner, attribute)

        def timed(*arguments, **keywords):
            with self.stage(name):
                return function(*arguments, **keywords)

        setattr(owner, attribute, timed)


def measure(spawned: float, arguments: list[str]) -> dict:
    """Runs ``val.py`` with ``arguments`` in this process.

    Args:
        spawned: ``time.time()`` when the process was asked for.

    Returns:
        seconds by stage, their sum ``total``, of the bare network ``alone``, ``images``, ``threads`` and the results.
    """
    clock = Clock()
    started = time.perf_counter()
    import cv2  # noqa: F401
    import torch

    clock.seconds["libraries"] = BORN - spawned + time.perf_counter() - started
    sys.path.insert(0, str(ROOT))
    with clock.stage("own imports"):
        import models.backend
        import models.yolo
        import val

    backends, batches, results = [], [], []
    _watch_functions(clock, val, models)
    _keep(models.backend.TorchBackend, "__init__", lambda backend, *_: backends.append(backend))
    run_file = val.run_file
    val.run_file = lambda *given, **named: results.append(run_file(*given, **named)) or results[-1]
    evaluate = val.evaluate

    def fed(model: Callable, loader: object, **keywords):
        return evaluate(model, _watched(clock, loader, batches), **keywords)

    val.evaluate = fed
    with clock.stage("rest"):
        code = val.main(arguments)
    if code:
        raise SystemExit(code)
    (result,) = results
    found = {"total": sum(clock.seconds.values()), "seconds": clock.seconds, "images": result.images}
    found |= {"map50": result.map50, "map": result.map, "threads": torch.get_num_threads()}
    return found | {"alone": _alone(backends[0], batches)}


def _watch_functions(clock: Clock, val, models) -> None:
    clock.watch(val, "open_weights", "weights")
    clock.watch(val, "create_dataloader", "data set")
    clock.watch(val, "prepare_dataset", "data set")
    clock.watch(val, "_to_device", "to float")
    clock.watch(models.backend.TorchBackend, "run", "network")
    clock.watch(models.yolo.Detect, "confident_rows", "decoding")
    clock.watch(val, "suppress", "suppression")
    clock.watch(val._Collector, "add", "matching")
    clock.watch(val._Collector, "finish", "metrics")
    clock.watch(val._Collector, "run_coco", "json")
    for name in ("_plot_batch", "plot_class_curves", "plot_confusion_matrix"):
        clock.watch(val, name, "pictures")


def _keep(owner: type, attribute: str, keep: Callable) -> None:
    function = getattr(owner, attribute)

    def kept(*arguments, **keywords):
        result = function(*arguments, **keywords)
        keep(*arguments)
        return result

    setattr(owner, attribute, kept)


def _watched(clock: Clock, loader: object, batches: list) -> Iterator:
    """The loader's batches; waiting for them is a stage, and their images are kept."""
    with clock.stage("waiting"):
        iterator = iter(loader)
    while True:
        with clock.stage("waiting"):
            batch = next(iterator, None)
        if batch is None:
            return
        batches.append(batch[0])
        yield batch


def _alone(backend: object, batches: list) -> float:
    """Seconds of the network over the same batches, nothing else running; the better of two passes."""
    import torch

    passes = []
    head = backend.model.detect
    head.decodes = False
    forward = backend.model.forward
    with torch.inference_mode():
        for _ in range(2):
            total = 0.0
            for images in batches:
                images = images.float().div_(255)
                started = time.perf_counter()
                forward(images)
                total += time.perf_counter() - started
            passes.append(total)
    return min(passes)


def quantized_checkpoint(options: argparse.Namespace, folder: Path) -> Path:
    """A w4a4 checkpoint, calibrated only."""
    command = [sys.executable, str(ROOT / "train.py"), "--weights", options.weights, "--data", options.data]
    command += ["--quant", "lsq", "--bits", "4", "--epochs", "0", "--imgsz", "320", "--batch-size", "8", "--noplots"]
    command += ["--project", str(folder), "--name", "w4a4", "--workers", "0"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return folder / "w4a4" / "weights" / "last.pt"


def in_new_process(weights: str | Path, options: argparse.Namespace, folder: Path) -> dict:
    """``measure`` of one checkpoint."""
    arguments = ["--weights", str(weights), "--data", options.data, "--imgsz", str(options.imgsz)]
    arguments += ["--batch-size", str(options.batch_size), "--project", str(folder), "--name", "val", *options.val]
    report = folder / "report.json"
    command = [sys.executable, __file__, "--child", str(report), str(time.time()), *arguments]
    subprocess.run(command, check=True)
    return json.loads(report.read_text())


def main() -> None:
    """Command line."""
    if sys.argv[1:2] == ["--child"]:
        Path(sys.argv[2]).write_text(json.dumps(measure(float(sys.argv[3]), sys.argv[4:])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="float checkpoint")
    parser.add_argument("--quantized", default="", help="4-bit checkpoint of the same classes")
    parser.add_argument("--data", required=True, help="data set YAML; its val split is measured")
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2, help="of which the fastest counts; the networks take turns")
    parser.add_argument("--val", nargs=argparse.REMAINDER, default=[], help="more flags for val.py, such as --noplots")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        quantized = options.quantized or quantized_checkpoint(options, folder)
        files = {"float": options.weights, "w4a4": quantized}
        runs = [
            {key: in_new_process(file, options, folder) for key, file in files.items()} for _ in range(options.rounds)
        ]
    report(options, {key: min((run[key] for run in runs), key=lambda found: found["total"]) for key in files})


def report(options: argparse.Namespace, found: dict[str, dict]) -> None:
    """Prints the table and puts it into docs/results.md."""
    sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
    from common import machine, write_section

    first = next(iter(found.values()))
    threads = f"{first['threads']} thread{'s' if first['threads'] > 1 else ''}"
    flags = "".join(f" {flag}" for flag in options.val)
    how = f"{options.imgsz} px, batch {options.batch_size}, {threads}{flags}"
    command = f"python benchmarks/val_speed.py --weights {Path(options.weights).name} --data {Path(options.data).name}"
    command += f" --imgsz {options.imgsz} --batch-size {options.batch_size} --rounds {options.rounds}"
    command += f" --val{flags}" if flags else ""
    lines = [f"## Time of val.py: {first['images']} images, {how}", "", f"`{command}`", ""]
    lines += [f"{date.today().isoformat()}, {machine()}. Milliseconds per image, and share of the wall time.", ""]
    lines += [f"| stage | {' | '.join(f'{key} | share' for key in found)} |", "|---" * (1 + 2 * len(found)) + "|"]
    for stage, meaning in STAGES.items():
        lines.append(_row(meaning, found, {key: run["seconds"][stage] for key, run in found.items()}))
    lines.append(_row("whole command", found, {key: run["total"] for key, run in found.items()}))
    lines.append(
        _row("the bare network over the same batches", found, {key: run["alone"] for key, run in found.items()})
    )
    others = {key: run["total"] - run["seconds"]["network"] for key, run in found.items()}
    lines.append(_row("all but the forward pass", found, others))
    started = {key: others[key] - run["seconds"]["libraries"] for key, run in found.items()}
    lines += [_row("the same without starting Python and libraries", found, started), ""]
    lines += [f"* {key}: mAP50 {run['map50']:.3f}, mAP50-95 {run['map']:.3f}" for key, run in found.items()]
    print("\n".join(lines))
    write_section(f"val_speed {how}", lines)


def _row(meaning: str, found: dict[str, dict], seconds: dict[str, float]) -> str:
    cells = [f"{seconds[k] / run['images'] * 1e3:.2f} | {seconds[k] / run['total']:.1%}" for k, run in found.items()]
    return f"| {meaning} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
