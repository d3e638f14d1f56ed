from utils.run_log import COLUMNS, LOCALISATION_COLUMNS, RunLog, read_results


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
