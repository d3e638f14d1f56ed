"""Several processes compute what one does with the whole batch; what goes wrong in one of them ends all of them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import joint_runs
import numpy as np
import pytest
import torch
import yaml
from small_detector import SMALL, float_detector, save
from torch import nn

import train
from utils import distributed
from utils.checkpoint import load_checkpoint
from utils.dataset import EpochSampler
from utils.errors import UserError
from utils.run_log import read_results

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["--imgsz", "64", "--workers", "0", "--noautoanchor", "--device", "cpu", "--compile", "off", "--noplots"]
KEPT = {"metrics/mAP_0.5", "metrics/mAP_0.5:0.95", "train/box_loss", "quant/ada_loss", "quant/logits_loss"}
KEPT |= {"quant/feature_mse_loss", "quant/feature_mse_gradient_ratio", "model.9.balance/factor0"}
# Without SPPF: sums of codes are often equal, and which of two equal values its pools pass the gradient to is decided
# by the last bit, which another batch size rounds otherwise.
NETWORK = {**SMALL, "backbone": [*SMALL["backbone"][:-1], [-1, 1, "C3", [32]]]}
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo's processes are started as on POSIX systems")


def torchrun(*arguments: str, processes: int = 2, **keywords) -> subprocess.Popen:
    """Starts a job on this machine."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.Popen(
        [*command, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, **keywords,
    )  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A network, 20 training and 7 validation images of six shapes, and one recipe with everything in it."""
    from data.shapes import CLASSES, Drawing, draw_shapes

    root = tmp_path_factory.mktemp("joint")
    draw_shapes(root / "set", seed=3, drawing=Drawing(train_images=20, val_images=7, image_size=64))
    names = dict(enumerate(CLASSES))
    content = {"path": "set", "train": "images/train", "val": "images/val", "names": names}
    (root / "data.yaml").write_text(yaml.safe_dump(content))
    (root / "small.yaml").write_text(yaml.safe_dump(NETWORK))
    # Every term of a loss whose denominator spans the batch, a ratio that is measured, and energies that move alpha.
    recipe = {
        "distillation": {"feature_mse": 1.0, "channel_wise": 0.1, "logits": 1.0, "gradient_ratio": 0.2},
        "gabfusion": {"enabled": True, "balance": "feedback", "eta": 0.1},
        "ada": True,
    }
    (root / "everything.yaml").write_text(yaml.safe_dump(recipe))
    return root


@pytest.fixture(scope="module")
def flags(place):
    return [*FLAGS, "--data", str(place / "data.yaml"), "--cfg", str(place / "small.yaml"), "--batch-size", "4"]


@pytest.fixture(scope="module")
def float_weights(place):
    """Untrained, but with activations as large as a trained network's: a rounding error then rarely changes a code."""
    from data.shapes import CLASSES

    model = float_detector({**NETWORK, "nc": len(CLASSES)})
    model.names = dict(enumerate(CLASSES))
    return save(model, place / "float.pt")


@pytest.fixture(scope="module")
def cases(place, flags, float_weights):
    quantized = [*flags, "--weights", str(float_weights), "--quant"]
    everything = ["--recipe", str(place / "everything.yaml")]
    training = {
        "float": [*flags, "--epochs", "2"],
        "rect": [*flags, "--epochs", "1", "--rect", "--multi-scale"],
        "lsq": [*quantized, "lsq", "--epochs", "2", *everything],
        "pact": [*quantized, "pact", "--epochs", "1", "--gabfusion", "backward"],
        "dsq": [*quantized, "dsq", "--epochs", "1", "--gabfusion"],
        "n2uq": [*quantized, "n2uq", "--epochs", "1", "--bits", "3"],
    }
    project = ["--project", str(place), "--name", "measured"]
    evaluation = {"evaluate": ([*flags, "--epochs", "1", *project], str(float_weights))}
    refused = {
        "odd batch": [*flags, "--epochs", "1", "--batch-size", "5"],
        "synchronised": [*flags, "--epochs", "1", "--sync-bn"],
    }
    return {"train": training, "evaluate": evaluation, "refused": refused}


@pytest.fixture(scope="module")
def joint(place, cases):
    """What two processes found, by rank."""
    (place / "cases.json").write_text(json.dumps(cases))
    job = torchrun(str(ROOT / "tests" / "joint_runs.py"), str(place / "cases.json"))
    output, _ = job.communicate(timeout=600)
    assert job.returncode == 0, output[:6000]
    assert output.count("Float phase: 2 epochs") == 1  # one process speaks
    return [json.loads((place / f"found{rank}.json").read_text()) for rank in range(2)]


def halved_batch_norm(self, x, forward=nn.BatchNorm2d.forward):
    """What two processes with every second image each compute; running statistics are the first one's."""
    if not self.training or self.momentum is None:  # None while statistics are computed anew, which each does for all
        return forward(self, x)
    second = nn.functional.batch_norm(x[1::2], None, None, self.weight, self.bias, True, 0, self.eps)
    return torch.stack((forward(self, x[0::2]), second), 1).flatten(0, 1)


@pytest.mark.parametrize("name", ["float", "rect", "lsq", "pact", "dsq", "n2uq"])
def test_two_processes_train_as_one_does(name, joint, cases, place, monkeypatch):
    monkeypatch.setattr(nn.BatchNorm2d, "forward", halved_batch_norm)
    alone = joint_runs.run_case(name, cases["train"][name], place / "alone")
    steps = np.mean([found[name]["steps"] for found in joint], 0)
    assert len(steps) == (10 if name in ("float", "lsq") else 5)
    np.testing.assert_allclose(steps, alone["steps"], atol=1e-6)
    assert joint[0][name]["energies"] == joint[1][name]["energies"]
    np.testing.assert_allclose(joint[0][name]["energies"], alone["energies"], rtol=1e-4)
    rows = [read_results(Path(folder) / "results.csv") for folder in (alone["folder"], joint[0][name]["folder"])]
    for expected, actual in zip(*rows, strict=True):
        assert actual.keys() == expected.keys()
        for key in actual.keys() & KEPT:
            assert actual[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-6), key
        # Of batches with other images in them.
        assert actual["val/obj_loss"] == pytest.approx(expected["val/obj_loss"], rel=0.2)


def test_sharded_validation_equals_that_of_one_process(joint, cases):
    """Seven images are not divisible by two: none is counted twice or left out."""
    alone = joint_runs.evaluate_case(*cases["evaluate"]["evaluate"])
    assert alone["images"] == 7
    for found in joint:
        assert found["evaluate"].pop("confusion") == alone["confusion"]
        assert found["evaluate"] == pytest.approx({k: v for k, v in alone.items() if k != "confusion"}, abs=1e-6)


def test_refusals_and_disagreement(joint):
    for found in joint:  # in every process, so that none waits for the others
        assert found["odd batch"] == (
            "--batch-size 5 is the number of images over all 2 processes and must be a multiple of it: take 4 or 6"
        )
        assert "GPUs only" in found["synchronised"]
        assert found["of main"] == "only the main process knows"
        assert found["disagreement"].startswith(
            "after epoch 3 the processes no longer agree on 1 of 3 tensors, first spoilt: "
        )


def test_several_devices_need_torchrun(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(UserError, match=r"torchrun --nproc_per_node 2 train.py --device 0,1"):
        distributed.start("0,1")
    for name, value in {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3", "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="3 processes for 2 GPUs"):
        distributed.start("0,1")


@pytest.mark.parametrize("length, processes", [(7, 2), (8, 3), (2, 4), (1, 1)])
def test_shares_of_a_data_set(length, processes):
    def shares(**keywords):
        return [list(EpochSampler(length, rank=r, world_size=processes, **keywords)) for r in range(processes)]

    exact = shares(shuffle=False, even=False)
    assert sorted(index for share in exact for _, index in share) == list(range(length))
    assert [len(share) for share in exact] == [
        len(EpochSampler(length, False, rank=r, world_size=processes, even=False)) for r in range(processes)
    ]
    for shuffle in (True, False):
        even = shares(shuffle=shuffle)
        assert {len(share) for share in even} == {-(-length // processes)}
        assert {index for share in even for _, index in share} == set(range(length))
    assert even[-1][-1] == (0, length - 1)  # unshuffled, the last one is repeated: its batch has its shape


def children(process: int) -> list[int]:
    """The processes that ``process`` has started."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = file.read_text().rpartition(")")[2].split()
            if int(fields[1]) == process:
                found.append(int(file.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes as on Linux")
def test_a_killed_process_ends_the_job_and_another_number_goes_on(flags, place, tmp_path):
    arguments = [*flags, "--epochs", "12", "--save-period", "1", "--project", str(tmp_path), "--name", "run"]
    job = torchrun(str(ROOT / "train.py"), *arguments)
    weights = tmp_path / "run" / "weights"
    try:
        end = time.monotonic() + 300
        while not (weights / "epoch1.pt").exists() and time.monotonic() < end:
            time.sleep(0.05)
        os.kill(max(children(job.pid)), signal.SIGKILL)
        killed = time.monotonic()
        output, _ = job.communicate(timeout=120)
    finally:
        if job.poll() is None:
            job.kill()
    assert time.monotonic() - killed < 60 and job.returncode != 0
    assert "Signal 9 (SIGKILL)" in output, output
    first = load_checkpoint(weights / "last.pt")["epoch"]
    assert 0 <= first < 11
    train.main(train.parse_arguments(["--resume", str(weights / "last.pt")]))  # in one process
    assert [int(row["epoch"]) for row in read_results(tmp_path / "run" / "results.csv")] == list(range(12))
    assert load_checkpoint(weights / "last.pt")["finished"]
