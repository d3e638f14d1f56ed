"""What a run says: columns that line up in 80, speed and time left that are right, ten lines at the start."""

import re

import pytest
import torch
import yaml

import train
from training import screen
from training.screen import BEST, NORMALISED, EpochLines, duration
from utils.log import set_verbose

CPU = torch.device("cpu")


class Result:
    map50, map = 0.98765, 0.5


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (7.4, "0:07"), (59.6, "1:00"), (750, "12:30"), (94205, "26:10:05")]
)
def test_durations_are_read_like_a_clock(seconds, text):
    assert duration(seconds) == text


def test_cells_stand_under_their_headings_within_80_columns(monkeypatch):
    monkeypatch.setattr(screen, "most_used_memory", lambda device: 81_234_000_000)
    lines = EpochLines(1000, 0, CPU)
    heading, line = lines.heading(), lines.line(998, (0.1, 12.25, 123.0), Result, 54321.4, NORMALISED)
    assert len(line) < 80 and len(heading) < 80
    cells = dict(zip(heading.split(), line.replace(" GB", "GB").split()[:9], strict=True))
    assert cells == {
        "epoch": "999/1000", "box": "0.1000", "obj": "12.2500", "cls": "123", "mAP50": "0.9877", "mAP": "0.5000",
        "img/s": "54321", "memory": "81.23GB", "left": "0:00",
    }  # fmt: skip
    ends = [match.end() for match in re.finditer(r"\S+", heading)]
    assert all(line[end - 1] != " " and line[end] == " " for end in ends)  # right-aligned under the name
    plain = lines.line(3, (0.1, 0.2, 0.3), None, 5, "")
    assert plain.split()[4:6] == ["-", "-"] and plain == plain.rstrip()
    assert lines.line(1000, (0.1, 0.2, 0.3), Result, 5, BEST).split()[0] == "finetune"


def test_time_left_counts_what_this_process_has_done(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(screen.time, "perf_counter", lambda: now[0])
    lines = EpochLines(10, 4, CPU)  # resumed before epoch 5
    now[0] = 160.0  # two epochs in a minute, four are left
    assert lines.line(5, (0, 0, 0), None, 1).split()[-1] == "2:00"


def test_memory_is_that_of_this_process():
    before = screen.most_used_memory(CPU)
    kept = torch.ones(50_000_000)  # 200 MB
    assert screen.most_used_memory(CPU) > 200_000_000 and kept.sum() > 0
    assert before <= screen.most_used_memory(CPU)


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """What quantized runs say: plainly, and with --verbose."""
    from small_detector import SMALL

    from data.shapes import CLASSES, Drawing, draw_shapes

    root = tmp_path_factory.mktemp("spoken")
    draw_shapes(root / "set", seed=3, drawing=Drawing(train_images=8, val_images=4, image_size=64))
    declaration = {"path": "set", "train": "images/train", "val": "images/val", "names": dict(enumerate(CLASSES))}
    (root / "set.yaml").write_text(yaml.safe_dump(declaration))
    (root / "small.yaml").write_text(yaml.safe_dump(SMALL))
    common = ["--imgsz", "64", "--batch-size", "4", "--workers", "0", "--noautoanchor", "--device", "cpu", "--noplots"]
    common += ["--cfg", str(root / "small.yaml"), "--data", str(root / "set.yaml"), "--project", str(root)]
    common += ["--quant", "lsq", "--bits", "4", "--gabfusion", "--ada", "--float-epochs", "1", "--epochs", "2"]
    return common


def test_a_run_says_little_and_plainly(spoken, capsys):
    common = spoken
    train.main(train.parse_arguments([*common, "--name", "plain"]))
    output = capsys.readouterr()
    assert output.err == "" and "\r" not in output.out
    start = output.out.partition("network")[2].partition("\nrun ")[0]
    assert start.count("\n") <= 10
    for fact in ("8 training, 4 validation images, 4 classes", "from scratch", "lsq w4a4", "GABFusion", "ADA (kl)"):
        assert fact in start
    rows = re.findall(r"^ +\d/\d .*$", output.out, re.M)
    assert [row.split()[0] for row in rows] == ["1/1", "1/2", "2/2"]
    assert all(len(row) < 80 for row in rows)
    assert rows[0].endswith(BEST) and rows[1].endswith(NORMALISED)
    assert "epsilon" not in output.out and "alpha 0." not in output.out and "model.0" not in output.out


def test_verbose_says_more(spoken, capsys):
    common = spoken
    try:
        train.main(train.parse_arguments([*common, "--name", "talkative", "--verbose"]))
    finally:
        set_verbose(False)
    output = capsys.readouterr().out
    for detail in ("epsilon: 1.0e-12", "alpha 0.", "gradient norms", "logits loss", "metrics/precision", "w clip"):
        assert detail in output
