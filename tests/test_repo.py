"""The house: who may import whom, and how much there is to read."""

import ast
import io
import sys
import tokenize
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
FIGURES = sorted((ROOT / "figures").glob("*.py"))


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def lines_of(path):
    return path.read_text().splitlines()


def commented(text):
    """The numbers of the lines that carry a # comment or lie in a docstring."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    lines = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            lines |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def test_scripts_import_only_what_lies_below_them_and_four_packages():
    for path in ROOT.glob("*.py"):
        names = set(imports_of(path)) - set(sys.stdlib_module_names)
        assert names <= MAY_IMPORT[path.stem] | PACKAGES, path.name


def test_matplotlib_is_needed_for_figures_alone():
    with_it = [path for path in ROOT.rglob("*.py")
               if ".venv" not in path.parts and "matplotlib" in imports_of(path)]  # fmt: skip
    assert set(with_it) <= set(FIGURES)


def test_there_are_six_scripts_and_no_more_to_read_than_agreed():
    assert sorted(ROOT.glob("*.py")) == sorted(SCRIPTS)
    lines = {path.name: len(lines_of(path)) for path in SCRIPTS}
    assert sum(lines.values()) <= 2300 and max(lines.values()) <= 600, lines


def test_no_line_of_a_script_is_longer_than_a_hundred_columns():
    long = [f"{path.name}:{i}" for path in [*SCRIPTS, *FIGURES]
            for i, line in enumerate(lines_of(path), 1) if len(line) > 100]  # fmt: skip
    assert not long


def test_no_function_is_longer_than_fifty_lines_but_the_one_that_lists_the_flags():
    lengths = [(node.end_lineno - node.lineno + 1, path.name, node.name)
               for path in [*SCRIPTS, *FIGURES] for node in ast.walk(ast.parse(path.read_text()))
               if isinstance(node, ast.FunctionDef) and node.name != "get_args"]  # fmt: skip
    assert not [length for length in lengths if length[0] > 50]


def test_of_six_lines_of_the_loops_script_one_at_least_is_a_comment():
    """Counted among lines that are not blank: those that carry a # or lie in a docstring."""
    text = (ROOT / "train.py").read_text()
    lines = [i for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    assert len(commented(text) & set(lines)) >= len(lines) / 6


def test_comments_are_counted_as_a_reader_would_count_them():
    text = '"""Two lines\nof text."""\n\nx = "# no comment"\n# one\ny = 1  # two\n\n\ndef f():\n    """Three."""\n'
    assert commented(text) == {1, 2, 5, 6, 10}


def test_a_picture_is_an_image_in_every_script():
    films = [f"{path.name}:{i}" for path in SCRIPTS
             for i, line in enumerate(lines_of(path), 1) if "film" in line.lower()]  # fmt: skip
    assert not films
