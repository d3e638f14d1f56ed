"""Checkpoints: hostile and foreign files are refused with nothing run, ours survive a round trip and a full disk."""

import io
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path, PosixPath

import numpy as np
import pytest
import torch
from torch import nn

from models.yolo import DetectionModel, model_from_weights
from utils.checkpoint import load_checkpoint, load_official, read_weights, save_checkpoint, transfer
from utils.errors import UserError

WATCHED = {"os.system", "subprocess.Popen", "os.exec", "pickle.find_class", "socket.connect", "urllib.Request"}
events: list[str] = []
watching = False


def _audit(event: str, _arguments: tuple) -> None:
    if watching and event in WATCHED:
        events.append(event)


sys.addaudithook(_audit)


def write_zip(path: Path, pickled: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    """A file laid out as ``torch.save`` does it, around any pickle."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", b"3\n")
    return path


def refused(path: Path) -> str:
    """Loads ``path`` both ways; returns the refusal after checking that it is one line and that nothing ran."""
    global watching
    texts = []
    events.clear()
    for load in (load_official, read_weights):
        watching = True
        try:
            with pytest.raises(UserError) as refusal:
                load(path)
        finally:
            watching = False
        texts.append(str(refusal.value))
    assert not events
    assert str(path) in texts[0] and "\n" not in texts[0] and texts[0] == texts[1]
    return texts[0]


class Call:
    """Pickles as the call ``function(*arguments)``."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + len(encoded).to_bytes(4, "little") + encoded


def named(module: str, name: str) -> bytes:
    """GLOBAL."""
    return f"c{module}\n{name}\n".encode()


def stacked(module: str, name: str) -> bytes:
    """STACK_GLOBAL."""
    return text(module) + text(name) + b"\x93"


def in_checkpoint(body: bytes, protocol: int = 4) -> bytes:
    """{'model': body}"""
    return b"\x80" + bytes([protocol]) + b"}" + text("model") + body + b"s."


CONV = named("models.common", "Conv") + b")\x81"  # an instance, without attributes


def hostile_pickles(command: str) -> dict[str, tuple[bytes, str]]:
    """Name -> (pickle, a part of the refusal). Each would run ``command``, or reach for code, in a real unpickler."""
    argument = text(command) + b"\x85"
    python = f"__import__('os').system({command!r})"
    files = {
        "reduce_os_system": (pickle.dumps({"model": Call(os.system, command)}, 2), "system"),
        "reduce_protocol_4": (pickle.dumps({"model": Call(os.system, command)}, 4), "system"),
        "eval": (pickle.dumps({"model": Call(eval, python)}, 2), "eval"),
        "exec": (pickle.dumps({"epoch": 1, "opt": [{"a": (Call(exec, python),)}]}, 2), "exec"),
        "popen": (pickle.dumps({"model": Call(subprocess.Popen, ["true"])}, 4), "subprocess.Popen"),
        "getattr": (pickle.dumps({"model": Call(getattr, "x", "upper")}, 2), "getattr"),
        "inst": (in_checkpoint(b"(" + text(command) + b"ios\nsystem\n"), "INST"),
        "obj": (in_checkpoint(b"(" + named("os", "system") + text(command) + b"o"), "os.system"),
        "obj_of_allowed": (in_checkpoint(b"(" + named("models.common", "Conv") + text(command) + b"o"), "OBJ"),
        "call_of_stand_in": (in_checkpoint(named("models.common", "Conv") + argument + b"R"), "models.common.Conv"),
        "call_of_a_result": (in_checkpoint(CONV + argument + b"R"), "not a name"),
        "newobj_of_function": (in_checkpoint(named("torch._utils", "_rebuild_tensor") + b")\x81"), "_rebuild_tensor"),
        "newobj_ex": (in_checkpoint(named("models.common", "Conv") + b")}\x92"), "NEWOBJ_EX"),
        "build_on_class": (
            in_checkpoint(named("models.common", "Conv") + b"}" + text("__reduce__") + text("x") + b"sb"),
            "sets attributes",
        ),
        "build_on_function": (in_checkpoint(named("torch._utils", "_rebuild_parameter") + b"}b"), "sets attributes"),
        "build_on_dict": (in_checkpoint(b"}}b"), "sets attributes"),
        "build_setstate": (
            in_checkpoint(
                CONV + b"N}" + text("__setstate__") + named("os", "system") + b"s\x86b" + text(command) + b"b"
            ),
            "os.system",
        ),
        "extension_registry": (in_checkpoint(b"\x82\x01"), "EXT1"),
        "text_persistent_id": (in_checkpoint(b"Pstorage\n"), "PERSID"),
        "module_reference": (in_checkpoint(b"(" + text("module") + named("torch", "load") + b"tQ"), "torch.load"),
        "function_as_module": (
            in_checkpoint(b"(" + text("module") + named("torch._utils", "_rebuild_tensor") + b"tQ"),
            "unknown way",
        ),
        "odd_storage": (in_checkpoint(b"(" + text("storage") + named("torch", "Tensor") + b"tQ"), "torch.Tensor"),
        "encoding": (in_checkpoint(named("_codecs", "encode") + text("x") + text("rot13") + b"\x86R"), "rot13"),
        "name_by_number": (in_checkpoint(text("os") + b"K\x01\x93"), "not text"),
    }
    for module, name in (
        ("torch.nn", "os.system"),
        ("torch.nn", "modules.module.torch.os.system"),
        ("torch.nn.modules", "Module.__init__"),
        ("models.x", "os.system"),
        ("models", "yolo.torch.hub.load"),
        ("models.yolo", "main"),
        ("utils.checkpoint", "os.system"),
        ("utils.log", "_set_up"),
        ("torch.hub", "load"),
        ("torch", "load"),
        ("torch.serialization", "load"),
        ("torch.storage", "_load_from_bytes"),
        ("torch._utils", "_import_dotted_name"),
        ("torch._utils", "_rebuild_wrapper_subclass"),
        ("torch.jit", "load"),
        ("torch.nn.init", "normal_"),
        ("torch.nn.modules.module", "register_module_forward_hook"),
        ("torch.utils.data", "DataLoader"),
        ("torch.multiprocessing", "Process"),
        ("numpy", "load"),
        ("numpy.core.multiarray", "fromfile"),
        ("builtins", "__import__"),
        ("__main__", "Model"),
        ("functools", "partial"),
        ("copyreg", "_reconstructor"),
        ("os", "system"),
        ("posix", "system"),
        ("models.common\nos", "system"),
        ("", ""),
    ):
        part = f"it refers to {f'{module}.{name}'!r}"  # refused where it is named, before any call
        files[f"stack_global {module}:{name}"] = (in_checkpoint(stacked(module, name) + argument + b"R"), part)
        if "\n" not in module:
            files[f"global {module}:{name}"] = (in_checkpoint(named(module, name) + argument + b"R", 2), part)
    return files


HOSTILE = hostile_pickles("true")


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickle_is_refused_and_nothing_runs(name, tmp_path):
    marker = tmp_path / "executed"
    pickled, part = hostile_pickles(f"touch {marker}")[name]
    message = refused(write_zip(tmp_path / "hostile.pt", pickled))
    assert "nothing in it was run" in message and part in message
    assert not marker.exists()


def test_the_hostile_files_are_truly_hostile(tmp_path):
    """Python's own unpickler runs the command, so the tests above test something."""
    for name in ("reduce_os_system", "reduce_protocol_4", "eval", "inst", "obj", "build_setstate"):
        marker = tmp_path / name
        pickled, _ = hostile_pickles(f"touch {marker}")[name]
        if name == "build_setstate":  # its stand-in class needs attributes that ours lacks, so give it a plain one
            pickled = pickled.replace(CONV, named("argparse", "Namespace") + b")\x81")
        pickle.loads(pickled)
        assert marker.exists(), name


def test_hostile_legacy_file(tmp_path):
    marker = tmp_path / "executed"
    stream = io.BytesIO()
    for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, {"model": Call(os.system, f"touch {marker}")}):
        pickle.dump(value, stream, 2)
    path = tmp_path / "legacy.pt"
    path.write_bytes(stream.getvalue())
    assert "system" in refused(path) and not marker.exists()
    path.write_bytes(pickle.dumps(Call(os.system, f"touch {marker}"), 2))
    assert "system" in refused(path) and not marker.exists()


@pytest.mark.parametrize(
    "module,name,words",
    [
        ("models.yolo", "SegmentationModel", "segmentation checkpoint"),
        ("models.yolo", "ClassificationModel", "classification checkpoint"),
        ("ultralytics.nn.tasks", "DetectionModel", "anchor-free"),
        ("ultralytics.nn.modules.head", "Detect", "anchor-free"),
    ],
)
def test_other_tasks_are_refused_by_name(module, name, words, tmp_path):
    message = refused(write_zip(tmp_path / "other.pt", in_checkpoint(named(module, name) + b")\x81", 2)))
    assert words in message and f"{module}.{name}" in message


def official_file(path: Path, zipped: bool = True, change=None, **entries) -> DetectionModel:
    """A pickled module as the official files are: fp16, with training entries beside it."""
    model = DetectionModel("yolov5n.yaml", nc=3)
    model.names = ["cat", "dog", "car"]  # a list, as in files before v6.2
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    stored = DetectionModel("yolov5n.yaml", nc=3)
    stored.load_state_dict(model.state_dict())
    stored.names = model.names
    if change:
        change(stored)
    content = {"epoch": 7, "model": stored.half(), "ema": None, **entries}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return model


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_pickled_module_is_read_exactly(zipped, tmp_path):
    path = tmp_path / "official.pt"
    training = {"best_fitness": np.array([0.5]), "opt": {"save_dir": PosixPath("runs")}, "date": "today"}
    model = official_file(path, zipped, **training)
    official = load_official(path)
    expected = model.state_dict()
    assert list(official.state_dict) == list(expected) and len(expected) == 349
    for name, tensor in official.state_dict.items():
        assert tensor.dtype == expected[name].dtype
        exact = name != "model.24.anchors"  # stored as fp16
        torch.testing.assert_close(tensor, expected[name], rtol=0 if exact else 1e-3, atol=0 if exact else 1e-3)
    assert official.names == {0: "cat", 1: "dog", 2: "car"} and (official.nc, official.epoch) == (3, 7)
    assert official.stride.tolist() == [8, 16, 32] and official.anchors.shape == (3, 3, 2)
    assert official.yaml == model.yaml
    weights = read_weights(path)
    assert (weights.kind, weights.quantization, weights.checkpoint) == ("official", None, None)
    assert model_from_weights(weights).names[1] == "dog"


def test_ema_is_preferred(tmp_path):
    other = DetectionModel("yolov5n.yaml", nc=3)
    official_file(tmp_path / "both.pt", ema=other)
    loaded = load_official(tmp_path / "both.pt").state_dict
    assert torch.equal(loaded["model.0.conv.weight"], other.model[0].conv.weight)


def test_tensors_are_read_as_views_say(tmp_path):
    """Transposed and offset windows of one storage come back as the values they show."""
    base = torch.arange(24.0).reshape(4, 6)

    def change(model):
        model.register_buffer("window", base.t()[1:3, ::2])
        model.register_buffer("nothing", torch.empty(0, 3))
        model.register_buffer("scalar", torch.tensor(5))

    official_file(tmp_path / "views.pt", change=change)
    loaded = load_official(tmp_path / "views.pt").state_dict
    assert torch.equal(loaded["window"], base.t()[1:3, ::2])
    assert loaded["nothing"].shape == (0, 3) and loaded["scalar"].item() == 5


def test_models_that_are_not_ours_to_run(tmp_path):
    path = tmp_path / "odd.pt"

    def without_anchors(model):
        del model.detect._buffers["anchors"]

    def without_head(model):
        model.model[-1] = nn.Identity()

    def without_yaml(model):
        model.yaml = None

    def too_few_names(model):
        model.names = ["cat"]

    cases = ((without_anchors, "anchor-free"), (without_head, "not Detect"))
    for change, words in (*cases, (without_yaml, "description"), (too_few_names, "1 class names for 3")):
        official_file(path, change=change)
        assert words in refused(path)
    torch.save({"model": nn.Linear(2, 2)}, path)
    assert "not Detect" in refused(path)
    torch.save({"weight": torch.zeros(2)}, path)
    assert "no YOLOv5 model" in refused(path)


def tensor_pickle(size: bytes, offset: bytes = b"K\x00", stride: bytes = b"K\x01\x85") -> bytes:
    """{'model': a parameter of a float storage '0' of 4 numbers}"""
    storage = b"(" + text("storage") + named("torch", "FloatStorage") + text("0") + text("cpu") + b"K\x04tQ"
    arguments = b"(" + storage + offset + size + stride + b"\x89" + named("collections", "OrderedDict") + b")Rt"
    return in_checkpoint(named("torch._utils", "_rebuild_tensor_v2") + arguments + b"R", 2)


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "damaged.pt"
    official_file(path)
    content = path.read_bytes()
    for broken in (b"", b"not a model", content[:1000], content[: len(content) // 2], content[:-30], b"\x80\x02."):
        path.write_bytes(broken)
        assert "damaged" in refused(path) or "PyTorch" in refused(path)
    for pickled in (b"\x80\x02", b"\x80\x02}", b"\x80\x02h\x07.", b"\x80\x02K\x01K\x02s.", b"\x80\x02}]N", b"\xff"):
        refused(write_zip(path, pickled))
    refused(write_zip(path, in_checkpoint(b"]"), zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    refused(path)
    for load in (load_official, read_weights, load_checkpoint):
        with pytest.raises(UserError, match="does not exist"):
            load(tmp_path / "absent.pt")


def test_tensor_out_of_its_storage_is_refused(tmp_path):
    from utils.safe_pickle import TorchFile

    path = tmp_path / "tensor.pt"
    huge = b"\x8a\x08" + (2**40).to_bytes(8, "little")
    cases = {
        "fits": (tensor_pickle(b"K\x04\x85"), True),
        "too long": (tensor_pickle(b"K\x05\x85"), False),
        "offset": (tensor_pickle(b"K\x04\x85", b"K\x01"), False),
        "negative": (tensor_pickle(b"K\x02\x85", b"J\xff\xff\xff\xff"), False),
        "repeated without end": (tensor_pickle(huge + b"\x85", b"K\x00", b"K\x00\x85"), False),
    }
    for name, (pickled, fits) in cases.items():
        write_zip(path, pickled)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("archive/data/0", np.arange(4, dtype=np.float32).tobytes())
        file = TorchFile(path)
        if fits:
            assert file.tensors({"t": file.root["model"]})["t"].tolist() == [0, 1, 2, 3]
        else:
            with pytest.raises(UserError, match="out of its storage"):
                file.tensors({"t": file.root["model"]})
                pytest.fail(name)
    write_zip(path, cases["fits"][0])
    file = TorchFile(path)
    with pytest.raises(UserError, match="missing"):
        file.tensors({"t": file.root["model"]})


def own_checkpoint(model: nn.Module) -> dict:
    return {
        "model_yaml": model.yaml,
        "names": model.names,
        "stride": model.stride,
        "anchors": model.detect.anchors,
        "model": model.state_dict(),
        "ema": {name: tensor + 1 for name, tensor in model.state_dict().items()},
        "ema_updates": 12,
        "quantization": {"method": "lsq", "bits": 4},
        "epoch": 3,
        "best_fitness": np.float64(0.25),
        "options": {"data": Path("data/x.yaml"), "imgsz": (640, 640), "freeze": [0]},
        "random": {"torch": torch.get_rng_state()},
        "date": "2026-01-01T00:00:00",
    }


def test_own_checkpoint_round_trip(tmp_path):
    path = tmp_path / "weights" / "last.pt"
    model = DetectionModel("yolov5n.yaml", nc=2)
    save_checkpoint(own_checkpoint(model), path)
    assert [item.name for item in path.parent.iterdir()] == ["last.pt"]
    raw = torch.load(path, weights_only=True)
    assert raw["format"] == 1 and raw["best_fitness"] == 0.25 and type(raw["best_fitness"]) is float
    loaded = load_checkpoint(path)
    assert loaded["options"] == {"data": "data/x.yaml", "imgsz": (640, 640), "freeze": [0]}
    assert loaded["names"] == {0: "0", 1: "1"} and loaded["model_yaml"] == model.yaml
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded["model"][name], tensor)
    weights = read_weights(path)
    assert weights.kind == "own" and weights.quantization["bits"] == 4 and weights.checkpoint["epoch"] == 3
    assert torch.equal(weights.state_dict["model.0.conv.weight"], model.model[0].conv.weight + 1)  # the EMA
    assert weights.stride.tolist() == [8, 16, 32]
    assert set(model_from_weights(weights).state_dict()) == set(model.state_dict())
    save_checkpoint({**own_checkpoint(model), "ema": None}, path)
    assert torch.equal(read_weights(path).state_dict["model.0.conv.weight"], model.model[0].conv.weight)


def test_views_do_not_drag_their_storage_along(tmp_path):
    save_checkpoint({"slice": torch.zeros(1_000_000)[:10]}, tmp_path / "small.pt")
    assert (tmp_path / "small.pt").stat().st_size < 10_000


def test_what_cannot_be_read_back_is_not_written(tmp_path):
    with pytest.raises(TypeError, match=r"checkpoint\['a'\]\[1\] is a Linear"):
        save_checkpoint({"a": [1, nn.Linear(1, 1)]}, tmp_path / "x.pt")
    assert not list(tmp_path.iterdir())


def test_foreign_checkpoints_are_refused_by_the_own_reader(tmp_path):
    path = tmp_path / "x.pt"
    official_file(path)
    with pytest.raises(UserError, match="not a checkpoint of this project"):
        load_checkpoint(path)
    torch.save({"a": 1}, path)
    with pytest.raises(UserError, match="no 'format' entry"):
        load_checkpoint(path)
    save_checkpoint({"format": 99}, path)
    with pytest.raises(UserError, match="format 99"):
        load_checkpoint(path)
    save_checkpoint({"epoch": 1}, path)
    with pytest.raises(UserError, match="holds no model"):
        read_weights(path)
    path.write_bytes(b"rubbish")
    with pytest.raises(UserError, match=r"x\.pt"):
        load_checkpoint(path)


def test_missing_tensors_are_named(tmp_path):
    model = DetectionModel("yolov5n.yaml", nc=2)
    content = own_checkpoint(model)
    content["ema"] = {name: tensor for name, tensor in content["ema"].items() if "model.24" not in name}
    save_checkpoint(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"x\.pt: its tensors do not fit.*model\.24"):
        model_from_weights(read_weights(tmp_path / "x.pt"))


FILL_THE_DISK = """
import resource, signal, sys, torch
from utils.checkpoint import save_checkpoint
from utils.errors import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that the write fails as on a full disk, with an error
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    save_checkpoint({"model": torch.ones(1_000_000)}, sys.argv[1])
except UserError as error:
    print(error)
    sys.exit(7)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX resource limits")
@pytest.mark.parametrize("first", [False, True], ids=["over an old file", "first save"])
def test_failed_write_keeps_the_old_file_and_leaves_nothing(first, tmp_path):
    """The operating system refuses to let the file grow past 200 kB, as a full disk does."""
    path = tmp_path / "last.pt"
    if not first:
        save_checkpoint({"epoch": 5}, path)
    before = sorted(tmp_path.iterdir())
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", FILL_THE_DISK, str(path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 7, done.stdout + done.stderr
    assert "last.pt could not be written" in done.stdout and "Traceback" not in done.stderr
    assert sorted(tmp_path.iterdir()) == before
    if not first:
        assert "is unchanged" in done.stdout and load_checkpoint(path)["epoch"] == 5


def test_unwritable_place_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not be written"):
        save_checkpoint({"epoch": 5}, tmp_path / "file" / "last.pt")


def test_transfer_by_name_and_shape(capsys):
    source = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    target = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 5))
    before = target[1].weight.clone()
    loaded, skipped = transfer(target, source.state_dict(), source="file.pt")
    assert (loaded, skipped) == (["0.weight", "0.bias"], ["1.weight", "1.bias"])
    assert torch.equal(target[0].weight, source[0].weight) and torch.equal(target[1].weight, before)
    assert "Transferred 2/4 items from file.pt; not transferred: 1.weight, 1.bias" in capsys.readouterr().out
    assert transfer(target, source.state_dict(), exclude=("bias",))[0] == ["0.weight"]


def test_official_nano(shared_data):
    official = load_official(shared_data / "weights" / "yolov5n.pt")
    assert len(official.state_dict) == 349 and official.nc == 80
    assert (official.names[0], official.names[79]) == ("person", "toothbrush")
    assert official.stride.tolist() == [8, 16, 32] and official.epoch == -1
    assert all(tensor.isfinite().all() for tensor in official.state_dict.values())
    anchors = torch.tensor([10.0, 13, 16, 30, 33, 23]).view(3, 2) / 8
    torch.testing.assert_close(official.anchors[0], anchors)


@pytest.mark.parametrize("reader", [read_weights, load_checkpoint])
def test_an_exported_file_is_not_called_damaged(reader, tmp_path):
    (tmp_path / "best.onnx").write_bytes(b"\x08\x08")
    with pytest.raises(UserError, match=r"exported network; give the \.pt"):
        reader(tmp_path / "best.onnx")
