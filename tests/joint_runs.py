"""Trains as the cases in a JSON file say and notes what each process saw; started by torchrun, or called directly.

torchrun --nproc_per_node 2 joint_runs.py cases.json
"""

import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import torch

import train
from models.backend import load_network
from quant.training import QuantizedTraining
from training.trainer import Trainer
from utils import distributed
from utils.errors import UserError


@contextmanager
def double_precision():
    """Everything is computed in float64: sums in another order then never move a value to another code.

    In float32 they do so now and then, and the network of these tests makes much of it: random weights amplify.
    """
    single, to_single = torch.float32, torch.Tensor.float
    torch.set_default_dtype(torch.float64)
    torch.float32, torch.Tensor.float = torch.float64, torch.Tensor.double
    try:
        yield
    finally:
        torch.set_default_dtype(single)
        torch.float32, torch.Tensor.float = single, to_single


def run_case(name: str, arguments: list[str], folder: Path) -> dict:
    """Trains; returns the loss parts of every batch in this process, and the energies at every optimizer step."""
    steps, energies, step, balance = [], [], Trainer._step, QuantizedTraining.after_backward

    def noted(self, *rest):
        parts = step(self, *rest)
        steps.append(parts.tolist())
        return parts

    def noted_energies(self, *rest):
        balance(self, *rest)
        energies.append([node.energy.tolist() for node in self.nodes.values()])

    Trainer._step, QuantizedTraining.after_backward = noted, noted_energies
    try:
        options = train.parse_arguments([*arguments, "--project", str(folder), "--name", name])
        with double_precision():
            save_dir = train.main(options)
    finally:
        Trainer._step, QuantizedTraining.after_backward = step, balance
    return {"steps": steps, "energies": energies, "folder": str(save_dir)}


def evaluate_case(arguments: list[str], weights: str) -> dict:
    """Validates a checkpoint as the trainer does."""
    run, _ = train.prepare_run(train.parse_arguments(arguments))
    result = run.evaluate(load_network(weights)[0], plots=True)
    found = {"images": result.images, "instances": result.instances, "map": result.map, "map50": result.map50}
    return found | result.localisation | {"confusion": result.confusion.matrix.tolist()}


def refusal(action) -> str:
    """The text of the UserError that ``action`` raises, or nothing."""
    try:
        action()
    except UserError as error:
        return str(error)
    return ""


def disagreement() -> str:
    """What is said of tensors of which one has another last bit in one process, once equal tensors have passed."""
    weights = {"fine": torch.arange(5), "spoilt": torch.ones(7, 3), "half": torch.ones(2, dtype=torch.float16)}
    distributed.check_equal(weights, "before")
    if distributed.rank() == 1:
        weights["spoilt"][4, 2] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    return refusal(lambda: distributed.check_equal(weights, "after epoch 3"))


def fail_in_main() -> None:
    raise UserError("only the main process knows")


def main(file: Path) -> None:
    cases = json.loads(file.read_text())
    distributed.start("cpu")
    torch.set_num_threads(1)
    found = {}
    for name, case in cases["train"].items():
        found[name] = run_case(name, case, file.parent / "joint")
    for name, (arguments, weights) in cases["evaluate"].items():
        found[name] = evaluate_case(arguments, weights)
    for name, arguments in cases["refused"].items():
        found[name] = refusal(lambda arguments=arguments: train.main(train.parse_arguments(arguments)))
    found["disagreement"] = disagreement()
    found["of main"] = refusal(lambda: distributed.from_main(fail_in_main))
    (file.parent / f"found{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found))
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
