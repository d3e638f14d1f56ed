"""Time and memory of one training step: float, each method at 4 bit, GABFusion, ADA, and other people's quantizers.

    python benchmarks/train_step.py --imgsz 320 --batch-size 8
    python benchmarks/train_step.py --imgsz 640 --batch-size 64 --device 0 --precision float16      (a GPU)

Each network takes turns with the one it is compared with, so ratios hold on a busy machine too; absolute numbers do
not. Memory is what a process of its own grows by from the built network to the end of the third step, over the same of
float.
The reference is a plain step: float32, contiguous tensors, eager. Ours has channels-last tensors, and quantizers run
compiled kernels unless a row says otherwise. A step is what the trainer does: forward, loss, backward, clipping,
optimizer, moving average. On a GPU a time is that of several steps behind each other, memory is PyTorch's peak, and a
profile counts the kernels of a step and how often the host waits for the device.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import re
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
from common import machine, write_section  # noqa: E402

from models.yolo import DetectionModel  # noqa: E402
from quant import kernels  # noqa: E402
from quant.calibrate import calibrate  # noqa: E402
from quant.compilation import compile_quantizers  # noqa: E402
from quant.config import DISTILLATION_WEIGHTS, DistillationConfig  # noqa: E402
from quant.prepare import prepare  # noqa: E402
from quant.recipe import build_config  # noqa: E402
from quant.registry import QUANTIZERS  # noqa: E402
from quant.training import QuantizedTraining  # noqa: E402
from utils.allocation import keep_freed_memory  # noqa: E402
from utils.devices import select_device  # noqa: E402
from utils.ema import ModelEMA  # noqa: E402
from utils.hyp import DEFAULT_FILE, load_hyp  # noqa: E402
from utils.log import LOGGER  # noqa: E402
from utils.loss import DetectionLoss, scale_loss_gains  # noqa: E402
from utils.optim import build_optimizer  # noqa: E402

STEPS = 6  # behind each other on a GPU, where the host runs ahead of the device
# What makes the host wait for the device, as the profiler calls it.
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::_local_scalar_dense")
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
        teacher: only the forward pass of the network that ADA learns from.
    """

    flags: tuple[tuple[str, object], ...] | None = None
    precision: torch.dtype = torch.float32
    channels_last: bool = True
    compiled: bool = True
    peer: str = ""
    teacher: bool = False


def variants(types: list[torch.dtype]) -> dict[str, Variant]:
    """All rows by name, the reference first."""
    found = {"float, plain": Variant(channels_last=False)}
    for dtype in types:
        name = str(dtype).removeprefix("torch.")
        found[f"float, {name}"] = Variant(precision=dtype)
        for compiled in (True, False):
            how = name if compiled else f"{name}, piece by piece"
            for method in METHODS:
                found[f"{method}, {how}"] = Variant((("method", method),), dtype, compiled=compiled)
            fusion = (("method", "lsq"), ("gabfusion", True))
            found[f"lsq + GABFusion, {how}"] = Variant(fusion, dtype, compiled=compiled)
            found[f"lsq + ADA, {how}"] = Variant((("method", "lsq"), ("ada", True)), dtype, compiled=compiled)
        found[f"forward pass of the teacher, {name}"] = Variant((("method", "lsq"), ("ada", True)), dtype, teacher=True)
    for peer in peers.PEERS:
        if version := peers.version(peer):
            found[f"{peer} {version}, float32"] = Variant((("method", "lsq"),), compiled=False, peer=peer)
    return found


class Step:
    """One network with its loss and optimizer; calling it trains one step."""

    def __init__(self, network: DetectionModel, variant: Variant, images: torch.Tensor) -> None:
        self.variant, self.companion = variant, None
        layout = torch.channels_last if variant.channels_last else torch.contiguous_format
        self.device = images.device
        self.model = copy.deepcopy(network)
        self.images = images.to(memory_format=layout)
        if variant.flags is not None:
            config = build_config(bits=4, **dict(variant.flags))
            # No teacher, which would hide what quantizers cost.
            config.distillation = DistillationConfig(**dict.fromkeys(DISTILLATION_WEIGHTS, 0.0))
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
            if variant.compiled and not compile_quantizers(self.model, {torch.float32, variant.precision}):
                raise SystemExit("rows with compiled kernels need a C++ compiler: use --rows to leave them out")
        self.loss = make_loss(self.model, images.shape[-1])
        self.targets = random_targets(len(images)).to(self.device)
        self.optimizer = build_optimizer(self.model, "SGD", 1e-4, 0.9, 0.0, 1e-4)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=variant.precision is torch.float16)

    def __call__(self) -> None:
        kernels.switch(self.variant.compiled)
        features = self.companion.features if self.companion else ()
        dtype = self.variant.precision
        with torch.autocast(self.device.type, dtype, enabled=dtype is not torch.float32):
            if self.variant.teacher:
                with torch.no_grad():
                    self.companion.teacher(self.images, features=features)
                return
            output = self.model(self.images, features=features)
            raw, maps = output if features else (output, {})
            loss = self.loss(raw, self.targets)[0]
            if features:
                loss = loss + sum(self.companion.distillation(self.images, maps, raw).values())
            penalty = self.companion.penalty(len(self.images)) if self.companion else None
            if penalty is not None:
                loss = loss + penalty
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 10.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
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
    network = DetectionModel(cfg).to(images.device).train()
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
    """Bytes by which this process grows at most during three steps (Linux: its peak can be set back), or on a GPU
    PyTorch's memory there."""
    if step.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(3):
            step()
        return torch.cuda.max_memory_allocated() - before
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
    command += ["--batch-size", str(options.batch_size), "--precision", *options.precision, "--rows", options.rows]
    command += ["--device", options.device]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def alike(name: str, variant: Variant) -> str:
    """The row that ``name`` is compared with: the float step of its precision, or for that the plain one."""
    own = f"float, {str(variant.precision).removeprefix('torch.')}"
    return next(iter(variants([]))) if name.startswith("float") else own


def timed(step: Step) -> float:
    """Seconds of one step."""
    steps = STEPS if step.device.type == "cuda" else 1
    wait(step.device)
    started = time.perf_counter()
    for _ in range(steps):
        step()
    wait(step.device)
    return (time.perf_counter() - started) / steps


def wait(device: torch.device) -> None:
    """Until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def profile(step: Step) -> str:
    """What a GPU's profiler counts in one step: its kernels, their time, and where the host waits for the device."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    wait(step.device)
    with torch.profiler.profile(activities=activities) as record:
        for _ in range(STEPS):
            step()
    events = record.key_averages()
    kernels = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(event.self_device_time_total for event in kernels) / STEPS / 1000
    waits = {event.key: event.count / STEPS for event in events if event.key in WAITS}
    # The profiler itself waits once at its end.
    shown = ", ".join(f"{key.removeprefix('cuda')} {count:.1f}" for key, count in waits.items()) or "none"
    launches = sum(event.count for event in kernels) / STEPS
    return f"{launches:.0f} kernels and copies, {busy:.1f} ms in them; the host waits: {shown}"


def measure(
    rows: dict[str, Variant], network: DetectionModel, images: torch.Tensor, rounds: int
) -> tuple[float, dict[str, float], dict[str, str]]:
    """Seconds of the plain float step, each row's time over that of ``alike``, and on a GPU each row's profile.

    Each row takes turns with its reference alone; the ratio is the median of those of neighbours. With all networks in
    one round the same ratio differed by a third from run to run.
    """
    plain, ratios, profiles = 0.0, {}, {}
    references = {name: Step(network, rows[name], images) for name in rows if rows[name].flags is None}
    for name, variant in rows.items():
        step = references.get(name) or Step(network, variant, images)
        reference = references[alike(name, variant)]
        timed(reference), timed(step)  # first steps allocate and choose kernels
        pairs = [(timed(reference), timed(step)) for _ in range(rounds)]
        ratios[name] = 1.0 if step is reference else statistics.median(own / other for other, own in pairs)
        if step is reference:
            plain = statistics.median(own for _, own in pairs)
        LOGGER.info(f"{name}: {ratios[name]:.2f} of {alike(name, variant)}")
        if images.is_cuda:
            profiles[name] = profile(step)
    return plain, ratios, profiles


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", default="yolov5n.yaml")
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument(
        "--precision", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16", "float16"]
    )
    parser.add_argument("--rows", default=".*", help="regular expression of the rows to measure beside float's")
    parser.add_argument("--device", default="cpu", help="cpu, or a GPU's number")
    parser.add_argument("--no-memory", action="store_true", help="do not measure memory")
    parser.add_argument("--memory-of", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    keep_freed_memory()  # as train.py does
    torch.manual_seed(0)
    device = select_device(options.device)
    images = torch.rand(options.batch_size, 3, options.imgsz, options.imgsz).to(device)
    network = settled_network(options.cfg, images)
    rows = variants([getattr(torch, name) for name in options.precision])
    rows = {name: row for name, row in rows.items() if row.flags is None or re.fullmatch(options.rows, name)}
    if options.memory_of:
        print(growth(Step(network, rows[options.memory_of], images)))
        return
    plain, ratios, profiles = measure(rows, network, images, options.rounds)
    grown = {} if options.no_memory else {name: memory(options, name) for name in rows}
    report(options, rows, plain, ratios, grown, profiles)


def report(
    options: argparse.Namespace,
    rows: dict[str, Variant],
    plain: float,
    ratios: dict[str, float],
    grown: dict[str, int],
    profiles: dict[str, str],
) -> None:
    """Prints the table and puts it into docs/results.md."""
    threads = f"{torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
    if options.device != "cpu":
        threads = torch.cuda.get_device_name()
    title = f"{Path(options.cfg).stem}, {options.imgsz} px, batch {options.batch_size}, {threads}"
    command = f"python benchmarks/train_step.py --cfg {options.cfg} --imgsz {options.imgsz}"
    command += f" --batch-size {options.batch_size} --rounds {options.rounds} --precision {' '.join(options.precision)}"
    command += "" if options.rows == ".*" else f" --rows '{options.rows}'"
    command += "" if options.device == "cpu" else f" --device {options.device}"
    command += "" if grown else " --no-memory"
    lines = [f"## Training step: {title}", "", f"`{command}`", "", f"{date.today().isoformat()}, {machine()}."]
    lines += ["Ratios are medians over neighbouring steps. W4A4; the names of peers carry their version.", ""]
    lines += [
        "| step | images per second, by the ratio | time: plain float | time: float alike | memory: float alike |"
    ]
    lines += ["|---|---|---|---|---|"]
    for name, variant in rows.items():
        reference = alike(name, variant)
        over_plain = ratios[name] * (ratios[reference] if name != reference else 1)
        over_alike = 1.0 if name.startswith("float") else ratios[name]
        own = name if name.startswith("float") else reference
        room = f"{grown[name] / grown[own]:.2f}" if grown else ""
        lines.append(
            f"| {name} | {options.batch_size / plain / over_plain:.1f} | {over_plain:.2f} | {over_alike:.2f} | {room} |"
        )
    lines += ["", *(f"* {name}: {line}." for name, line in profiles.items())] if profiles else []
    print("\n".join(lines))
    write_section(f"train_step {Path(options.cfg).stem} {options.imgsz} {threads}", lines)


if __name__ == "__main__":
    main()
