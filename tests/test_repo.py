"""The house: who may import whom, how much there is to read, and a README whose commands exist."""

import ast
import re
import shlex
import sys
from pathlib import Path

import pytest

import data
import evaluate
import profile_gpu
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


def test_the_scripts_can_be_read_in_one_sitting():
    lines = {path.name: len(path.read_text().splitlines()) for path in ROOT.glob("*.py")}
    assert set(lines) <= {f"{name}.py" for name in MAY_IMPORT}
    assert sum(lines.values()) <= 2860 and max(lines.values()) <= 760, lines


def readme_commands():
    text = (ROOT / "README.md").read_text()
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            yield from (part.strip() for part in line.split("#")[0].split("&&") if part.strip())


def test_every_command_in_the_readme_is_understood_by_its_script():
    parsers = {"train.py": train.get_args, "evaluate.py": evaluate.get_args, "data.py": data.get_args,
               "profile_gpu.py": profile_gpu.get_args}  # fmt: skip
    seen = set()
    for command in readme_commands():
        words = shlex.split(command)
        if words[0] == "torchrun":
            words = ["python", *words[words.index("train.py") :]]
        if words[0] == "python" and words[1].endswith(".py"):
            seen.add(words[1])
            try:
                parsers[words[1]](words[2:])
            except SystemExit:
                pytest.fail(f"README: {command}")
    assert seen >= set(parsers)
