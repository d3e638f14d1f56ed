"""Time and memory of one training step: float, each method at 4 bit, GABFusion, ADA, and other people's quantizers.

    python benchmarks/train_step.py --imgsz 320 --batch-size 8

All networks take turns in one process, so their ratios hold on a busy machine too; absolute numbers do not. Memory is
what a process of its own grows by from the built network to the end of the third step, over the same of float.
The reference is a plain step: float32, contiguous tensors, eager. Ours has channels-last tensors. A step is what the
trainer does: forward, loss, backward, clipping, optimizer, moving average.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import peers  # noqa: E402
import torch  # noqa: E402
from real_data import machine, write_section  # noqa: E402

from models.yolo import DetectionModel  # noqa: E402
from quant import kernels  # noqa: E402
from quant.calibrate import calibrate  # noqa: E402
from quant.compilation import compile_quantizers  # noqa: E402
from quant.config import build_config  # noqa: E402
from quant.prepare import prepare  # noqa: E402
from quant.registry import QUANTIZERS  # noqa: E402
from quant.training import QuantizedTraining  # noqa: E402
from utils.ema import ModelEMA  # noqa: E402
from utils.hyp import DEFAULT_FILE, load_hyp  # noqa: E402
from utils.loss import DetectionLoss, scale_loss_gains  # noqa: E402
from utils.optim import build_optimizer  # noqa: E402

METHODS = [method for method in QUANTIZERS if method != "lsq+"]  # which takes the same step as lsq


@dataclass(frozen=True)
class Variant:
    """One row: what is trained and how.

    Attributes:
        flags: of ``build_config``, or None for float.
        precision: type of the convolutions.
        channels_last: memory format.
        compiled: quantizer kernels.
        peer: whose quantizers, or "" for ours.
    """

    flags: tuple[tuple[str, object], ...] | None = None
    precision: torch.dtype = torch.float32
    channels_last: bool = True
    compiled: bool = False
    peer: str = ""


def variants(types: list[torch.dtype], compiling: bool) -> dict[str, Variant]:
    """All rows by name, the reference first."""
    found = {"float, plain": Variant(channels_last=False)}
    for dtype in types:
        name = str(dtype).removeprefix("torch.")
        found[f"float, {name}"] = Variant(precision=dtype)
        for compiled in (False, True) if compiling else (False,):
            how = f"{name}, compiled" if compiled else name
            for method in METHODS:
                found[f"{method}, {how}"] = Variant((("method", method),), dtype, compiled=compiled)
            fusion = (("method", "lsq"), ("gabfusion", True))
            found[f"lsq + GABFusion, {how}"] = Variant(fusion, dtype, compiled=compiled)
            found[f"lsq + ADA, {how}"] = Variant((("method", "lsq"), ("ada", True)), dtype, compiled=compiled)
    for peer in peers.PEERS:
        if version := peers.version(peer):
            found[f"{peer} {version}, float32"] = Variant((("method", "lsq"),), peer=peer)
    return found


class Step:
    """One network with its loss and optimizer; calling it trains one step."""

    def __init__(self, network: DetectionModel, variant: Variant, images: torch.Tensor) -> None:
        self.variant, self.companion = variant, None
        layout = torch.channels_last if variant.channels_last else torch.contiguous_format
        self.model = copy.deepcopy(network)
        self.images = images.to(memory_format=layout)
        if variant.flags is not None:
            config = build_config(bits=4, **dict(variant.flags))
            prepare(self.model, config)
            calibrate(self.model, [images])
            if variant.peer:
                peers.put_in(self.model, variant.peer)
        self.model.to(memory_format=layout).train()
        self.ema = ModelEMA(self.model)
        if variant.flags is not None and not variant.peer:
            teacher = copy.deepcopy(network).eval().fuse().to(memory_format=layout)
            self.companion = QuantizedTraining(self.model, self.ema.ema, config, teacher, 10)
            self.companion.set_progress(0.3)  # where the normalisation is at full strength
            if variant.compiled:
                compile_quantizers(self.model, {torch.float32, variant.precision})
        self.loss = make_loss(self.model, images.shape[-1])
        self.targets = random_targets(len(images))
        self.optimizer = build_optimizer(self.model, "SGD", 1e-4, 0.9, 0.0, 1e-4)

    def __call__(self) -> None:
        kernels.switch(self.variant.compiled)
        features = self.companion.features if self.companion else ()
        with torch.autocast("cpu", self.variant.precision, enabled=self.variant.precision is not torch.float32):
            output = self.model(self.images, features=features)
            raw, maps = output if features else (output, {})
            loss = self.loss(raw, self.targets)[0]
            if features:
                loss = loss + sum(self.companion.distillation(self.images, maps, raw).values())
            penalty = self.companion.penalty(len(self.images)) if self.companion else None
            if penalty is not None:
                loss = loss + penalty
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 10.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.companion:
            self.companion.after_backward()
        if not self.variant.peer:  # whose buffers may change their shape
            self.ema.update(self.model)


def make_loss(model: DetectionModel, size: int) -> DetectionLoss:
    """The detection loss with the default hyperparameters."""
    detect = model.detect
    gains = scale_loss_gains(load_hyp(DEFAULT_FILE), detect.nl, detect.nc, size)
    return DetectionLoss(detect.anchors, detect.stride, detect.nc, gains)


def random_targets(images: int, boxes: int = 8) -> torch.Tensor:
    """(images * boxes, 6): image, class 0, boxes."""
    index = torch.arange(images).repeat_interleave(boxes)[:, None]
    return torch.cat((index, torch.zeros(len(index), 1), torch.rand(len(index), 4) * 0.5), 1)


def settled_network(cfg: str, images: torch.Tensor) -> DetectionModel:
    """A network with random weights whose batch norms know their statistics: without, ranges shrink to nothing."""
    network = DetectionModel(cfg).train()
    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        network(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return network


def growth(step: Step) -> int:
    """Bytes by which this process grows at most during three steps (Linux: its peak can be set back)."""
    ctypes.CDLL(None).malloc_trim(0)  # what building the network has freed
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    for _ in range(3):
        step()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{key}:"))) * 1024


def memory(options: argparse.Namespace, name: str) -> int:
    """Growth of a new process during three steps, bytes."""
    command = [sys.executable, __file__, "--memory-of", name, "--cfg", options.cfg, "--imgsz", str(options.imgsz)]
    command += ["--batch-size", str(options.batch_size), "--precision", *options.precision]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def times(steps: dict[str, Step], rounds: int) -> dict[str, float]:
    """Median seconds of a step; all take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()  # first steps allocate and choose kernels
    for _ in range(rounds):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", default="yolov5n.yaml")
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--precision", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled rows out")
    parser.add_argument("--no-memory", action="store_true", help="do not measure memory")
    parser.add_argument("--memory-of", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.manual_seed(0)
    images = torch.rand(options.batch_size, 3, options.imgsz, options.imgsz)
    network = settled_network(options.cfg, images)
    rows = variants([getattr(torch, name) for name in options.precision], not options.no_compile)
    if options.memory_of:
        print(growth(Step(network, rows[options.memory_of], images)))
        return
    seconds = times({name: Step(network, variant, images) for name, variant in rows.items()}, options.rounds)
    grown = {} if options.no_memory else {name: memory(options, name) for name in rows}
    report(options, rows, seconds, grown)


def report(
    options: argparse.Namespace, rows: dict[str, Variant], seconds: dict[str, float], grown: dict[str, int]
) -> None:
    """Prints the table and puts it into docs/results.md."""
    threads = f"{torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
    title = f"{Path(options.cfg).stem}, {options.imgsz} px, batch {options.batch_size}, {threads}"
    command = f"python benchmarks/train_step.py --cfg {options.cfg} --imgsz {options.imgsz}"
    command += f" --batch-size {options.batch_size} --rounds {options.rounds} --precision {' '.join(options.precision)}"
    lines = [f"## Training step: {title}", "", f"`{command}`", "", f"{date.today().isoformat()}, {machine()}."]
    lines += ["Medians of interleaved steps. W4A4; the names of peers carry their version.", ""]
    lines += ["| step | images per second | time: plain float | time: float alike | memory: float alike |"]
    lines += ["|---|---|---|---|---|"]
    plain = next(iter(rows))
    for name, variant in rows.items():
        alike = plain if name == plain else f"float, {str(variant.precision).removeprefix('torch.')}"
        room = f"{grown[name] / grown[alike]:.2f}" if grown else ""
        lines.append(
            f"| {name} | {options.batch_size / seconds[name]:.1f} | {seconds[name] / seconds[plain]:.2f} | "
            f"{seconds[name] / seconds[alike]:.2f} | {room} |"
        )
    print("\n".join(lines))
    write_section(f"train_step {Path(options.cfg).stem} {options.imgsz} {threads}", lines)


if __name__ == "__main__":
    main()
