import importlib.util
import time

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from utils.images import write_image
from utils.run_log import COLUMNS, LOCALISATION_COLUMNS, RunLog, read_results
from utils.wandb_log import WandbLog


def test_our_columns_follow_upstreams_and_the_phases(tmp_path):
    log = RunLog(tmp_path / "results.csv", ("quant/strength",))
    log.write(0, {"metrics/recall": 0.25, "quant/strength": 1.0, "metrics/matched_IoU": 0.8})
    header = [name.strip() for name in (tmp_path / "results.csv").read_text().splitlines()[0].split(",")]
    assert header == ["epoch", *COLUMNS, "quant/strength", *LOCALISATION_COLUMNS]
    row = {"epoch": 0, "metrics/recall": 0.25, "quant/strength": 1.0, "metrics/matched_IoU": 0.8}
    assert read_results(tmp_path / "results.csv") == [row]


def test_resuming_a_file_with_fewer_columns_keeps_its_values(tmp_path):
    file = tmp_path / "results.csv"
    names = ["epoch", *COLUMNS, "quant/strength"]
    rows = [[str(epoch), *(str(epoch + i / 100) for i in range(1, len(names)))] for epoch in range(3)]
    file.write_text("\n".join(",".join(f"{cell:>20}" for cell in row) for row in [names, *rows]) + "\n")
    log = RunLog(file, ("quant/strength",), first_epoch=2)
    log.write(2, {"metrics/mAP_0.75": 0.5})
    read = read_results(file)
    for epoch in range(2):
        assert read[epoch] == dict(zip(names, map(float, rows[epoch]), strict=True))
    assert read[2] == {"epoch": 2, "metrics/mAP_0.75": 0.5}
    assert len({line.count(",") for line in file.read_text().splitlines()}) == 1


def picture(folder, name="val_batch0_pred.jpg"):
    write_image(folder / name, np.full((20, 30, 3), (0, 0, 255), np.uint8))


def test_tensorboard_gets_values_and_pictures(tmp_path):
    picture(tmp_path)
    log = RunLog(tmp_path / "results.csv", tensorboard=tmp_path)
    for epoch in range(2):
        log.write(epoch, {"metrics/recall": 0.25 * epoch, "model.12.balance/alpha0": 0.5, "quant/strength": 1.0})
    log.pictures(tmp_path, 1)
    log.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("metrics/recall")] == [(0, 0.0), (1, 0.25)]
    assert {"model.12.balance/alpha0", "quant/strength"} <= set(events.Tags()["scalars"])
    (image,) = events.Images("val_batch0_pred")
    assert (image.width, image.height, image.step) == (30, 20, 1)


class Recorder(WandbLog):
    """Stands where the network would be: what is sent is kept."""

    def __init__(self):
        self.sent, self.failed, self.run, self.wandb = [], False, self, self

    def log(self, values, step):
        if step > 100:
            raise ConnectionError("no network")
        self.sent.append((step, values))

    def Image(self, file):  # noqa: N802, as wandb calls it
        return file


def test_a_second_phase_goes_on_behind_the_first(tmp_path, capsys):
    picture(tmp_path)
    sink = Recorder()
    first = RunLog(tmp_path / "float_results.csv", wandb=sink, prefix="float/")
    first.write(2, {"metrics/recall": 0.5})
    second = RunLog(tmp_path / "results.csv", wandb=sink, first_step=3)
    second.write(0, {"metrics/recall": 0.6})
    second.pictures(tmp_path, 0)
    assert sink.sent[:2] == [(2, {"float/metrics/recall": 0.5}), (3, {"metrics/recall": 0.6})]
    assert sink.sent[2] == (3, {"val_batch0_pred": str(tmp_path / "val_batch0_pred.jpg")})
    second.write(200, {})
    second.write(5, {})  # after a failure nothing more is sent, and the training goes on
    assert len(sink.sent) == 3 and capsys.readouterr().out.count("nothing more is sent") == 1


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_weights_and_biases_writes_an_offline_run(tmp_path, monkeypatch):
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_SILENT", "true"), ("WANDB_CONSOLE", "off")):
        monkeypatch.setenv(name, value)
    folder = tmp_path / "boards" / "exp"
    folder.mkdir(parents=True)
    picture(folder)
    sink = WandbLog(folder, {"epochs": 3}, None)
    assert sink.run.project == "boards" and sink.run.name == "exp" and sink.run.config["epochs"] == 3
    log = RunLog(folder / "results.csv", wandb=sink)
    log.write(0, {"metrics/recall": 0.25})
    log.pictures(folder, 0)
    sink.finish()
    (file,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    # wandb's own process writes the file; in 3 of 60 runs it did so after finish() had returned.
    deadline = time.monotonic() + 30
    names = (b"metrics/recall", b"val_batch0_pred")
    while not all(name in file.read_bytes() for name in names) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not sink.failed and all(name in file.read_bytes() for name in names)
    first = sink.run.id
    for resumed in (True, False):
        again = WandbLog(folder, {}, None, resumed)
        again.finish()
        assert (again.run.id == first) == resumed
