"""Images per second of one training step: float, each method at 4 bit, LSQ with GABFusion and ADA, interleaved.

    python benchmarks/train_step.py --imgsz 320 --batch-size 16

Ratios are the result; absolute numbers depend on the machine and on what else it does.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from real_data import machine, write_section  # noqa: E402

from models.yolo import DetectionModel  # noqa: E402
from quant.calibrate import calibrate  # noqa: E402
from quant.config import build_config  # noqa: E402
from quant.prepare import prepare  # noqa: E402
from quant.registry import QUANTIZERS  # noqa: E402
from quant.training import QuantizedTraining  # noqa: E402
from utils.hyp import DEFAULT_FILE, load_hyp  # noqa: E402
from utils.loss import DetectionLoss, scale_loss_gains  # noqa: E402

VARIANTS = {
    "float": None,
    **{f"{method} w4a4": {"method": method} for method in QUANTIZERS if method != "lsq+"},  # the same step as lsq
    "lsq w4a4 + GABFusion": {"method": "lsq", "gabfusion": True},
    "lsq w4a4 + ADA": {"method": "lsq", "ada": True},
}


class Step:
    """One network with its loss and optimizer; calling it trains one step."""

    def __init__(self, network: DetectionModel, flags: dict | None, images: torch.Tensor, size: int) -> None:
        self.model = copy.deepcopy(network).to(memory_format=torch.channels_last)
        self.images, self.companion = images, None
        if flags is not None:
            config = build_config(bits=4, **flags)
            teacher = copy.deepcopy(network).eval().fuse().to(memory_format=torch.channels_last)
            prepare(self.model, config)
            calibrate(self.model, [images])
            self.companion = QuantizedTraining(self.model, copy.deepcopy(self.model), config, teacher, 10)
            self.companion.set_progress(0.3)  # where the normalisation is at full strength
        detect = self.model.detect
        gains = scale_loss_gains(load_hyp(DEFAULT_FILE), detect.nl, detect.nc, size)
        self.loss = DetectionLoss(detect.anchors, detect.stride, detect.nc, gains)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9, nesterov=True)
        count = 8 * len(images)
        self.targets = torch.cat(
            (
                torch.arange(count).div(8, rounding_mode="floor")[:, None],
                torch.zeros(count, 1),
                torch.rand(count, 4) * 0.5,
            ),
            1,
        )
        self.model.train()

    def __call__(self) -> None:
        features = self.companion.features if self.companion else ()
        output = self.model(self.images, features=features)
        raw, maps = output if features else (output, {})
        loss = self.loss(raw, self.targets)[0]
        if features:
            loss = loss + sum(self.companion.distillation(self.images, maps, raw).values())
        penalty = self.companion.penalty(len(self.images)) if self.companion else None
        if penalty is not None:
            loss = loss + penalty
        loss.backward()
        if self.companion:
            self.companion.after_backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", default="yolov5n.yaml")
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    torch.manual_seed(0)
    network = DetectionModel(options.cfg)
    images = torch.rand(options.batch_size, 3, options.imgsz, options.imgsz).to(memory_format=torch.channels_last)
    steps = {name: Step(network, flags, images, options.imgsz) for name, flags in VARIANTS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()  # first steps allocate and choose kernels
    for _ in range(options.rounds):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - started)
    reference = statistics.median(seconds["float"])
    lines = ["## Training step", "", f"`python benchmarks/train_step.py --cfg {options.cfg} --imgsz {options.imgsz} "
             f"--batch-size {options.batch_size} --rounds {options.rounds}`", "",
             f"{date.today().isoformat()}, {machine()}. Medians of interleaved steps.", "",
             "| step | images per second | time against float |", "|---|---|---|"]  # fmt: skip
    for name, values in seconds.items():
        median = statistics.median(values)
        lines.append(f"| {name} | {options.batch_size / median:.1f} | {median / reference:.2f} |")
    print("\n".join(lines))
    write_section("train_step", lines)


if __name__ == "__main__":
    main()
