"""Flags of train.py one by one: what each changes, and which are refused."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from small_detector import SMALL

import train
from training.batch_size import memory_step
from training.options import apply_defaults, check_options, options_of_run
from training.run import Phase, new_run_folder
from training.trainer import Trainer
from utils.checkpoint import load_checkpoint
from utils.dataset_yaml import load_dataset_yaml
from utils.errors import UserError

FAST = ["--imgsz", "64", "--batch-size", "4", "--workers", "0", "--noplots", "--noautoanchor", "--device", "cpu"]


@pytest.fixture
def start(tiny_dataset, tmp_path):
    """A function that begins a float run with more arguments and returns the run and a trainer of one epoch."""
    cfg = tmp_path / "small.yaml"
    cfg.write_text(yaml.safe_dump(SMALL))

    def begin(*arguments):
        common = [*FAST, "--cfg", str(cfg), "--data", str(tiny_dataset), "--project", str(tmp_path / "runs")]
        run, model = train.prepare_run(train.parse_arguments([*common, "--epochs", "1", *arguments]))
        return run, Trainer(run, Phase("float", 1, ""), model)

    return begin


def batches_seen(trainer, monkeypatch) -> list[torch.Tensor]:
    """Trains one epoch and returns the images that the network was given."""
    seen = []
    trainer.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    monkeypatch.setattr(trainer, "_evaluate", lambda epoch, plots: None)
    trainer.fit()
    return seen


def test_defaults_are_upstreams_but_for_the_listed_ones():
    options = vars(train.parse_arguments([]))
    upstream = {
        "rect": False, "resume": False, "nosave": False, "noval": False, "noautoanchor": False, "noplots": False,
        "evolve": None, "bucket": "", "cache": None, "image_weights": False, "device": "", "multi_scale": False,
        "single_cls": False, "sync_bn": False, "workers": 8, "name": "exp", "exist_ok": False, "quad": False,
        "label_smoothing": 0.0, "patience": 100, "freeze": [0], "save_period": -1, "seed": 0, "local_rank": -1,
        "entity": None, "upload_dataset": False, "bbox_interval": -1, "artifact_alias": "latest",
    }  # fmt: skip
    assert {key: options[key] for key in upstream} == upstream
    namespace = argparse.Namespace(**options)
    apply_defaults(namespace, load_dataset_yaml("coco128.yaml"))
    filled = {"imgsz": 640, "epochs": 100, "batch_size": 16, "hyp": "hyp.scratch-low.yaml", "optimizer": "SGD"}
    assert {key: getattr(namespace, key) for key in filled} == filled
    assert Path(namespace.project).parts[-2:] == ("runs", "train")
    assert train.parse_arguments(["--evolve"]).evolve == 300 and train.parse_arguments(["--cache"]).cache == "ram"


@pytest.mark.parametrize(
    "arguments, key, value",
    [
        (["--batch", "64"], "batch_size", 64),
        (["--img", "320"], "imgsz", 320),
        (["--img-size", "320"], "imgsz", 320),
        (["--save-p", "5"], "save_period", 5),
        (["--label", "0.1"], "label_smoothing", 0.1),
        (["--local_rank", "1"], "local_rank", 1),
        (["--freeze", "0", "2"], "freeze", [0, 2]),
        (["--evolve", "7"], "evolve", 7),
    ],
)
def test_aliases_and_abbreviations(arguments, key, value):
    assert getattr(train.parse_arguments(arguments), key) == value


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--bucket", "gs://mine"], "gsutil cp"),
        (["--upload_dataset"], "wandb artifact put"),
        (["--artifact_alias", "best"], "wandb artifact get"),
        (["--quad", "--batch-size", "6"], "multiple of 4"),
        (["--cache", "tape"], "ram, disk, or val"),
        (["--label-smoothing", "1.5"], "share of the target"),
        (["--freeze", "-3"], "numbered from 0"),
        (["--image-weights", "--rect"], "give one of them"),
        (["--resume_evolve", "x.csv"], "belong to --evolve"),
        (["--evolve", "--resume"], "--resume_evolve"),
        (["--evolve", "0"], "at least 1"),
        (["--patience", "-1"], "at least 0"),
        (["--seed", "-1"], "at least 0"),
        (["--seed", "5000000000"], "must be under"),
        (["--batch-size", "-2"], "at least 1"),
        (["--device", "gpu"], "expected cpu, mps, or GPU numbers"),
    ],
)
def test_refusals_name_what_to_do(arguments, message):
    with pytest.raises(UserError, match=message):
        check_options(train.parse_arguments(arguments))


def test_options_of_an_older_run_take_the_defaults_of_new_flags():
    options = options_of_run({"imgsz": 96, "weights": "a.pt"})
    assert (options.imgsz, options.weights, options.quad, options.wandb) == (96, "a.pt", False, False)


def test_quads_are_seen_at_twice_the_size_and_weigh_four_images(start, monkeypatch):
    _, trainer = start("--quad", "--multi-scale")
    assert {batch.shape[0] for batch in batches_seen(trainer, monkeypatch)} == {1}
    run, trainer = start("--quad")
    images, targets, *_ = next(iter(run.train_loader))
    assert images.shape == (1, 3, 128, 128)
    gradients = []
    for quad in (True, False):
        trainer.options.quad = quad
        trainer.model.zero_grad()
        trainer._step(images, targets, False)
        gradients.append(next(trainer.model.parameters()).grad.clone())
    torch.testing.assert_close(gradients[0], 4 * gradients[1])


def test_multi_scale_keeps_proportions(start):
    _, trainer = start("--multi-scale", "--imgsz", "128")
    sides = set()
    for _ in range(60):
        height, width = trainer._rescale(torch.rand(1, 3, 64, 128)).shape[2:]
        assert 64 <= width <= 192 and width % 32 == 0 and height % 32 == 0 and abs(height - width / 2) < 32
        sides.add(width)
    assert sides == {64, 96, 128, 160, 192}


def test_image_weights_draw_the_images_of_a_rare_class(start, monkeypatch):
    run, trainer = start("--image-weights")
    drawn = []
    blank = np.zeros((64, 64, 3), np.uint8), np.zeros((0, 5), np.float32)
    monkeypatch.setattr(run.train_set, "_augmented", lambda index, _: drawn.append(index) or blank)
    images = [set(rows[:, 0].astype(int)) for rows in run.train_set.labels]
    counts = [sum(label in image for image in images) for label in range(len(run.names))]
    rare = min((count, label) for label, count in enumerate(counts) if count)[1]
    trainer.class_maps = np.ones(len(run.names))
    trainer.class_maps[rare] = 0.0  # every other class is found perfectly
    batches_seen(trainer, monkeypatch)
    having = {index for index, image in enumerate(images) if rare in image}
    assert len(drawn) == 8 and set(drawn) <= having and len(having) < 8


def test_the_class_scores_travel_with_the_checkpoint(start):
    run, trainer = start("--image-weights")
    trainer.fit()
    checkpoint = load_checkpoint(run.weights_dir / "last.pt")
    assert len(checkpoint["class_maps"]) == len(run.names) and checkpoint["class_maps"] == trainer.class_maps.tolist()


def test_cache_val_keeps_the_validation_images_alone(start):
    run, _ = start("--cache", "val")
    assert run.train_set._cached is None and run.val_set._cached is not None


def used_again(tmp_path, *arguments: str, needs_float: bool = False) -> set[str]:
    """The checkpoints that are left in a folder when another run takes it."""
    folder = tmp_path / "old" / "weights"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("last", "best", "float_last", "float_best", "epoch3"):
        (folder / f"{name}.pt").write_bytes(b"")
    options = train.parse_arguments(["--project", str(tmp_path), "--name", "old", "--exist-ok", *arguments])
    options.needs_float = needs_float
    assert new_run_folder(options) == folder.parent
    return {file.stem for file in folder.iterdir()}


def test_a_folder_that_is_used_again_keeps_what_the_run_starts_from(tmp_path):
    folder = tmp_path / "old" / "weights"
    assert used_again(tmp_path) == {"epoch3"}
    assert used_again(tmp_path, "--weights", str(folder / "last.pt")) == {"epoch3", "last"}  # as with YOLOv5
    start = ["--weights", str(folder / "float_best.pt"), "--quant", "lsq"]
    assert used_again(tmp_path, *start) == {"epoch3", "float_best"}
    for arguments, needs_float in ((start, True), (["--teacher", str(folder / "best.pt"), "--quant", "lsq"], False)):
        with pytest.raises(UserError, match="the run would write over it"):
            used_again(tmp_path, *arguments, needs_float=needs_float)
        assert len(list(folder.iterdir())) == 5  # refused before anything was removed


def test_name_cfg_is_the_models(start):
    run, _ = start("--name", "cfg")
    assert run.save_dir.name == "small"


def test_auto_batch_on_a_cpu_is_the_default_with_a_message(start, capsys):
    run, _ = start("--batch-size", "-1")
    assert run.options.batch_size == 16 and "CUDA" in capsys.readouterr().out


@pytest.mark.parametrize("quantized", [False, True])
def test_the_measured_step_is_a_training_step_of_a_copy(start, quantized):
    run, trainer = start()
    config = train.build_config("lsq", "4", None, None, None, trainer.model.yaml) if quantized else None
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    memory_step(trainer.model, config, run.options, torch.device("cpu"))(2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())


@pytest.mark.parametrize(
    "freeze, message",
    [
        (["15"], "nothing is left to train"),
        (["99"], "layers 0 to 14"),
        (["0", "15"], "layers 0 to 14"),
        ([str(index) for index in range(15)], "nothing is left to train"),
    ],
)
def test_freezing_layers_that_are_not_there_or_all_of_them_is_refused(start, freeze, message):
    with pytest.raises(UserError, match=message):
        start("--freeze", *freeze)


def test_frozen_layers_stand_still_with_their_statistics(start, monkeypatch):
    _, trainer = start("--freeze", "3", "--optimizer", "SGD")
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    monkeypatch.setattr(trainer, "_evaluate", lambda epoch, plots: None)
    trainer.fit()
    after = trainer.model.state_dict()
    changed = {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}
    assert changed and not changed & {"0", "1", "2"}
