"""docs/architecture.md: every part of the tree is in its table, and imports nothing that the table does not allow."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLE = {
    row[1]: row[2]
    for row in re.finditer(
        r"^\| `([\w.]+)/?` \|.*\| ([^|]+) \|$", (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"), re.M
    )
}
PARTS = {name.removesuffix(".py") for name in TABLE}


def imported(file: Path) -> set[str]:
    """Top-level names that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
    return {name.split(".")[0] for name in found}


def test_every_part_of_the_tree_is_described():
    folders = {path.parent.relative_to(ROOT).parts[0] for path in ROOT.glob("*/*.py")}
    files = {path.name for path in ROOT.glob("*.py")}
    assert {name for name in (*folders, *files) if not name.startswith((".", "runs"))} == {*TABLE}


@pytest.mark.parametrize("part", sorted(name for name, allowed in TABLE.items() if allowed != "everything"))
def test_imports_are_those_of_the_table(part):
    allowed = {*re.findall(r"`(\w+)`", TABLE[part]), part.removesuffix(".py")}
    files = [ROOT / part] if part.endswith(".py") else sorted((ROOT / part).rglob("*.py"))
    assert files
    wrong = {str(f.relative_to(ROOT)): extra for f in files if (extra := (imported(f) & PARTS) - allowed)}
    assert not wrong


def test_quantizers_import_torch_and_each_other():
    for name in ("primitives", "lsq", "pact", "dsq", "n2uq"):
        tree = ast.parse((ROOT / "quant" / f"{name}.py").read_text(encoding="utf-8"))
        modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not {module for module in modules if module.split(".")[0] in PARTS - {"quant", "utils"}}, name
