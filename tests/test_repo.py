"""The repository: which script may import which, how long scripts are, and that they import on Windows."""

import ast
import subprocess
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
PACKAGES = {"torch", "torchvision", "numpy", "PIL", "filelock"}
SCRIPTS = [ROOT / f"{name}.py" for name in MAY_IMPORT]
FIGURES = sorted((ROOT / "figures").glob("*.py"))


def imported_by(nodes):
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


def imports_of(path):
    return imported_by(ast.walk(ast.parse(path.read_text())))


def lines_of(path):
    return path.read_text().splitlines()


def test_scripts_import_only_scripts_below_them():
    for path in ROOT.glob("*.py"):
        names = imports_of(path) - set(sys.stdlib_module_names)
        optional = {"pydicom"} if path.stem == "data" else set()
        assert names <= MAY_IMPORT[path.stem] | PACKAGES | optional, path.name


def test_pydicom_is_imported_inside_a_function():
    assert "pydicom" not in imported_by(ast.parse((ROOT / "data.py").read_text()).body)


def test_only_figures_import_matplotlib():
    with_it = {path for path in ROOT.rglob("*.py")
               if ".venv" not in path.parts and "matplotlib" in imports_of(path)}
    assert with_it <= set(FIGURES)


def test_scripts_import_without_unix_modules():
    """Windows has neither fcntl nor resource."""
    code = f"import sys; sys.modules.update(fcntl=None, resource=None); import {', '.join(MAY_IMPORT)}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_there_are_six_scripts_of_limited_length():
    assert sorted(ROOT.glob("*.py")) == sorted(SCRIPTS)
    lines = {path.name: len(lines_of(path)) for path in SCRIPTS}
    assert len(lines_of(ROOT / "figures/plots.py")) <= 245
    assert sum(lines.values()) <= 2300 and lines["train.py"] <= 565 and max(lines.values()) <= 660, lines


def test_lines_have_at_most_100_columns():
    long = [f"{path.name}:{i}" for path in [*SCRIPTS, *FIGURES]
            for i, line in enumerate(lines_of(path), 1) if len(line) > 100]
    assert not long


def test_functions_have_at_most_50_lines_except_get_args():
    lengths = [(node.end_lineno - node.lineno + 1, path.name, node.name)
               for path in [*SCRIPTS, *FIGURES] for node in ast.walk(ast.parse(path.read_text()))
               if isinstance(node, ast.FunctionDef) and node.name != "get_args"]
    assert not [length for length in lengths if length[0] > 50]
