"""docs/flags.md says what the parsers say, and every flag of YOLOv5 is there or has its reason."""

import importlib
import sys

import pytest

from utils.paths import ROOT


@pytest.fixture(scope="module")
def flags():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        yield importlib.import_module("flags")
    finally:
        sys.path.remove(str(ROOT / "docs"))


def test_the_page_is_true(flags):
    assert flags.FILE.read_text(encoding="utf-8") == flags.text(), "run: python docs/flags.py"


def test_every_differing_default_and_missing_flag_has_its_reason(flags):
    for command, upstream in flags.UPSTREAM.items():
        rows = flags.flag_rows(command)
        assert {flag for flag in upstream} <= {name.strip("`") for row in rows for name in row[0].split()}
        for names, ours, theirs, text in rows:
            assert text and not text.endswith("**Differs**: "), f"{command} {names}: {ours} where YOLOv5 has {theirs}"
    for command in ("train.py", "val.py", "detect.py"):  # refused by name, where at all, with a message of their own
        known = {name for action in flags.parser_of(flags.COMMANDS[command])._actions for name in action.option_strings}
        assert set(flags.UPSTREAM[command]) <= known


def test_parsers_of_all_commands_are_found(flags):
    assert len(flags.flag_rows("train.py")) >= 50
    options = {action.dest for action in flags.parser_of(flags.COMMANDS["detect.py"])._actions}
    for command, parse in flags.OWN.items():
        rows = flags.own_rows(parse)
        assert len(rows) >= 3 and all(text for _, _, text in rows), command
    assert {"source", "visualize", "vid_stride"} <= options
    assert flags.COMMANDS["val.py"](["--img", "320"]).imgsz == 320  # parsing works again afterwards
