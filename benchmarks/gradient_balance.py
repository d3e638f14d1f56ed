"""Which branch of a fusion node gets the larger gradient, the shallow or the deep one, in float and quantized?

    python benchmarks/gradient_balance.py --weights float/last.pt plain/last.pt gabfusion/last.pt --data deeppcb.yaml

The diagnosis of GABFusion (arXiv 2511.05898, section 3.1), repeated: at every concatenation of branches F_i the norm
G_i = ||dL / dF_i|| through this node, for the training loss on training batches. Measured are

* every float network in ``--weights``, and the same calibrated (not trained) with each of ``--methods`` at each of
  ``--bits``, in three states: ``plain`` concatenation; ``normalised`` (GABFusion at full strength, equal factors);
  ``balanced`` (the same after the feedback law has moved the factors over as many batches, on fixed weights);
* every quantized network in ``--weights``, as it was trained: plain, or with GABFusion and its trained factors.

All networks see the same batches, in training mode, so ratios are compared batch by batch. Of a node's branches, the
deep one is that with the most convolutions between it and the image, the shallow one that with the fewest. A branch is
said to dominate if its norm is the larger one in at least nine batches of ten.

Writes gradient_balance_<data>.csv (one row per network, state, node, branch, batch) to ``--output``, a figure of the
same name and a section of docs/results.md.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from common import machine, write_section  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from torch import Tensor  # noqa: E402

from models.yolo import DetectionModel  # noqa: E402
from quant.calibrate import calibrate  # noqa: E402
from quant.config import QuantConfig  # noqa: E402
from quant.gabfusion import GABFusion, calibrate_fusion, fusion_nodes, set_strength  # noqa: E402
from quant.prepare import example_input, insert_fusion, model_from_checkpoint, prepare  # noqa: E402
from quant.recipe import build_config, parse_bits  # noqa: E402
from quant.registry import QUANTIZERS  # noqa: E402
from quant.training import calibration_batches  # noqa: E402
from utils.checkpoint import load_checkpoint  # noqa: E402
from utils.dataset import create_dataloader  # noqa: E402
from utils.dataset_yaml import load_dataset_yaml, prepare_dataset  # noqa: E402
from utils.devices import select_device  # noqa: E402
from utils.errors import UserError  # noqa: E402
from utils.hyp import DEFAULT_FILE, load_hyp  # noqa: E402
from utils.log import LOGGER  # noqa: E402
from utils.loss import DetectionLoss, scale_loss_gains  # noqa: E402

STATES = ("plain", "normalised", "balanced")
TRAINED = "trained GABFusion"
# The feedback law with constants that settle within some ten batches on fixed weights; in training it has thousands.
SETTLING = {"beta": 0.3, "eta": 0.3}
SMALLEST = 1e-30  # stands for a gradient of zero, so that logarithms exist
DOMINATES = 10  # percentile of the ratio that must lie on the same side of 1 as all above it
# Okabe and Ito's colours, told apart by colour-blind readers; the markers differ too.
STYLES = {
    "plain": ("#0072B2", "o"),
    "normalised": ("#E69F00", "s"),
    "balanced": ("#009E73", "^"),
    TRAINED: ("#CC79A7", "D"),
}


@dataclass(frozen=True)
class Row:
    """One line of the CSV: the gradient of one branch in one batch."""

    network: str
    method: str
    bits: str
    trained: bool  # its quantized form was trained; else calibrated, or float
    state: str
    node: str
    branch: int
    depth: int  # convolutions on the longest way from the image
    channels: int
    batch: int
    loss: float
    factor: float  # of the branch, inside the gradient norm as the chain rule has it
    gradient_norm: float


@dataclass(frozen=True)
class Branch:
    """What is known of a node's input before any measurement."""

    depth: int
    channels: int


@dataclass(frozen=True)
class Case:
    """One network in one state."""

    network: str
    method: str = "float"
    bits: str = "32"
    trained: bool = False
    state: str = "plain"

    @property
    def label(self) -> str:
        """How tables and messages call the network."""
        kind = "trained" if self.trained else "calibrated"
        return self.network if self.method == "float" else f"{self.network} {self.method} {self.bits} {kind}"


# --- topology ---------------------------------------------------------------------------------------------------------


def branches_of(model: DetectionModel, images: Tensor) -> dict[str, list[Branch]]:
    """Depth and channels of every fusion node's branches.

    Args:
        model: float, with fusion nodes, in training mode.
        images: (B, 3, H, W).
    """
    inputs: dict[str, list[Tensor]] = {}
    handles = [
        node.register_forward_pre_hook(lambda _module, arguments, name=name: inputs.update({name: arguments[0]}))
        for name, node in fusion_nodes(model).items()
    ]
    model(images)
    for handle in handles:
        handle.remove()
    depths: dict[object, int] = {}
    return {
        name: [Branch(_convolutions_before(branch.grad_fn, depths), branch.shape[1]) for branch in branches]
        for name, branches in inputs.items()
    }


def _convolutions_before(last: object, depths: dict[object, int]) -> int:
    """Convolutions on the longest way back from an autograd node; ``depths`` remembers what is known."""
    waiting = [last]
    while waiting:
        function = waiting[-1]
        sources = [source for source, _ in function.next_functions if source is not None]
        unknown = [source for source in sources if source not in depths]
        if unknown:
            waiting += unknown
            continue
        waiting.pop()
        before = max((depths[source] for source in sources), default=0)
        depths[function] = before + ("Convolution" in type(function).__name__)
    return depths[last]


# --- measurement ------------------------------------------------------------------------------------------------------


class Data:
    """The batches that all networks see, and the images for calibration.

    Attributes:
        batches: (images (B, 3, H, W) uint8, targets (n, 6)) of the training split, augmented unless ``--plain-images``.
        calibration: float images of the training split, letterboxed.
    """

    def __init__(self, options: argparse.Namespace, hyp: dict, stride: int, images: int) -> None:
        self.spec = load_dataset_yaml(options.data)
        prepare_dataset(self.spec)
        shared = {"workers": 0, "num_classes": self.spec.nc, "seed": options.seed, "hyp": hyp, "shuffle": True}
        size, batch = options.imgsz, options.batch_size
        loader, dataset = create_dataloader(
            self.spec.train, size, batch, stride, augment=not options.plain_images, **shared
        )
        if len(dataset) < batch:
            raise UserError(f"--batch-size {batch}: {options.data} has {len(dataset)} training images only")
        self.batches: list[tuple[Tensor, Tensor]] = []
        epoch = 0
        while len(self.batches) < options.batches:
            loader.set_epoch(epoch)
            full = ((images, targets) for images, targets, _, _ in loader if len(images) == batch)
            self.batches += [pair for pair, _ in zip(full, range(options.batches - len(self.batches)), strict=False)]
            epoch += 1
        _, plain = create_dataloader(self.spec.train, size, batch, stride, **shared)
        self.calibration = calibration_batches(plain, images, options.device)


class Meter:
    """Measures networks on the batches of ``data`` and keeps the rows."""

    def __init__(self, data: Data, hyp: dict, options: argparse.Namespace) -> None:
        self.data, self.hyp, self.options = data, hyp, options
        self.file = options.output / f"{_name(options)}.csv"  # rewritten after every measurement
        self.branches: dict[str, list[Branch]] = {}
        self.rows: list[Row] = []

    def losses(self, model: DetectionModel, settle: bool = False) -> Iterable[float]:
        """Gradients at the fusion nodes for all batches; after each, the nodes hold that batch's norms.

        The backward pass ends at the nodes' inputs and leaves the weights out, which takes half the time.

        Args:
            settle: let the feedback law move the branch factors after each.
        """
        detect, device = model.detect, self.options.device
        gains = scale_loss_gains(self.hyp, detect.nl, detect.nc, self.options.imgsz)
        loss_function = DetectionLoss(detect.anchors, detect.stride, detect.nc, gains).to(device)
        model.train()
        nodes, inputs = list(fusion_nodes(model).values()), []

        def apart(_module: GABFusion, arguments: tuple[list[Tensor]]) -> tuple[list[Tensor]]:
            # Views that only this node reads: the gradient of F_i itself would need the whole backbone's, too.
            views = [branch.view_as(branch) for branch in arguments[0]]
            inputs.extend(views)
            return (views,)

        handles = [node.register_forward_pre_hook(apart) for node in nodes]
        for images, targets in self.data.batches:
            inputs.clear()
            loss, _ = loss_function(model(images.to(device).float() / 255), targets.to(device))
            torch.autograd.grad(loss, inputs)
            if settle:
                for node in nodes:
                    node.update_balance()
            yield float(loss.detach()) / len(images)
        for handle in handles:
            handle.remove()

    def measure(self, model: DetectionModel, case: Case) -> None:
        """Adds one row per batch, node and branch."""
        for batch, loss in enumerate(self.losses(model)):
            # A network trained with another scope may have nodes that the float one has not, and the other way round.
            for name, node in ((name, node) for name, node in fusion_nodes(model).items() if name in self.branches):
                values = zip(self.branches[name], node.factors().tolist(), node.energy.tolist(), strict=True)
                for index, (branch, factor, norm) in enumerate(values):
                    self.rows.append(
                        Row(*astuple(case), name.removesuffix(".balance"), index, branch.depth, branch.channels,
                            batch, loss, factor, norm)
                    )  # fmt: skip
        write_csv(self.rows, self.file)
        LOGGER.info(f"{case.label}, {case.state}: " + describe(ratios(self.rows)[case]))

    def measure_states(self, model: DetectionModel, case: Case) -> None:
        """The plain concatenation, GABFusion's normalisation, and that with balanced factors, of one network."""
        for state in self.options.states:
            set_strength(model, 0.0 if state == "plain" else 1.0)
            if state == "balanced":
                for _ in self.losses(model, settle=True):
                    pass
            self.measure(model, Case(case.network, case.method, case.bits, case.trained, state))


def settling(config: QuantConfig) -> QuantConfig:
    """``config`` with fusion nodes that stay as they are until they are told to settle."""
    config.gabfusion.enabled, config.gabfusion.balance, config.gabfusion.paper = True, "feedback", False
    config.gabfusion.beta, config.gabfusion.eta = SETTLING["beta"], SETTLING["eta"]
    return config


def float_network(checkpoint: dict, options: argparse.Namespace) -> DetectionModel:
    """The checkpoint's network with fusion nodes; these do nothing yet."""
    model = model_from_checkpoint(checkpoint)
    if not fusion_nodes(model):
        insert_fusion(model, settling(build_config(recipe=options.recipe)), example_input(model))
    return model.to(options.device)


def measure_float(meter: Meter, name: str, checkpoint: dict) -> None:
    """A float checkpoint, and what calibration makes of it."""
    options = meter.options
    model = float_network(checkpoint, options)
    images = meter.data.batches[0][0].to(options.device)
    meter.branches = branches_of(model.train(), images[:2].float() / 255)
    calibrate_fusion(model.eval(), meter.data.calibration)
    meter.measure_states(model, Case(name))
    for method in options.methods:
        for bits in options.bits:
            config = settling(build_config(method, bits, recipe=options.recipe))
            model = prepare(model_from_checkpoint(checkpoint).to(options.device), config)
            calibrate(model, meter.data.calibration)
            meter.measure_states(model, Case(name, method, label(bits)))


def measure_trained(meter: Meter, name: str, checkpoint: dict) -> None:
    """A quantized checkpoint as its training left it."""
    model = model_from_checkpoint(checkpoint)
    config = QuantConfig.from_saved(checkpoint["quantization"], "the checkpoint")
    bits = f"w{config.weight.bits}a{config.activation.bits}"
    state = TRAINED if fusion_nodes(model) else "plain"
    if state == "plain":
        insert_fusion(model, settling(build_config(recipe=meter.options.recipe)), example_input(model))
    meter.measure(model.to(meter.options.device), Case(name, config.method, bits, True, state))


def label(bits: str) -> str:
    """``4`` as ``w4a4``."""
    return "w{}a{}".format(*parse_bits(bits))


# --- evaluation -------------------------------------------------------------------------------------------------------


def ratios(rows: list[Row]) -> dict[Case, dict[str, np.ndarray]]:
    """Case -> node -> (batches,) gradient norm of the deepest branch over that of the shallowest, in batch order."""
    norms: dict[Case, dict[str, dict[int, tuple[int, list[float]]]]] = {}
    for row in rows:
        case = Case(row.network, row.method, row.bits, row.trained, row.state)
        branches = norms.setdefault(case, {}).setdefault(row.node, {})
        branches.setdefault(row.branch, (row.depth, []))[1].append(max(row.gradient_norm, SMALLEST))
    found: dict[Case, dict[str, np.ndarray]] = {}
    for case, nodes in norms.items():
        for node, branches in nodes.items():
            ordered = sorted(branches.values(), key=lambda entry: entry[0])
            found.setdefault(case, {})[node] = np.array(ordered[-1][1]) / np.array(ordered[0][1])
    return found


def summary(ratio: np.ndarray) -> tuple[float, float, float]:
    """Median, 10th and 90th percentile over batches."""
    return tuple(float(value) for value in np.exp(np.percentile(np.log(ratio), (50, DOMINATES, 100 - DOMINATES))))


def dominating(ratio: np.ndarray) -> str:
    """``deep``, ``shallow``, or ``neither`` where the order changes between batches."""
    _, low, high = summary(ratio)
    return "deep" if low > 1 else "shallow" if high < 1 else "neither"


def interval(ratio: np.ndarray) -> str:
    """``1.66 (1.56 to 1.69)``."""
    return "{:.2f} ({:.2f} to {:.2f})".format(*summary(ratio))


def imbalance(nodes: dict[str, np.ndarray]) -> float:
    """Larger over smaller norm, whichever is larger, geometric mean over nodes and batches; 1 is balanced."""
    return float(np.exp(np.mean([np.abs(np.log(ratio)).mean() for ratio in nodes.values()])))


def describe(nodes: dict[str, np.ndarray]) -> str:
    """Which branch dominates at each node, in words."""
    parts = []
    for who in ("deep", "shallow", "neither"):
        # The larger over the smaller one where it is clear which that is.
        there = {node: 1 / r if who == "shallow" else r for node, r in nodes.items() if dominating(r) == who}
        listed = ", ".join(f"{node} {interval(ratio)}" for node, ratio in there.items())
        parts += [f"{who} {'is clearly larger' if who == 'neither' else 'dominates'} at {listed}"] if there else []
    return "; ".join(parts)


def effects(found: dict[Case, dict[str, np.ndarray]]) -> dict[Case, dict[str, np.ndarray]]:
    """Quantized over float, batch by batch: every quantized network with plain concatenations -> node -> (batches,).

    A trained network is compared with the first float one.
    """
    floats = [case for case in found if case.method == "float" and case.state == "plain"]
    quantized = [case for case in found if case.method != "float" and case.state == "plain"]
    before = {case: found[floats[0] if case.trained else Case(case.network)] for case in quantized}
    return {case: {node: ratio / before[case][node] for node, ratio in found[case].items()} for case in quantized}


def conclusions(found: dict[Case, dict[str, np.ndarray]]) -> list[str]:
    """What the numbers say, a sentence a line."""
    lines, floats = [], [case for case in found if case.method == "float" and case.state == "plain"]
    lines += [f"* {case.label}: {describe(found[case])}." for case in floats]
    for case, nodes in effects(found).items():
        before = found[floats[0] if case.trained else Case(case.network)]
        same = sum(dominating(found[case][node]) == dominating(before[node]) for node in nodes)
        moves, medians = [dominating(ratio) for ratio in nodes.values()], [summary(r)[0] for r in nodes.values()]
        lines.append(
            f"* {case.label}: the same verdict as float at {same} of {len(nodes)} nodes; deep : shallow is "
            f"{min(medians):.2f} to {max(medians):.2f} times float's, clearly more at {moves.count('deep')}, clearly "
            f"less at {moves.count('shallow')}, unclear at {moves.count('neither')}."
        )
    for label in dict.fromkeys(case.label for case in found):
        states = {case.state: imbalance(nodes) for case, nodes in found.items() if case.label == label}
        listed = ", ".join(f"{value:.2f} {state}" for state, value in states.items())
        lines.append(f"* Larger : smaller norm, mean of all nodes, of {label}: {listed}.")
    return lines


# --- report -----------------------------------------------------------------------------------------------------------


def table(rows: list[Row], found: dict[Case, dict[str, np.ndarray]]) -> list[str]:
    """Markdown: the ratio of every network in every state, then the effect of quantization on it."""
    depths = depth_range(rows)
    losses: dict[Case, dict[int, float]] = {}
    for row in rows:
        losses.setdefault(Case(row.network, row.method, row.bits, row.trained, row.state), {})[row.batch] = row.loss
    heads = [f"{node} ({deep} / {shallow})" for node, (deep, shallow) in depths.items()]
    lines = ["| network | state | loss | " + " | ".join(heads) + " |", "|---|---|---|" + "---|" * len(heads)]
    for case, nodes in found.items():
        cells = [
            f"{np.mean(list(losses[case].values())):.3f}",
            *(interval(nodes[node]) if node in nodes else "" for node in depths),
        ]
        lines.append(f"| {case.label} | {case.state} | {' | '.join(cells)} |")
    changed = effects(found)
    if changed:
        lines += [
            "",
            "Quantized over float, batch by batch (plain concatenation; above 1 towards the deep branch):",
            "",
        ]
        lines += ["| network | " + " | ".join(depths) + " |", "|---|" + "---|" * len(depths)]
    for case, nodes in changed.items():
        cells = [interval(nodes[node]) if node in nodes else "" for node in depths]
        lines.append(f"| {case.label} | {' | '.join(cells)} |")
    return lines


def depth_range(rows: list[Row]) -> dict[str, tuple[int, int]]:
    """Node -> convolutions before its deepest and its shallowest branch."""
    depths: dict[str, set[int]] = {}
    for row in rows:
        depths.setdefault(row.node, set()).add(row.depth)
    return {node: (max(values), min(values)) for node, values in depths.items()}


def write_csv(rows: list[Row], file: Path) -> None:
    """All rows, one per network, state, node, branch and batch."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow([field.name for field in fields(Row)])
        writer.writerows(astuple(row) for row in rows)


def draw(found: dict[Case, dict[str, np.ndarray]], depths: dict[str, tuple[int, int]], title: str, file: Path) -> None:
    """One panel per node: deep over shallow for every network, median and the middle 80 % of batches.

    Args:
        depths: node -> convolutions before its deepest and its shallowest branch.
    """
    networks = list(dict.fromkeys(case.label for case in found))
    size = (max(7.5, 0.95 * len(networks) + 2.5), 1.9 * len(depths) + 1.9)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(depths), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, (node, (deep, shallow)) in zip(panels, depths.items(), strict=True):
        for case, nodes in ((case, nodes) for case, nodes in found.items() if node in nodes):
            states = [other.state for other in found if other.label == case.label]
            place = networks.index(case.label) + 0.22 * (states.index(case.state) - (len(states) - 1) / 2)
            middle, low, high = summary(nodes[node])
            color, marker = STYLES[case.state]
            axes.errorbar(
                place, middle, [[middle - low], [high - middle]], color=color, marker=marker, markersize=7, capsize=3,
                linestyle="none",
            )  # fmt: skip
        axes.axhline(1, color="black", linewidth=1)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(lambda value, _position: f"{value:g}")
        axes.grid(axis="y", color="0.9")
        axes.set_ylabel("deep : shallow")
        axes.set_title(f"{node}: {deep} convolutions before the deep branch, {shallow} before the shallow", fontsize=10)
        for height, text, edge in ((1.0, "deep\nlarger", "top"), (0.0, "shallow\nlarger", "bottom")):
            axes.text(1.01, height, text, transform=axes.transAxes, ha="left", va=edge, fontsize=8, color="0.35")
    low, high = panels[0].get_ylim()
    panels[0].set_ylim(min(low, 0.5), max(high, 2.0))
    panels[-1].set_xticks(range(len(networks)), [name.replace(" ", "\n") for name in networks], fontsize=9)
    panels[-1].set_xlim(-0.6, len(networks) - 0.4)
    used = [state for state in STYLES if any(case.state == state for case in found)]
    handles = [panels[0].plot([], [], color=STYLES[s][0], marker=STYLES[s][1], linestyle="none")[0] for s in used]
    figure.legend(handles, used, loc="outside lower center", ncols=len(used), fontsize=9, frameon=False)
    figure.suptitle(title, fontsize=11)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def report(meter: Meter, options: argparse.Namespace) -> None:
    """Prints the conclusions and writes the figure and the section of the results file."""
    found = ratios(meter.rows)
    name = _name(options)
    figure = options.report.parent / "figures" / f"{name}.png"
    stem = Path(options.data).stem
    title = f"Gradient norms at the fusion nodes, {stem}: median and 10 to 90 % of {options.batches} batches"
    draw(found, depth_range(meter.rows), title, figure)
    said = conclusions(found)
    print("\n".join(said))
    images = "letterboxed, not augmented" if options.plain_images else "augmented as in training"
    lines = [
        f"## Gradient balance at the fusion nodes, {stem}", "", f"`{options.command}`", "",
        f"{date.today().isoformat()}, {machine()}. {options.batches} batches of {options.batch_size} training images "
        f"({images}), network in training mode, training loss.",
        "Norm of the deepest branch's gradient over the shallowest branch's, both through the node alone: median over "
        "batches (10th to 90th percentile); above 1 the deep branch has the larger gradient. In brackets after a node: "
        "convolutions before its deepest / shallowest branch.", "",
        *table(meter.rows, found), "",
        "A branch dominates if its norm is the larger one in nine batches of ten; clearly more or less than float "
        "means so in nine of ten.", "", *said, "",
        f"![deep : shallow gradient norms](figures/{figure.name})", "",
    ]  # fmt: skip
    write_section(name, lines, options.report)


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", nargs="+", required=True, help="float checkpoints, and quantized ones if wanted")
    parser.add_argument("--names", nargs="+", help="of the weights, in that order; else their run folders' names")
    parser.add_argument("--data", required=True, help="data set YAML that they were trained on")
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--methods", nargs="*", default=list(QUANTIZERS), choices=list(QUANTIZERS))
    parser.add_argument("--bits", nargs="*", default=["8", "4", "3", "2"], help="such as 4 or w4a8")
    parser.add_argument("--states", nargs="+", default=list(STATES), choices=STATES)
    parser.add_argument("--recipe", help="quantization YAML under --methods and --bits, such as the papers' own grids")
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--plain-images", action="store_true", help="do not augment")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "gradient_balance", help="folder of the CSV")
    parser.add_argument("--report", type=Path, default=ROOT / "docs" / "results.md", help="Markdown file to write into")
    options = parser.parse_args(arguments)
    options.command = _command(options)
    options.device = select_device(options.device)
    options.names = options.names or [Path(file).resolve().parents[1].name for file in options.weights]
    if len(options.names) != len(options.weights):
        raise UserError(f"--names: {len(options.names)} names for {len(options.weights)} weights")
    return options


def _name(options: argparse.Namespace) -> str:
    """Of the CSV, the figure and the section."""
    recipe = f"_{Path(options.recipe).stem}" if options.recipe else ""
    return f"gradient_balance_{Path(options.data).stem}{recipe}"


def _command(options: argparse.Namespace) -> str:
    """The command as results quote it: folders of this machine left out."""
    files = [str(Path(*Path(file).parts[-3:])) for file in options.weights]
    parts = ["python benchmarks/gradient_balance.py --weights", *files]
    parts += ["--names", *options.names] if options.names else []
    parts += ["--data", Path(options.data).name]
    parts += ["--imgsz", str(options.imgsz), "--methods", *options.methods, "--bits", *options.bits]
    parts += ["--batches", str(options.batches), "--batch-size", str(options.batch_size), "--seed", str(options.seed)]
    parts += ["--recipe", Path(options.recipe).name] if options.recipe else []
    return " ".join(parts + (["--plain-images"] if options.plain_images else []))


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    try:
        options = parse_options(arguments)
        torch.manual_seed(options.seed)
        checkpoints = {name: load_checkpoint(file) for name, file in zip(options.names, options.weights, strict=True)}
        floats = {name: c for name, c in checkpoints.items() if not c.get("quantization")}
        if not floats:
            raise UserError("--weights: all are quantized; give the float checkpoint that they started from, too")
        first = next(iter(floats.values()))
        hyp = first.get("hyp") or load_hyp(DEFAULT_FILE)
        data = Data(options, hyp, int(max(first["stride"])), QuantConfig().calibration.images)
        for name, checkpoint in checkpoints.items():
            if list(checkpoint["names"].values()) != list(data.spec.names.values()):
                raise UserError(f"{name}: trained on other classes than those of {options.data}")
        meter = Meter(data, hyp, options)
        for name, checkpoint in sorted(checkpoints.items(), key=lambda entry: entry[0] not in floats):
            (measure_float if name in floats else measure_trained)(meter, name, checkpoint)
        report(meter, options)
    except UserError as error:
        LOGGER.error(f"gradient_balance.py: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
