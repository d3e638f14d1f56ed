"""Bars are for people: on a terminal, after two seconds, and never inside a log."""

import io
import os
import sys
import time

from utils import progress as progress_module
from utils.log import LOGGER, set_verbose
from utils.progress import progress


class Terminal(io.StringIO):
    """Standard error and output as one terminal: what was written, in order."""

    def isatty(self):
        return True


def look_at(monkeypatch):
    """A terminal in place of both outputs; not a fixture, since pytest puts its own ones back after those."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.delenv("RANK", raising=False)
    return screen


def test_nothing_is_drawn_where_nobody_looks(monkeypatch):
    terminal = look_at(monkeypatch)
    monkeypatch.setattr(progress_module, "DELAY", 0.0)
    plain = io.StringIO()
    monkeypatch.setattr(sys, "stderr", plain)
    assert list(progress(range(3), "counting")) == [0, 1, 2]
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setitem(os.environ, "RANK", "1")
    assert list(progress(range(3), "counting")) == [0, 1, 2]
    assert plain.getvalue() == "" and terminal.getvalue() == ""


def test_what_is_quick_needs_no_bar(monkeypatch):
    terminal = look_at(monkeypatch)
    assert list(progress(range(1000), "counting")) == list(range(1000))
    assert "counting" not in terminal.getvalue()


def test_a_slow_loop_shows_a_bar_that_goes_away(monkeypatch):
    terminal = look_at(monkeypatch)
    monkeypatch.setattr(progress_module, "DELAY", 0.02)
    for _ in progress(iter(range(4)), "counting", total=4, mininterval=0):
        time.sleep(0.06)
    shown = terminal.getvalue().split("\r")
    assert any(part.startswith("counting:  50%") and "2/4" in part for part in shown)
    assert shown[-1] == "" and shown[-2].strip() == ""  # wiped out, and the cursor stands at the start of its line


def test_bytes_are_counted_in_units_of_bytes(monkeypatch):
    terminal = look_at(monkeypatch)
    monkeypatch.setattr(progress_module, "DELAY", 0.0)
    with progress(label="file", total=2_000_000, unit="B", mininterval=0) as bar:
        bar.update(1_000_000)
    assert "1.00MB/2.00MB" in terminal.getvalue()


def test_a_message_does_not_stick_to_a_bar(monkeypatch):
    terminal = look_at(monkeypatch)
    monkeypatch.setattr(progress_module, "DELAY", 0.0)
    with progress(label="counting", total=4, mininterval=0) as bar:
        bar.update()
        LOGGER.info("by the way")
    before = terminal.getvalue().partition("by the way\n")[0]
    assert "counting" in before and before.endswith("\r") and before.rsplit("\r", 2)[-2].strip() == ""


def test_details_are_for_those_who_ask(capsys):
    LOGGER.debug("hidden")
    set_verbose(True)
    try:
        LOGGER.debug("shown")
    finally:
        set_verbose(False)
    assert capsys.readouterr().out == "shown\n"
