"""The README: its commands run in their order and print what it shows; its figures are computed."""

import contextlib
import glob
import io
import json
import re
import shlex
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from conftest import film

import data
import evaluate
import models
import profile_gpu
import train

ROOT = Path(train.__file__).parent
README = (ROOT / "README.md").read_text()
MAINS = {"train.py": train.main, "evaluate.py": evaluate.main, "data.py": data.main,
         "profile_gpu.py": profile_gpu.main}  # fmt: skip
# Commands that this suite cannot run within itself: their words are only echoed. `set -f`: globs as typed.
ECHO = 'set -f; for f in python torchrun; do eval "$f() { printf \'%q \' $f \\"\\$@\\"; echo; }"; done\n'


def blocks(*languages):
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return [text for language, text in fences if language in languages]


def commands():
    """Every command of the README, its loops and variables unfolded by the shell, one seed a loop."""
    for block in blocks("bash", "sh"):
        block = re.sub(r"for s in (\d+)[ \d]*;", r"for s in \1;", block)
        block = re.sub(r"python3 -m venv.*?requirements.txt && ", "", block.replace("\\\n", " "))
        told = subprocess.run(["bash", "-ec", ECHO + block], capture_output=True, text=True, check=True)
        yield from (shlex.split(line) for line in told.stdout.splitlines())


@pytest.fixture
def miniatures(tmp_path, monkeypatch, few_phantoms, kermany, mura, nih, chexpert):
    """All that the README speaks of, tiny: folders of films, ImageNet weights, recipes of one epoch; and one
    small network under every name, for what is tried here is the commands."""
    (tmp_path / "data").mkdir()
    kermany.rename(tmp_path / "data/chest_xray")
    shutil.copytree(tmp_path / "data/chest_xray", tmp_path / "films")
    film(tmp_path / "film.jpeg")
    squeezenet = models.bare_network
    monkeypatch.setattr(models, "bare_network", lambda arch, aux: squeezenet("squeezenet1_1", aux))
    monkeypatch.setattr(profile_gpu, "bare_network", models.bare_network)
    torch.save(squeezenet("squeezenet1_1", False).state_dict(), tmp_path / "imagenet.pth")
    monkeypatch.setattr(models, "imagenet_file", lambda arch: tmp_path / "imagenet.pth")
    monkeypatch.setattr(data, "download", lambda folder, url, sha256: print(f"from {url} to {folder}"))
    for name, roles in train.RECIPES.items():
        tiny = {"size": 32, "epochs": 3 if name == "demo" else 1, "batch_size": 8, "lr": 0.01}
        monkeypatch.setitem(train.RECIPES, name, {role: {**r, **tiny} for role, r in roles.items()})


def run(words):
    """Run one command in this process; what it prints."""
    words = words[words.index("train.py") - 1 :] if words[0] == "torchrun" else words
    script, words = words[1], words[2:]
    for flag, tiny in (("--epochs", "1"), ("--size", "32")):
        if flag in words:
            words[words.index(flag) + 1] = tiny
    if script == "profile_gpu.py":
        words += ["--size", "32", "--batch-size", "2", "--many", "2", "--steps", "1", "--rounds", "1"]
    words = [path for word in words for path in (sorted(glob.glob(word)) if "*" in word else [word])]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        MAINS[script](words)
    return said.getvalue()


def shape(text):
    """The lines of a text without its digits, widths and names of networks."""
    text = re.sub(r"inception_v3|alexnet", "NETWORK", text).replace("  best\n", "\n")
    text = re.sub(r"-?\d+(\.\d+)?", "0", text)
    return [re.sub(r"[-\s]+", " ", line).strip() for line in text.splitlines() if line.strip()]


def test_every_command_runs_in_the_order_of_the_readme_and_the_demo_prints_what_is_shown(miniatures):
    said, seen = [], set()
    for words in commands():
        if words[1] in MAINS or words[0] == "torchrun":
            try:
                text = run(list(words))
            except (SystemExit, data.UserError) as error:
                pytest.fail(f"README: {shlex.join(words)}: {error}")
            seen.add(words[1])
            said += [text] if len(said) < 4 else []
        else:
            assert words[1] == "-m" or (ROOT / words[1]).exists(), words
    assert seen >= set(MAINS)
    [shown] = [block for block in blocks("") if block.startswith("teacher: ")]
    printed = shape("".join(said))
    place = 0
    for line in shape(shown):
        if line == "...":
            continue
        assert line in printed[place:], f"the README shows a line that is not printed: {line}"
        place = printed.index(line, place) + 1


def test_the_tables_below_the_python_of_the_readme_are_what_it_prints():
    names, lessons = {}, [code for code in blocks("python") if "torch.export" not in code]
    assert len(lessons) == 2
    for code in lessons:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            exec(code, names)  # the second goes on from the first
        assert README.split(f"{code}```\n\n")[1].startswith(said.getvalue() + "\n")


def test_the_exported_student_is_read_by_the_lines_of_the_readme(few_phantoms):
    [code] = [block for block in blocks("python") if "torch.export.load" in block]
    assert len(code.splitlines()) == 4
    train.main("--role baseline --arch squeezenet1_1 --size 80 --epochs 1 --per-class 4 --out run".split())
    evaluate.main(["run", "--export", "student.pt2"])
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(code, {})
    assert said.getvalue().startswith("['NORMAL', 'PNEUMONIA'] tensor([[")


def measured(name):
    return json.loads((ROOT / f"results/cost-{name}.json").read_text())["tables"]


def test_the_costs_told_are_those_that_were_measured():
    networks, training, inference = measured("networks").values()
    for arch, n in networks.items():
        paper = profile_gpu.PAPER[arch]
        asked, more = inference[f"{arch}, 2 threads"], n["auxiliary M"]
        cells = [
            f"{arch} at {n['size']}", f"{n['depth']} ({paper['depth']})",
            f"{n['parameters M']:.2f}{f' + {more:.2f}' if more else ''} ({paper['parameters M']:.2f})",
            f"{n['multiply-adds M']:,.0f} ({paper['multiply-adds M']:,})", f"{n['MB']:.0f}",
            f"{training[arch]['films/s']:.1f}", f"{asked['median ms']:.0f} ({asked['exported ms']:.0f})",
            f"{asked['films/s']:.1f}",
        ]  # fmt: skip
        assert "| " + " | ".join(cells) + " |" in README, cells
    pairs = [measured(name)["a step"] for name in ("inception_v3-alexnet", "resnet34-resnet18-128")]
    for row, told in (("b baseline", "labels alone (baseline)"),
                      ("c teacher's table", "distilled, from the teacher's table"),
                      ("d teacher asked live", "distilled, the teacher asked at every step"),
                      ("e head on features", "the head alone, from a table of features")):  # fmt: skip
        cells = [told, *(f"{steps[row]['ratio to a']:.3f}" for steps in pairs)]
        assert "| " + " | ".join(cells) + " |" in README, cells
    ready = measured("loading")["films ready"].values()
    alone, decoding, cold, warm = (f"{row['seconds']:.2f} s" for row in ready)
    words = re.sub(r"\s+", " ", README)
    assert f"decoded in {decoding}" in words and f"takes {alone}; a first start takes {cold}" in words
    assert f"every later one {warm}" in words


def test_the_bars_of_the_figure_are_as_high_as_the_softened_answers():
    shapes = ElementTree.parse(ROOT / "figures/distillation.svg").iter()
    bars = {shape.get("id"): float(shape.get("height")) for shape in shapes if shape.get("id", "")[:1] == "T"}
    logits = torch.tensor([-1.0, 4.0, 2.5])
    for T in (1, 4, 20):
        heights = torch.tensor([bars[f"T{T}-{name}"] for name in ("normal", "bacterial", "viral")])
        assert torch.allclose(heights / 112, (logits / T).softmax(0), atol=1e-3)


def test_every_name_that_the_readme_points_to_exists():
    scripts = {"kd": __import__("kd"), "data": data, "models": models, "evaluate": evaluate, "train": train,
               "profile_gpu": profile_gpu}  # fmt: skip
    names = re.findall(r"`(kd|data|models|evaluate|train|profile_gpu)\.(\w+)`", README)
    assert len(names) >= 10
    for script, name in names:
        assert name == "py" or hasattr(scripts[script], name), f"{script}.{name}"
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / path).exists(), path


def test_the_tables_of_the_real_films_stand_in_the_readme_as_evaluate_prints_them(capsys):
    evaluate.main([f"{ROOT}/results/films.json"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) > 4 and "\n".join(rows[:4]) in README
    assert all(row in README for row in rows)
    runs = json.loads((ROOT / "results/films.json").read_text())["runs"]
    assert all(run["trained_by"]["commit"] and run["args"]["recipe"] for run in runs.values())


@pytest.mark.parametrize("result, seeds, student, baseline, t", [
    ("demo", "01234", "demo/student-T1", "demo/baseline", 2.776),  # Student's t, 97.5 %, 4 and 2 degrees
    ("films", "012", "films/alexnet-T1", "films/alexnet", 4.303),
])  # fmt: skip
def test_the_intervals_over_seeds_follow_from_the_results(result, seeds, student, baseline, t):
    runs = json.loads((ROOT / f"results/{result}.json").read_text())["runs"]

    def accuracy(name, seed):
        run = runs.get(f"runs/{name}-seed{seed}") or runs[f"runs/{name}"]  # a default seed is not in the name
        return 100 * run["test"]["0.5"]["accuracy"]

    gains = torch.tensor([accuracy(student, s) - accuracy(baseline, s) for s in seeds], dtype=torch.float64)
    half = t * gains.std() / len(seeds) ** 0.5
    assert f"[{gains.mean() - half:.1f}, {gains.mean() + half:.1f}]" in README


def test_as_many_of_the_students_labels_are_wrong_as_the_readme_says():
    train_films = data.load("phantoms", 16, per_class=10).train
    right = torch.tensor([int(id.split("-")[2]) % 2 for id in train_films.ids])
    assert len(right) == 20 and (train_films.labels != right).sum() == 3
    assert "Three of the student's 20 labels are wrong." in README
