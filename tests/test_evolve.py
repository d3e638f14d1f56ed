"""The search for hyperparameters: mutations, its files, and going on after an interruption, on real short trainings."""

import itertools

import numpy as np
import pytest
import yaml
from small_detector import SMALL

import train
from training.evolve import (
    FLOAT_GENES,
    LARGEST_CHANGE,
    METRICS,
    PARENTS,
    QUANTIZED_GENES,
    SHARED_GENES,
    Gene,
    genes_of,
    mutate,
)
from utils.errors import UserError
from utils.hyp import load_hyp
from utils.metrics import fitness
from utils.run_log import read_results

START = load_hyp("hyp.scratch-high.yaml")


@pytest.fixture
def search(tiny_dataset, tmp_path):
    """Runs train.py --evolve with more arguments and returns the folder of the search."""
    cfg = tmp_path / "small.yaml"
    cfg.write_text(yaml.safe_dump(SMALL))
    common = ["--imgsz", "64", "--batch-size", "8", "--workers", "0", "--noautoanchor", "--device", "cpu"]
    common += ["--epochs", "1", "--cfg", str(cfg), "--data", str(tiny_dataset)]

    def run(name, *arguments):
        return train.main(train.parse_arguments([*common, "--project", str(tmp_path), "--name", name, *arguments]))

    return run


def test_a_search_leaves_its_files_and_can_go_on(search, tmp_path):
    whole = search("whole", "--evolve", "3")
    rows = read_results(whole / "evolve.csv")
    assert len(rows) == 3 and list(rows[0]) == [*METRICS, *START]
    start = load_hyp("hyp.scratch-low.yaml")
    assert all(rows[0][key] == pytest.approx(value, rel=1e-4) for key, value in start.items())
    changed = [{key for key in start if row[key] != rows[0][key]} for row in rows]
    assert not changed[0] and changed[1] and changed[1] | changed[2] <= {*FLOAT_GENES, *SHARED_GENES}
    best = max(rows, key=lambda row: fitness(row["metrics/mAP_0.5"], row["metrics/mAP_0.5:0.95"]))
    found = load_hyp(whole / "hyp_evolve.yaml")
    assert all(found[key] == pytest.approx(best[key], rel=1e-4) for key in start)
    assert (whole / "evolve.png").stat().st_size > 10_000
    # Stopped after two generations, the second row half written.
    parts = search("parts", "--evolve", "1")
    with (parts / "evolve.csv").open("a") as stream:
        stream.write("  0.1, 0.2")
    assert search("parts", "--evolve", "3", "--resume_evolve", str(parts / "evolve.csv")) == parts
    assert read_results(parts / "evolve.csv") == rows
    assert load_hyp(parts / "hyp_evolve.yaml") == found  # as train.py --hyp reads it


def test_quantized_values_are_searched_and_a_failure_counts_as_nothing(search, tmp_path):
    folder = tmp_path / "population"
    folder.mkdir()
    hyp = load_hyp("hyp.scratch-low.yaml")
    (folder / "wild.yaml").write_text(yaml.safe_dump(hyp | {"box": 1e44}))
    arguments = ["--quant", "lsq", "--bits", "4", "--float-epochs", "1", "--evolve_population", str(folder)]
    rows = read_results(search("q", "--evolve", "3", *arguments) / "evolve.csv")
    assert rows[1]["box"] == 1e44 and all(rows[1][key] == 0 for key in METRICS)
    assert any(rows[2][key] != rows[0][key] for key in QUANTIZED_GENES) and rows[2]["box"] < 1


def test_mistakes(search, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        search("x", "--evolve", "1", "--resume_evolve", str(tmp_path / "none.csv"))
    with pytest.raises(UserError, match="no hyperparameter YAMLs"):
        search("x", "--evolve", "1", "--evolve_population", str(tmp_path / "empty"))
    (tmp_path / "evolve.csv").write_text("lr0,lrf\n1,2\n3,4\n")
    with pytest.raises(UserError, match=r"evolve\.csv:2: does not hold"):
        search("x", "--evolve", "3", "--resume_evolve", str(tmp_path))
    with pytest.raises(UserError, match=r"nowhere\.yaml"):
        search("x", "--evolve", "2", "--hyp", "nowhere.yaml")


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ([], {*FLOAT_GENES, *SHARED_GENES}),
        (["--quant", "lsq"], {*FLOAT_GENES, *SHARED_GENES, *QUANTIZED_GENES}),
        (["--quant", "lsq", "--weights", "a.pt"], {*SHARED_GENES, *QUANTIZED_GENES}),
    ],
)
def test_what_is_searched(arguments, expected):
    options = train.parse_arguments(arguments)
    assert set(genes_of(options, START)) == expected - {"anchors"}
    assert set(genes_of(options, START | {"anchors": 3.0})) == expected
    assert genes_of(options, START | {"hsv_h": 0.3})["hsv_h"].high == 0.3


def test_mutations_stay_in_bounds_and_come_from_the_best():
    genes = genes_of(train.parse_arguments(["--quant", "lsq"]), START)
    tried = [START | {"translate": 0.1 + 0.01 * number} for number in range(10)]
    scores = [0.1 * number for number in range(10)]
    genes["translate"] = Gene(0.0, 1.0, 0.0)  # fixed: it tells the parent
    parents, changes = [], []
    for seed in range(200):
        child = mutate(tried, scores, genes, np.random.default_rng(seed))
        assert all(gene.low <= child[key] <= gene.high for key, gene in genes.items())
        assert all(child[key] == 0 for key in genes if START[key] == 0)
        parents.append(round((child["translate"] - 0.1) / 0.01))
        changes.append(child["lr0"] / START["lr0"])
        assert child != tried[parents[-1]]
    counts = np.bincount(parents, minlength=10)
    assert counts[:PARENTS].sum() == 0 and counts[5] < counts[7] < counts[9]
    assert LARGEST_CHANGE[0] <= min(changes) < 0.95 and 1.05 < max(changes) <= LARGEST_CHANGE[1]
    assert len({seed for seed, _ in itertools.groupby(sorted(changes))}) > 50
    with pytest.raises(UserError, match="0 stays 0"):
        mutate([{"mixup": 0.0}], [0.1], {"mixup": Gene(0, 1)}, np.random.default_rng(0))
