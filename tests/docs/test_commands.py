"""Every command on every page: its flags are the program's own, the files it names are known, links lead somewhere."""

import argparse
import re
import runpy
import sys
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from quant import QuantConfig
from quant.recipe import read_recipe
from utils.hyp import load_hyp

sys.path.insert(0, str(Path(__file__).parent))
from pages import PAGES, ROOT, blocks, commands, script_of

# Commands that are not this project's, and cannot or need not run in a test.
FOREIGN = (
    r"pip install -r requirements(-dev)?\.txt",
    r"pip install \.",
    r"python -m pytest( \S+)?",
    r"ruff check \.",
    r"ruff format --check \.",
    r"tensorboard --logdir runs/train",
    r"wget -x -P mirror \S+",
    r"python -c .*",
    r"python -m http\.server --directory mirror 8000",
)
# The reader's own data sets, and those of our tables that are not fetched by name.
PLACEHOLDERS = {"your.yaml", "my.yaml", "mine.yaml", "data.yaml", "deeppcb.yaml", "coco-slice.yaml"}
STAND_INS = {"P": "bfloat16", "S": "0"}  # letters that a command in results.md has for several values
WITHOUT_FLAGS = ("docs/flags.py", "docs/recipe.py")  # they take none, and write
ALL = [
    pytest.param(command, id=f"{page.stem}: {' '.join(command)}") for page in PAGES for command in commands(page, True)
]


class _Parsed(BaseException):
    """Carries what a program's parser made of the command line out of the program."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options


@pytest.fixture
def parse(monkeypatch):
    """What the program's own parser makes of ``[file | -m module, arguments ...]``; it gets no further than that."""
    original = argparse.ArgumentParser.parse_args

    def stop(parser, arguments=None, namespace=None):
        raise _Parsed(original(parser, arguments, namespace))

    def parse(words):
        module = words[0] == "-m"
        name, arguments = (words[1], words[2:]) if module else (words[0], words[1:])
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        monkeypatch.setattr(sys, "path", [str((ROOT / name).parent), str(ROOT), *sys.path])
        try:
            if module:
                runpy.run_module(name, run_name="__main__")
            else:
                runpy.run_path(str(ROOT / name), run_name="__main__")
        except _Parsed as parsed:
            return parsed.options
        raise AssertionError(f"{name} parses nothing")

    return parse


def check_files(options):
    """Names of files that come along must be right; others are the reader's."""
    data = getattr(options, "data", None)
    for name in data if isinstance(data, list) else [data]:
        known = name is None or Path(name).name in PLACEHOLDERS or "/" in str(name)
        assert known or (ROOT / "data" / Path(name).name).is_file(), f"{name}: no such data set"
    if getattr(options, "recipe", None):
        read_recipe(options.recipe)
    hyp = getattr(options, "hyp", None) or []
    for name in hyp if isinstance(hyp, list) else [hyp]:
        load_hyp(name)
    if getattr(options, "cfg", None):
        assert list((ROOT / "models").rglob(Path(options.cfg).name)), options.cfg


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # modules that are run as programs
@pytest.mark.parametrize("command", ALL)
def test_flags_are_the_programs_own(command, parse, capsys):
    if any(re.fullmatch(pattern, " ".join(command)) for pattern in FOREIGN):
        return
    if command[0] == "torchrun":
        launcher = get_args_parser().parse_args(command[1:])
        program = [launcher.training_script, *launcher.training_script_args]
        command = program if launcher.no_python else ["python", *program]
    script = script_of([STAND_INS.get(word, word) for word in command])
    assert script, f"{' '.join(command)}: neither a script of this project nor in the list of foreign commands"
    if script[0] in WITHOUT_FLAGS:
        assert len(script) == 1 and (ROOT / script[0]).is_file()
        return
    try:
        options = parse(script)
    except SystemExit:
        pytest.fail(capsys.readouterr().err)
    check_files(options)


def test_blocks_of_commands_are_marked_as_such():
    unmarked = [page.stem for page in PAGES for block in blocks(page, "") if re.match(r"python|torchrun|pip", block)]
    assert not unmarked, "write ```bash"


def test_a_wrong_flag_is_noticed(parse, capsys):
    with pytest.raises(SystemExit):
        parse(["val.py", "--wieghts", "best.pt"])
    assert "--weights" in capsys.readouterr().err
    with pytest.raises(AssertionError, match="no such data set"):
        check_files(parse(["train.py", "--data", "nowhere.yaml"]))


def test_commands_are_found():
    assert len(ALL) > 60
    assert {"README", "quick-start", "training", "resuming", "deploy", "datasets", "CONTRIBUTING"} <= {
        page.stem for page in PAGES if list(commands(page))
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_pictures_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            wrong.append(target)
    assert not wrong


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_linked_from_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [page.name for page in PAGES[2:] if f"docs/{page.name}" not in text]


@pytest.mark.parametrize("name", ["quantization", "gabfusion", "recipe", "choosing"])
def test_recipes_on_pages_are_recipes(name):
    """Of quantization.md every line of the block on distillation is one of its own."""
    for block in blocks(ROOT / "docs" / f"{name}.md", "yaml"):
        parts = re.split(r"\n(?=distillation:)", block.strip()) if name == "quantization" else [block]
        for part in parts:
            QuantConfig.from_dict(yaml.safe_load(part), f"{name}.md")


def test_figures_of_what_did_not_help_are_those_of_the_results():
    """So that neither page can be changed alone."""
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    told = set(re.findall(r"(?<![\w.-])\d+\.\d+(?![\w.])", (ROOT / "docs" / "what-did-not-help.md").read_text()))
    known = set(re.findall(r"\d+\.\d+", results))
    assert len(told) > 30 and told <= known, f"not in docs/results.md: {sorted(told - known)}"


def test_figures_of_the_readmes_tables_are_those_of_the_results():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text[text.index("## Results") : text.index("## Documentation")]
    told = {number for row in re.findall(r"^\|.*\|$", section, re.M) for number in re.findall(r"\b\d+\.\d+\b", row)}
    known = set(re.findall(r"\d+\.\d+", (ROOT / "docs" / "results.md").read_text(encoding="utf-8")))
    assert len(told) > 20 and told <= known, f"not in docs/results.md: {sorted(told - known)}"
