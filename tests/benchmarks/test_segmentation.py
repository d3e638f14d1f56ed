"""benchmarks/segmentation.py: its images, its measure, and that every kind of row runs."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("segmentation")
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_the_same_seed_draws_the_same_images_and_every_class_occurs(benchmark):
    (images, masks), (again, _), (other, _) = (benchmark.dataset(8, seed) for seed in (3, 3, 4))
    assert torch.equal(images, again) and not torch.equal(images, other)
    assert images.shape == (8, 3, benchmark.SIZE, benchmark.SIZE) and masks.shape == (8, *images.shape[2:])
    assert images.min() >= 0 and images.max() <= 1
    assert masks.unique().tolist() == [0, 1, 2, 3]


def test_mean_iou_is_the_mean_over_classes_of_overlap_over_union(benchmark):
    generator = torch.Generator().manual_seed(0)
    masks, found = torch.randint(0, 4, (2, 3, 6, 6), generator=generator)

    class Answer(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.one_hot(found, 4).permute(0, 3, 1, 2).float()

    expected = np.mean([((masks == c) & (found == c)).sum() / ((masks == c) | (found == c)).sum() for c in (1, 2, 3)])
    assert benchmark.mean_iou(Answer(), torch.zeros(3, 3, 6, 6), masks) == pytest.approx(expected)


def test_batches_keep_images_and_masks_together(benchmark):
    images = torch.arange(64.0).view(64, 1, 1, 1) + torch.linspace(0, 0.5, 16).view(4, 4)
    images = images.expand(64, 3, 4, 4)
    task = benchmark.Task(images, images[:, 0], images, images[:, 0], seed=0)
    seen = list(task.batches(2))
    assert [progress for progress, *_ in seen] == [0.25, 0.5, 0.75, 1.0]
    assert all(torch.equal(batch[:, 0], labels) for _, batch, labels in seen)
    assert not all(torch.equal(labels, labels.sort()[0]) for *_, labels in seen)  # some are mirrored
    for first in (0, 2):  # every image once an epoch
        chosen = torch.cat([labels[:, 0, 0].floor().long() for *_, labels in seen[first : first + 2]])
        assert chosen.sort()[0].tolist() == list(range(64))


def test_every_kind_of_row_runs_and_is_in_the_table(benchmark, monkeypatch, tmp_path):
    for name, value in (("TRAIN_IMAGES", 64), ("TEST_IMAGES", 16), ("SIZE", 16), ("BATCH", 8)):
        monkeypatch.setattr(benchmark, name, value)
    document = tmp_path / "results.md"
    flags = ["--methods", "lsq", "--bits", "3", "--seeds", "2", "--epochs", "1", "--float-epochs", "4"]
    benchmark.main([*flags, "--document", str(document)])
    lines = [line.split("|") for line in document.read_text().splitlines() if line.startswith("| ")]
    rows = {line[1].strip(): line[2:] for line in lines[1:]}
    assert {*rows} == {"float", "lsq 3 bit calibrated", *(f"lsq 3 bit {variant}" for variant in benchmark.VARIANTS)}
    assert len({row[0] for row in rows.values()}) > 4  # each trains in a way of its own
    gain, base = rows["lsq 3 bit gabfusion"], rows["lsq 3 bit base"]
    assert "+-" in gain[2] and "+-" in gain[3] and not base[3].strip()


def test_other_methods_have_the_rows_that_tell_of_the_divergence(benchmark):
    found = benchmark.rows(["lsq", "dsq"], [4, 3])
    assert [row for row in found if row[0] == "dsq"] == [
        ("dsq", 3, variant) for variant in ("base", "gabfusion", "ada kl", "ada js")
    ]
    assert sum(row[0] == "lsq" for row in found) == 2 * len(benchmark.VARIANTS)
