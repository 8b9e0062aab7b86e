"""The house: who may import whom, and how much there is to read."""

import ast
import re
import sys
from pathlib import Path

import train

ROOT = Path(train.__file__).parent
MAY_IMPORT = {
    "kd": set(),
    "data": set(),
    "models": {"data"},
    "evaluate": {"kd", "models", "data"},
    "train": {"kd", "models", "data", "evaluate"},
    "profile_gpu": {"kd", "models", "data", "evaluate", "train"},
}
PACKAGES = {"torch", "torchvision", "numpy"}


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_scripts_import_only_what_lies_below_them_and_three_packages():
    for path in ROOT.glob("*.py"):
        names = set(imports_of(path)) - set(sys.stdlib_module_names)
        assert names <= MAY_IMPORT[path.stem] | PACKAGES, path.name


def test_the_scripts_are_as_long_as_the_readme_says_and_grow_no_longer():
    lines = {path.name: len(path.read_text().splitlines()) for path in ROOT.glob("*.py")}
    assert set(lines) <= {f"{name}.py" for name in MAY_IMPORT}
    told = re.findall(r"\[(\w+\.py)\]\(\w+\.py\) \((\d+)", (ROOT / "README.md").read_text())
    assert len(told) == 6 and all(abs(lines[name] - int(n)) <= 10 for name, n in told), lines
    loop = next(node for node in ast.parse((ROOT / "train.py").read_text()).body
                if getattr(node, "name", "") == "train_one_epoch")  # fmt: skip
    both = int(re.search(r"`train_one_epoch`: (\d+) lines", (ROOT / "README.md").read_text()).group(1))
    assert abs(lines["kd.py"] + loop.end_lineno - loop.lineno + 1 - both) <= 10
    assert sum(lines.values()) <= 2770 and max(lines.values()) <= 740, lines
