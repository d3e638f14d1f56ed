"""Fine-tunes a pretrained detector on data sets in float and at 4 bit, with and without GABFusion and ADA.

    python benchmarks/real_data.py --weights yolov5n.pt --data bccd.yaml deeppcb.yaml --output runs/real

For each data set: float fine-tuning, then --quant lsq --bits 4 plain, with --gabfusion, with --ada, with both, and the
other methods plain (same epochs, same seed, same start), evaluation of each last epoch on the test split (val where
there is none), export, and evaluation of the ONNX. What is done already is not done again, so the command can be
repeated after an interruption.
Tables go to docs/results.md between the markers of this benchmark.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common import LOCALISATION, machine, read_accuracy, run_script, write_section  # noqa: E402

from quant.gabfusion import fusion_nodes  # noqa: E402
from quant.prepare import model_from_checkpoint  # noqa: E402
from training.options import options_of_run  # noqa: E402
from training.run import Run  # noqa: E402
from utils.checkpoint import load_checkpoint  # noqa: E402
from utils.dataset_yaml import load_dataset_yaml  # noqa: E402
from utils.log import LOGGER  # noqa: E402
from utils.run_log import read_results  # noqa: E402

VARIANTS = {
    "plain": [],
    "+ GABFusion": ["--gabfusion"],
    "+ ADA": ["--ada"],
    "+ GABFusion + ADA": ["--gabfusion", "--ada"],
    "+ GABFusion (feedback)": ["--gabfusion", "feedback"],
    "pact": ["--quant", "pact"],  # the last --quant counts
    "dsq": ["--quant", "dsq"],
    "n2uq": ["--quant", "n2uq"],
}


def accuracy(weights: Path, data: str, task: str, options: argparse.Namespace) -> dict[str, float]:
    """What ``read_accuracy`` finds, kept in a JSON file beside the weights.

    Files of an older version lack mAP75 and the numbers of matched boxes: they are measured again, and if the network
    can no longer be run the old numbers stay and the table has gaps.
    """
    file = weights.with_suffix(weights.suffix + f".{task}.json")
    known = json.loads(file.read_text()) if file.exists() else {}
    if not known.keys() >= LOCALISATION.keys():
        arguments = ["--weights", str(weights), "--data", data, "--imgsz", str(options.imgsz), "--task", task]
        arguments += ["--workers", "1", "--batch-size", "16", "--project", str(options.output / "val")]
        try:
            known = read_accuracy(run_script("val.py", *arguments))
        except SystemExit as error:
            if not known:
                raise
            LOGGER.warning(f"{file}: kept as it is, the network could not be measured again: {error}")
        else:
            file.write_text(json.dumps(known))
    return known


def train_once(name: str, data: str, options: argparse.Namespace, *arguments: str) -> Path:
    """One training run unless it has been finished before; returns its folder."""
    folder = options.output / name
    last = folder / "weights" / "last.pt"
    if last.exists() and load_checkpoint(last).get("finished"):
        return folder
    common = ["--data", data, "--imgsz", str(options.imgsz), "--batch-size", "16", "--workers", "1", "--cache"]
    common += ["--hyp", options.hyp, "--noval", "--seed", str(options.seed)]
    output = run_script("train.py", *common, "--project", str(options.output), "--name", name, "--exist-ok", *arguments)
    (folder / "log.txt").write_text(output)
    return folder


def branch_ratios(folder: Path, data: str, options: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Largest over smallest branch gradient at each fusion node: with equal factors, and with the trained ones.

    Both are measured on the same training batches, with the trained weights.
    """
    file = folder / "branch_ratios.json"
    if not file.exists():
        checkpoint = load_checkpoint(folder / "weights" / "last.pt")
        settings = options_of_run(checkpoint["options"])
        settings.batch_size, settings.augment = 16, False
        run = Run(settings, load_dataset_yaml(data), checkpoint["hyp"], options.output / "balance")
        ratios = {}
        for column, equal in enumerate((True, False)):
            model = model_from_checkpoint(checkpoint).train()
            for node in fusion_nodes(model).values():
                if equal:
                    node.logits.data.zero_()
                node.balance = "measured"  # neither trained nor moved
            loss = run.make_loss(model)
            run.train_loader.set_epoch(0)
            for index, (images, targets, _, _) in enumerate(run.train_loader):
                loss(model(images.float() / 255), targets)[0].backward()
                for node in fusion_nodes(model).values():
                    node.update_balance()
                if index == 9:
                    break
            for name, node in fusion_nodes(model).items():
                ratios.setdefault(name, [0.0, 0.0])[column] = float(
                    node.energy_average.max() / node.energy_average.min()
                )
        file.write_text(json.dumps(ratios))
    return json.loads(file.read_text())


def measure(data: str, options: argparse.Namespace) -> list[str]:
    """All runs on one data set; returns its part of the report."""
    stem = Path(data).stem
    spec = load_dataset_yaml(data)
    task = "test" if spec.test else "val"
    float_epochs, epochs = options.float_epochs[stem], options.epochs[stem]
    float_run = train_once(
        f"{stem}_float", data, options, "--weights", options.weights, "--epochs", str(float_epochs)
    )  # fmt: skip
    start = float_run / "weights" / "last.pt"
    rows = [("float", accuracy(start, data, task, options), None, None)]
    zero = train_once(f"{stem}_calibrated", data, options, "--weights", str(start), "--quant", "lsq", "--epochs", "0")
    rows.append(("w4a4 calibrated only", accuracy(zero / "weights" / "last.pt", data, task, options), None, None))
    lines = []
    for name in options.variants:
        flags = VARIANTS[name]
        safe = stem + "_" + "".join(c if c.isalnum() else "_" for c in name)
        quantized = ["--weights", str(start), "--quant", "lsq", "--bits", "4", "--epochs", str(epochs)]
        folder = train_once(safe, data, options, *quantized, *flags)
        weights = folder / "weights" / "last.pt"
        if not weights.with_suffix(".onnx").exists():
            output = run_script("export.py", "--weights", str(weights), "--imgsz", str(options.imgsz), "--dynamic")
            (folder / "export.txt").write_text(output)
        onnx = accuracy(weights.with_suffix(".onnx"), data, task, options)
        ratio = read_results(folder / "results.csv")[-1].get("quant/ada_gradient_ratio")
        rows.append((f"w4a4 {name}", accuracy(weights, data, task, options), onnx, ratio))
        if "--gabfusion" in flags and "--ada" not in flags:
            ratios = branch_ratios(folder, data, options)
            lines += [
                f"Branch gradients of {stem}, {name}: largest over smallest, equal factors -> trained factors:",
                "",
            ]
            lines += [f"* `{node}`: {before:.2f} -> {after:.2f}" for node, (before, after) in ratios.items()] + [""]
    return table(stem, task, len(spec.names), float_epochs, epochs, rows) + lines


def table(stem: str, task: str, classes: int, float_epochs: int, epochs: int, rows: list) -> list[str]:
    """The Markdown table of one data set."""
    reference = rows[0][1]["mAP50"]
    lines = [f"### {stem} ({task} split, {classes} classes; {float_epochs} float, {epochs} quantized epochs)", ""]
    heads = ["network", "P", "R", "mAP50", "mAP75", "mAP50-95", "gap mAP50", "matched", "mean IoU", "class accuracy"]
    heads += ["ONNX mAP50 / mAP50-95", "ADA : task gradient"]
    lines += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, values, onnx, ratio in rows:
        gap = "" if name == "float" else f"{(values['mAP50'] - reference) * 100:+.1f}"
        exported = "" if onnx is None else f"{onnx['mAP50']:.3f} / {onnx['mAP']:.3f}"
        share = "" if ratio is None else f"{ratio:.1%}"
        cells = [name, *(number(values, key) for key in ("P", "R", "mAP50", "mAP75", "mAP")), gap]
        cells += [number(values, key, digits) for key, digits in (("matched", 3), ("IoU", 4), ("class", 4))]
        lines.append("| " + " | ".join([*cells, exported, share]) + " |")
    lines += [
        "",
        "Matched: share of labels that a box of the confidence of P and R covers with IoU 0.5 or more, whatever its "
        "class. Mean IoU and class accuracy are of those boxes (localisation and classification apart).",
    ]
    return [*lines, ""]


def number(values: dict[str, float], key: str, digits: int = 3) -> str:
    """A cell; empty for what was not measured."""
    return f"{values[key]:.{digits}f}" if key in values else ""


def pairs(values: list[str]) -> dict[str, int]:
    """``bccd=20`` pairs as a dict."""
    return {name: int(number) for name, number in (value.split("=") for value in values)}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="pretrained float weights")
    parser.add_argument("--data", nargs="+", required=True, help="data set YAMLs")
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--hyp", default="hyp.finetune.yaml")
    parser.add_argument("--float-epochs", nargs="+", default=["bccd=20", "deeppcb=7"], help="NAME=N ...")
    parser.add_argument("--epochs", nargs="+", default=["bccd=10", "deeppcb=4"], help="NAME=N ...")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "real")
    options = parser.parse_args()
    options.float_epochs, options.epochs = pairs(options.float_epochs), pairs(options.epochs)
    options.output = options.output.resolve()
    options.weights = str(Path(options.weights).resolve())
    for data in options.data:
        stem = Path(data).stem
        command = f"python benchmarks/real_data.py --weights {Path(options.weights).name} --data {Path(data).name}"
        command += f" --imgsz {options.imgsz} --epochs {stem}={options.epochs[stem]}"
        command += f" --float-epochs {stem}={options.float_epochs[stem]}"
        lines = ["## Fine-tuning on real images, float against 4 bit", "", f"`{command}`", ""]
        lines += [
            f"{date.today().isoformat()}, {machine()}. One seed; each row is the last epoch, so nothing is selected",
            "",
        ]
        lines[-2] += " on the split that is reported."
        write_section(f"real_data {stem}", lines + measure(str(Path(data).resolve()), options))


if __name__ == "__main__":
    main()
