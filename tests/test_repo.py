"""The house: who may import whom, and how much there is to read."""

import ast
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
PACKAGES = {"torch", "torchvision", "numpy", "PIL"}
SCRIPTS = [ROOT / f"{name}.py" for name in MAY_IMPORT]


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_scripts_import_only_what_lies_below_them_and_four_packages():
    for path in ROOT.glob("*.py"):
        names = set(imports_of(path)) - set(sys.stdlib_module_names)
        assert names <= MAY_IMPORT[path.stem] | PACKAGES, path.name


def test_there_are_six_scripts_and_no_more_to_read_than_agreed():
    assert sorted(ROOT.glob("*.py")) == sorted(SCRIPTS)
    lines = {path.name: len(path.read_text().splitlines()) for path in SCRIPTS}
    assert sum(lines.values()) <= 2929 and max(lines.values()) <= 768, lines


def test_no_line_of_a_script_is_longer_than_a_hundred_columns():
    long = [f"{path.name}:{i}" for path in SCRIPTS
            for i, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 100]  # fmt: skip
    assert not long


def test_no_function_is_longer_than_a_screen_but_those_that_list_the_flags():
    long = [f"{path.name}: {node.name}, {node.end_lineno - node.lineno + 1} lines" for path in SCRIPTS
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name != "get_args"
            and node.end_lineno - node.lineno >= 60]  # fmt: skip
    assert not long


def test_a_picture_is_an_image_in_every_script():
    films = [f"{path.name}:{i}" for path in SCRIPTS
             for i, line in enumerate(path.read_text().splitlines(), 1) if "film" in line.lower()]  # fmt: skip
    assert not films
