"""What data, disk, memory or arithmetic can do to a training: a defined end and a message each, on real trainings."""

import contextlib
import ctypes
import importlib
import io
import os
import re
import resource
import signal
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.utils.data import get_worker_info

import train
from training.trainer import Trainer
from utils import labels
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.dataset import DetectionDataset
from utils.errors import UserError
from utils.images import write_image
from utils.run_log import read_results

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX processes")
BOX = "0 0.5 0.5 0.4 0.4\n"
PICTURE = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)


@pytest.fixture(scope="module")
def subject():
    """The benchmark that trains in processes of their own."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked process has none of its parent's threads
    try:
        yield importlib.import_module("interruptions")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def common(subject, place):
    return subject.make_place(place)


def run(common: list[str], project: Path, *arguments: str) -> Path:
    return train.main(train.parse_arguments([*common, "--project", str(project), "--name", "run", *arguments]))


# --- data


def encoded(suffix: str, picture: np.ndarray = PICTURE) -> bytes:
    return cv2.imencode(suffix, picture)[1].tobytes()


def in_mode(mode: str, suffix: str):
    """A file of Pillow's; its decoded colours need not be ours, but there must be some."""

    def make(images: Path, name: str) -> Path:
        wide = {"I;16": np.uint16, "F": np.float32}
        if mode in wide:
            picture = Image.fromarray(PICTURE[..., 0].astype(wide[mode]) * (257 if mode == "I;16" else 1))
        else:
            picture = Image.fromarray(PICTURE).convert(mode)
        picture.save(images / f"{name}{suffix}")
        return images / f"{name}{suffix}"

    return make


def file_of(content: bytes, suffix: str):
    def make(images: Path, name: str) -> Path:
        (images / f"{name}{suffix}").write_bytes(content)
        return images / f"{name}{suffix}"

    return make


def large(images: Path, name: str) -> Path:
    write_image(images / f"{name}.png", np.full((1000, 10_000, 3), 90, np.uint8))
    return images / f"{name}.png"


def loop(images: Path, name: str) -> Path:
    (images / "deeper").mkdir()
    (images / "deeper" / "back").symlink_to(images)
    return file_of(encoded(".png"), ".png")(images / "deeper", name)


def named(name: str):
    return lambda images, _: file_of(encoded(".jpg"), ".jpg")(images, name)


WHOLE = file_of(encoded(".jpg"), ".jpg")
# Name -> how the image is made, its labels (None: no file), whether it is used, its boxes, what is said.
DATA = {
    "random bytes": (file_of(b"no image at all", ".jpg"), BOX, False, 0, "not an image that can be decoded"),
    "zero bytes": (file_of(b"", ".png"), BOX, False, 0, "not an image that can be decoded"),
    "JPEG cut off": (file_of(encoded(".jpg")[:2500], ".jpg"), BOX, False, 0, "cut off"),
    "PNG cut off": (file_of(encoded(".png")[:9000], ".png"), BOX, False, 0, "cut off"),
    "JPEG with a tail": (file_of(encoded(".jpg") + b"\0\0tail", ".jpg"), BOX, True, 1, None),
    "nine pixels": (file_of(encoded(".png", PICTURE[:9]), ".png"), BOX, False, 0, "under 10 pixels"),
    "zero-byte label": (WHOLE, "", True, 0, "with an empty one"),
    "no label file": (WHOLE, None, True, 0, "without a label file"),
    "NaN": (WHOLE, "0 nan 0.5 0.4 0.4\n" + BOX, True, 1, r"txt:1: has a coordinate that is not a finite number"),
    "outside": (WHOLE, BOX + "0 1.5 0.5 0.4 0.4\n", True, 1, r"txt:2: has a coordinate outside of 0..1"),
    "partly outside": (WHOLE, "0 0.95 0.5 0.4 0.4\n", True, 1, None),
    "duplicate rows": (WHOLE, BOX + BOX, True, 1, r"txt:2: repeats an earlier line"),
    "no text": (WHOLE, "\x00\x01\xff", True, 0, r"txt:1: is not made of numbers"),
    "20,000 objects": (
        WHOLE, "".join(f"0 {(i % 150 + 1) / 152} {(i // 150 + 1) / 152} .002 .002\n" for i in range(20_000)),
        True, 20_000, None,
    ),
    "10,000 pixels": (large, BOX, True, 1, None),
    "grey": (in_mode("L", ".png"), BOX, True, 1, None),
    "grey and alpha": (in_mode("LA", ".png"), BOX, True, 1, None),
    "palette": (in_mode("P", ".png"), BOX, True, 1, None),
    "alpha": (in_mode("RGBA", ".png"), BOX, True, 1, None),
    "CMYK": (in_mode("CMYK", ".jpg"), BOX, True, 1, None),
    "one bit": (in_mode("1", ".png"), BOX, True, 1, None),
    "16 bit": (in_mode("I;16", ".png"), BOX, True, 1, None),
    "floats": (in_mode("F", ".tiff"), BOX, True, 1, None),
    "symlink loop": (loop, BOX, True, 1, "leads back to a folder"),
    "letters": (named("日本 ü'\"Ω"), BOX, True, 1, None),
}  # fmt: skip


@pytest.fixture(scope="module")
def defects(place):
    """A data set with one image of every kind in training and validation, two classes of which one has no sample."""
    folder = place / "дефекты"
    images, files = folder / "images", {}
    images.mkdir(parents=True)
    for number, (name, (make, text, *_)) in enumerate(DATA.items()):
        files[name] = make(images, f"{number}")
        if text is not None:
            label = Path(labels.label_path(files[name]))
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text(text, encoding="latin-1")
    content = {"path": ".", "train": "images", "val": "images", "names": ["ring", "none of these"]}
    (folder / "data.yaml").write_text(yaml.safe_dump(content))
    return folder / "data.yaml", files


@pytest.fixture(scope="module")
def scanned(defects):
    """What reading the labels finds and says."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.setattr(labels, "NAMED_PROBLEMS", 1000)
        found = labels.read_labelled_images(defects[0].parent / "images", "train", cache=False)
    return found, said.getvalue()


@pytest.mark.parametrize("name", DATA)
def test_defects_of_data_have_an_outcome_and_a_message(name, defects, scanned):
    (found, said), file = scanned, defects[1][name]
    _, _, used, boxes, message = DATA[name]
    places = [position for position, image in enumerate(found.images) if image == str(file)]
    assert len(places) == used  # once, and not forty times around a loop
    if used:
        assert len(found.labels[places[0]]) == boxes
    if message and "label file" not in message and "empty" not in message and "folder" not in message:
        assert re.search(f"{re.escape(file.stem)}.*({message})", said)
    elif message:
        assert re.search(message, said)
    else:
        assert f"{file}:" not in said and f"{labels.label_path(file)}:" not in said


def test_a_training_goes_through_all_of_them(common, defects, tmp_path):
    """With a class that has no sample."""
    folder = run(common, tmp_path, "--data", str(defects[0]), "--epochs", "1")
    (row,) = read_results(folder / "results.csv")
    assert all(np.isfinite(list(row.values())))


def write_set(folder: Path, content: dict[str, str | None], names: int = 2) -> Path:
    """A data set of whole images with these labels."""
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    for name, text in content.items():
        WHOLE(folder / "images", name)
        if text is not None:
            (folder / "labels" / f"{name}.txt").write_text(text)
    names = {number: f"class {number}" for number in range(names)}
    (folder / "data.yaml").write_text(yaml.safe_dump({"path": ".", "train": "images", "val": "images", "names": names}))
    return folder / "data.yaml"


@pytest.mark.parametrize(
    "content, message",
    [
        ({}, "no images in it"),
        ({"a": None, "b": ""}, "no labels for the 2 images"),
        ({"a": BOX, "b": "2 0.5 0.5 0.1 0.1\n"}, r"b.jpg has class 2, but the data set has 2 names \(0 to 1\)"),
        ({"a": "1e30 0.5 0.5 0.1 0.1\n"}, "has class 10000"),
    ],
)
def test_data_that_cannot_be_trained_on(content, message, common, tmp_path):
    with pytest.raises(UserError, match=message):
        run(common, tmp_path, "--data", str(write_set(tmp_path / "set", content)), "--epochs", "1")


def test_one_image_is_a_data_set(common, tmp_path):
    """With an anchor search on its one box, in both phases."""
    flags = [flag for flag in common if flag != "--noautoanchor"]
    data = write_set(tmp_path / "set", {"a": BOX}, names=1)
    folder = run(flags, tmp_path, "--data", str(data), "--float-epochs", "1", "--epochs", "1", "--quant", "lsq")
    assert (folder / "weights" / "best.pt").is_file()


def test_an_image_that_vanishes_is_named(common, tmp_path, monkeypatch):
    """By the loader process that wanted it, and in one line."""
    data = write_set(tmp_path / "set", dict.fromkeys("abcd", BOX))
    begin = Trainer.__init__

    def vanish(self, *arguments, **keywords):
        begin(self, *arguments, **keywords)
        (tmp_path / "set" / "images" / "c.jpg").unlink()

    monkeypatch.setattr(Trainer, "__init__", vanish)
    with pytest.raises(UserError) as refusal:
        run(common, tmp_path, "--data", str(data), "--epochs", "1", "--workers", "2")
    assert re.fullmatch(r"\S*c.jpg: cannot be read \(No such file or directory\). Check the path.", str(refusal.value))


def test_a_loader_process_that_dies_is_reported(common, tmp_path, monkeypatch):
    read = DetectionDataset.load_image

    def die(self, index):
        if get_worker_info() is not None and self.augment:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, index)

    monkeypatch.setattr(DetectionDataset, "load_image", die)
    with pytest.raises(
        UserError, match=r"process that loads images has died .*(killed by signal|exited unexpectedly).*--workers"
    ):
        run(common, tmp_path, "--epochs", "1", "--workers", "2")


# --- disk


def in_child(action, log: Path) -> str:
    """Runs ``action`` in a process of its own; returns the UserError's text, or fails with what came instead."""
    child = os.fork()
    if child == 0:
        code = 1
        with log.open("w") as stream, contextlib.redirect_stdout(io.StringIO()):
            try:
                action()
                stream.write("no error")
            except UserError as error:
                stream.write(str(error))
                code = 0
            except BaseException as error:
                stream.write(f"{type(error).__name__}: {error}")
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == 0, f"{code}: {log.read_text()}"
    return log.read_text()


def at_epoch(number: int, action) -> None:
    """Has ``action`` happen before an epoch is reported and saved."""
    finish = Trainer._finish_epoch

    def finished(self, epoch, *rest):
        if epoch == number:
            action(self)
        return finish(self, epoch, *rest)

    Trainer._finish_epoch = finished


def mount(folder: Path, options: bytes = b"", flags: int = 0) -> None:
    """Mounts a file system in memory that this process alone sees; exits with 77 where that is not allowed."""
    library = ctypes.CDLL(None, use_errno=True)
    new_namespace, private_and_below = 0x00020000, (1 << 18) | (1 << 14)
    fails = library.unshare(new_namespace) or library.mount(None, b"/", None, private_and_below, None)
    if fails or library.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", flags, options):
        os._exit(77)


def mounted(action, log: Path) -> str:
    try:
        return in_child(action, log)
    except AssertionError as error:
        if str(error).startswith("77:"):
            pytest.skip("mounting is not allowed here")
        raise


def test_a_full_disk_ends_a_run_that_can_be_resumed(subject, common, tmp_path):
    """The disk's last room goes to another file during the second epoch; later there is room again."""
    arguments = ["--epochs", "3"]
    whole = run(common, tmp_path / "whole", *arguments)

    def fill(trainer: Trainer) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    def action() -> None:
        at_epoch(1, fill)
        run(common, tmp_path / "full", *arguments)

    text = in_child(action, tmp_path / "log")
    weights = tmp_path / "full" / "run" / "weights"
    assert re.match(rf"{weights}/\S+.pt could not be written \(.*\). (The file|Nothing)", text)
    assert load_checkpoint(weights / "last.pt")["epoch"] == 0
    assert not list(weights.glob(".*"))
    train.main(train.parse_arguments(["--resume", str(weights / "last.pt")]))
    assert subject.differences(whole, tmp_path / "full" / "run") == []


def test_a_really_full_disk(common, tmp_path):
    """A file system of 300 kB."""

    def action() -> None:
        mount(tmp_path / "small", b"size=300k")
        run(common, tmp_path / "small", "--epochs", "9")

    (tmp_path / "small").mkdir()
    text = mounted(action, tmp_path / "log")
    assert "could not be written" in text and str(tmp_path / "small") in text


def test_a_read_only_run_folder(common, tmp_path):
    def action() -> None:
        read_only = 1
        mount(tmp_path / "kept", b"", read_only)
        run(common, tmp_path / "kept", "--epochs", "1")

    (tmp_path / "kept").mkdir()
    text = mounted(action, tmp_path / "log")
    assert text.startswith(f"{tmp_path / 'kept' / 'run'}: the run's folder cannot be made (Read-only file system)")


def test_a_run_folder_below_a_file(common, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"the run's folder cannot be made .*--project"):
        run(common, tmp_path / "file", "--epochs", "1")


# --- arithmetic


def test_a_rate_that_diverges(common, tmp_path):
    """Really: with a learning rate of 1e12, the weights are infinite after a few steps."""
    (tmp_path / "hyp.yaml").write_text("lr0: 1.0e+12\nwarmup_epochs: 0\nnominal_batch: 4\n")
    with pytest.raises(UserError) as refusal:
        run(common, tmp_path, "--epochs", "20", "--hyp", str(tmp_path / "hyp.yaml"))
    text = str(refusal.value)
    pattern = (
        r"the loss is not finite in epoch \d+ of the float phase \((\w+, )*\w+\); in the network it begins at model"
    )
    behind_the_last = r"after epoch \d+ of the float phase the weights are not finite, first model"
    assert re.match(f"{pattern}|{behind_the_last}", text) and "Lower lr0" in text
    last = load_checkpoint(tmp_path / "run" / "weights" / "last.pt")
    assert all(torch.isfinite(tensor).all() for tensor in last["ema"].values() if tensor.is_floating_point())


def test_the_first_layer_that_is_not_finite_is_named(common, tmp_path, monkeypatch):
    finish = Trainer._finish_epoch

    def spoiled(self, epoch, *rest):
        stop = finish(self, epoch, *rest)
        if epoch == 0:
            self.model.model[5].m[0].cv2.conv.weight.data[0, 0, 0, 0] = torch.nan
        return stop

    monkeypatch.setattr(Trainer, "_finish_epoch", spoiled)
    with pytest.raises(UserError) as refusal:
        run(common, tmp_path, "--epochs", "3")
    last = tmp_path / "run" / "weights" / "last.pt"
    assert "not finite in epoch 2 of the float phase (box, objectness, class)" in str(refusal.value)
    assert "it begins at model.5.m.0.cv2.conv (its parameter weight)" in str(refusal.value)
    assert f"{last} is that of the epoch before" in str(refusal.value)
    assert load_checkpoint(last)["epoch"] == 0


def test_a_term_that_overflows_is_named(common, tmp_path):
    """A gain that makes the class term infinite, while every layer is finite."""
    (tmp_path / "hyp.yaml").write_text("cls: 1.0e+44\n")
    with pytest.raises(UserError, match=r"epoch 1 of the float phase \(class\); every layer is finite"):
        run(common, tmp_path, "--epochs", "1", "--hyp", str(tmp_path / "hyp.yaml"))


# --- memory


def test_memory_that_runs_out(common, tmp_path):
    """An address space that ends 400 MB above what the process has."""

    def limit() -> None:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + 400 * 2**20,) * 2)

    def action() -> None:
        begin = Trainer.fit
        Trainer.fit = lambda self: (limit(), begin(self))
        run(common, tmp_path, "--epochs", "1", "--imgsz", "1536", "--batch-size", "8")

    if not Path("/proc/self/statm").exists():
        pytest.skip("needs Linux' /proc")
    text = in_child(action, tmp_path / "log")
    assert text.startswith("memory ran out on cpu with 8 images of 1536x1536 pixels in a batch; try --batch-size 4")
    assert "--imgsz 768" in text


def test_a_checkpoint_of_another_kind_is_not_resumed(tmp_path):
    save_checkpoint({"model": None}, tmp_path / "last.pt")
    with pytest.raises(UserError, match="not from a training run"):
        train.main(train.parse_arguments(["--resume", str(tmp_path / "last.pt")]))
