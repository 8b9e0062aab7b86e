"""The READMEs: their commands run in their order and print what they show; their figures are computed."""

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
from conftest import image_file

import data
import evaluate
import kd
import models
import profile_gpu
import train
from results import draws

ROOT = Path(train.__file__).parent
README, RESULTS, ALL = (
    (ROOT / path).read_text() for path in ("README.md", "results/README.md", "results/all.sh")
)
MAINS = {"train.py": train.main, "evaluate.py": evaluate.main, "data.py": data.main,
         "profile_gpu.py": profile_gpu.main}  # fmt: skip
# Commands that this suite cannot run within itself: their words are only echoed. `set -f`: globs as typed.
ECHO = "set -f; python() { printf '%q ' python \"$@\"; echo; }\n"


def blocks(page, *languages):
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    return [text for language, text in fences if language in languages]


def commands(page):
    """Every command of a page, its variables unfolded by the shell, and of each loop the first turn."""
    for block in [page] if page.startswith("#!") else blocks(page, "bash", "sh"):
        block = re.sub(r"for (\w) in (\S+)[^;\n]*;", r"for \1 in \2;", block)
        block = re.sub(r"python3 -m venv.*?requirements.txt|pip install.*", "", block.replace("\\\n", " "))
        parts = re.findall(r"^(\w+)\(\) {", block, re.MULTILINE)  # of all.sh: every one, by name
        told = subprocess.run(["bash", "-ec", ECHO + block, "", *parts], capture_output=True, text=True, check=True)
        yield from (shlex.split(line) for line in told.stdout.splitlines())


@pytest.fixture
def miniatures(tmp_path, monkeypatch, few_phantoms, kermany, mura, nih, chexpert):
    """All that the pages speak of, tiny: folders of images, ImageNet weights, recipes of one epoch; and one
    small network under every name, for what is tried here is the commands."""
    (tmp_path / "data").mkdir()
    kermany.rename(tmp_path / "data/chest_xray")
    for name in ("images", "data/draw-0"):
        shutil.copytree(tmp_path / "data/chest_xray", tmp_path / name)
    image_file(tmp_path / "image.jpeg")
    squeezenet = models.bare_network
    monkeypatch.setattr(models, "bare_network", lambda arch, aux: squeezenet("squeezenet1_1", aux))
    state = squeezenet("squeezenet1_1", False).state_dict()
    monkeypatch.setattr(models, "imagenet_weights", lambda arch: {"model": dict(state), "sha256": "ImageNet"})
    monkeypatch.setattr(data, "download", lambda folder: print(f"to {folder}"))
    for name, roles in train.RECIPES.items():
        tiny = {"size": 32, "epochs": 3 if name == "demo" else 1, "batch_size": 8, "lr": 0.01,
                "steps_per_epoch": 2}
        monkeypatch.setitem(train.RECIPES, name, {role: {**r, **tiny} for role, r in roles.items()})


def run(words):
    """Run one command in this process; what it prints."""
    script, words = words[1], [re.sub(r"(-10-seed)\d$", r"\g<1>0", word) for word in words[2:]]  # one was trained
    for flag, tiny in (("--epochs", "1"), ("--size", "32"), ("--steps-per-epoch", "1"),
                       ("--val-fraction", "0.1")):  # fmt: skip
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
    text = re.sub(r"[+-]?\d+(\.\d+)?", "0", text)
    return [re.sub(r"[-\s]+", " ", line).strip() for line in text.splitlines() if line.strip()]


def typed(page):
    """Run the commands of a page in their order; yields what each prints."""
    for words in commands(page):
        if words[1] in MAINS:
            try:
                yield run(list(words))
            except (SystemExit, data.UserError) as error:
                pytest.fail(f"{shlex.join(words)}: {error}")
        else:
            assert words[1] == "-m" or (ROOT / words[1]).exists(), words


def test_every_command_of_the_readme_runs_and_the_demo_prints_what_is_shown(miniatures):
    said = list(typed(README))
    [shown] = [block for block in blocks(README, "") if "epoch" in block]
    printed = shape("".join(said[:4]))
    place = 0
    for line in shape(shown):
        if line == "...":
            continue
        found = [i for i, said in enumerate(printed) if i >= place and said.startswith(line)]
        assert found, f"the README shows a line that is not printed: {line}"
        place = found[0] + 1
    [export] = [code for code in blocks(README, "python") if "torch.export" in code]
    exec(export, {})
    student = torch.export.load("student.pt2").module()
    x = torch.randn(3, 3, 32, 32)
    model, _ = models.load_checkpoint("runs/demo/student-T1")
    assert torch.allclose(student(x).flatten(1), models.forward(model, x)[0], atol=1e-5)


@pytest.mark.parametrize("page, n", [(RESULTS, 7), (ALL, 50)], ids=["page", "all.sh"])
def test_every_command_of_the_results_runs(miniatures, page, n):
    assert len(list(typed(page))) >= n


def test_a_draw_labels_ten_others_of_each_class_and_validates_on_the_same_images(tmp_path, capsys):
    for kind, pattern, n in (("NORMAL", "IM-{:04}-{}.png", 60), ("SICK", "person{}_virus_{}.png", 150)):
        for i in range(n):
            folder = tmp_path / "set" / ("train" if i % 6 > 1 else "test") / kind
            image_file(folder / pattern.format(i // 2, i), side=8)
    whole, labelled = data.load("set", 8, labels_per_class=10), []
    for draw in (0, 1, 1):  # what is linked stays
        draws.link("set", draw)
        said = capsys.readouterr().out
        folder, share = re.fullmatch(r"(\S+): --labels-per-class 10 --val-fraction (\S+)\n", said).groups()
        drawn = data.load(folder, 8, labels_per_class=10, val_fraction=float(share))
        assert drawn.fingerprints["val"] == whole.fingerprints["val"]
        assert drawn.fingerprints["test"] == data.load("set", 8).fingerprints["test"]
        assert sorted(Path(id).name for id in drawn.train.ids) == sorted(Path(id).name for id in whole.train.ids)
        labelled.append({id for id, k in zip(drawn.train.ids, drawn.train.labels, strict=True) if k >= 0})
        assert drawn.train.labels[drawn.train.labels >= 0].bincount().tolist() == [10, 10]
    first = {id for id, k in zip(whole.train.ids, whole.train.labels, strict=True) if k >= 0}
    assert labelled[0] == first and labelled[1] != first and labelled[2] == labelled[1]


def test_the_output_below_the_python_of_the_readme_is_what_it_prints():
    [code] = [code for code in blocks(README, "python") if "torch.export" not in code]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(code, {})
    assert README.split(f"{code}```\n\n")[1].startswith(f"```\n{said.getvalue()}```\n")


def test_a_student_is_pulled_to_the_probabilities_that_the_readme_says():
    teacher, viral, told = torch.tensor([[-1.0, 4.0, 2.5]]), torch.tensor([2]), []
    for alpha in (0.9, 0.5):
        student = torch.zeros(1, 3, requires_grad=True)
        kd.distillation_loss(student, teacher, viral, 1, alpha)[0].backward()
        target = student.softmax(1)[0] - student.grad[0]  # the gradient is q - target
        told.append([f"{p:.2f}" for p in target.tolist()])
    (n, b, v), low = told
    sentence = f"normal {n}, bacterial {b}, viral {v} at alpha 0.9, and {', '.join(low)} at alpha 0.5"
    assert sentence in README.replace("\n", " ")


def measured(name):
    return json.loads((ROOT / f"results/cost-{name}.json").read_text())["tables"]


def test_the_costs_told_are_those_that_were_measured():
    networks, training, inference = measured("networks").values()
    for arch, n in networks.items():
        paper = profile_gpu.PAPER[arch]
        asked, more = inference[arch], n["auxiliary M"]
        cells = [
            f"{arch} at {n['size']}", f"{n['depth']} ({paper['depth']})",
            f"{n['parameters M']:.2f}{f' + {more:.2f}' if more else ''} ({paper['parameters M']:.2f})",
            f"{n['multiply-adds M']:,.0f} ({paper['multiply-adds M']:,})", f"{n['MB']:.0f}",
            f"{training[arch]['images/s']:.1f}", f"{asked['median ms']:.0f}", f"{asked['images/s']:.1f}",
        ]  # fmt: skip
        assert "| " + " | ".join(cells) + " |" in RESULTS, cells
    steps = measured("inception_v3-alexnet")["a step"]
    for row, told in (("b baseline", "labels alone (baseline)"),
                      ("c teacher's table", "distilled, from the teacher's table"),
                      ("d teacher asked live", "distilled, the teacher asked at every step")):  # fmt: skip
        assert f"| {told} | {steps[row]['ratio to a']:.3f} |" in RESULTS, told
    live, table = (steps[row]["ratio to a"] for row in ("d teacher asked live", "c teacher's table"))
    assert f"takes {live / table:.1f} times" in README


def test_the_bars_of_the_figure_are_as_high_as_the_softened_answers():
    shapes = ElementTree.parse(ROOT / "figures/distillation.svg").iter()
    bars = {shape.get("id"): float(shape.get("height")) for shape in shapes if shape.get("id", "")[:1] == "T"}
    logits = torch.tensor([-1.0, 4.0, 2.5])
    for T in (1, 4, 20):
        heights = torch.tensor([bars[f"T{T}-{name}"] for name in ("normal", "bacterial", "viral")])
        assert torch.allclose(heights / 112, (logits / T).softmax(0), atol=1e-3)


def test_every_name_that_the_pages_point_to_exists():
    scripts = {"kd": kd, "data": data, "models": models, "evaluate": evaluate, "train": train,
               "profile_gpu": profile_gpu}  # fmt: skip
    names = re.findall(r"`(kd|data|models|evaluate|train|profile_gpu)\.(\w+)`", README + RESULTS)
    assert len(names) >= 10
    for script, name in names:
        assert name == "py" or hasattr(scripts[script], name), f"{script}.{name}"
    for page, folder in ((README, ROOT), (RESULTS, ROOT / "results")):
        for path in re.findall(r"\]\(([^)#:]+)\)", page):
            assert (folder / path).exists(), path


def test_the_lines_to_read_first_are_as_many_as_the_readme_says():
    [whole] = re.findall(r"whole \((\d+)\s+lines\)", README)
    [loop] = re.findall(r"in four\s+steps \((\d+)\s+lines\)", README)
    kd, train_py = ((ROOT / name).read_text().splitlines() for name in ("kd.py", "train.py"))
    end = next(i for i, line in enumerate(train_py) if line.startswith("# ---- what made a run"))
    assert abs(len(kd) - int(whole)) <= 10 and abs(end - int(loop)) <= 10


def test_the_cells_of_the_results_are_those_that_were_measured():
    """Every cell of a table that follows a link to a file of results stands in that file's tables."""
    files = "demo|findings|xrays|two-cores|labels|ten|draws|course|three-classes"
    _, *parts = re.split(rf"\]\(({files})\.json\)", RESULTS)
    assert set(parts[::2]) == set(files.split("|"))
    for name, text in zip(parts[::2], parts[1::2], strict=True):
        kept = json.loads((ROOT / f"results/{name}.json").read_text())
        measured = re.sub(r"\s+", " ", " ".join(kept["tables"]))
        rows = [line.strip("| ").split(" | ") for line in text.split("\n## ")[0].splitlines() if line[:2] == "| "]
        assert len(rows) > 2
        for cell in [cell.strip("| ") for row in rows[1:] for cell in row[1:]]:
            for part in cell.split(" / "):
                assert re.sub(r" \[.*| ± .*", "", part) in measured, (name, cell)


def test_the_figures_of_the_first_screen_are_those_of_the_results():
    printed = " ".join(json.loads((ROOT / "results/demo.json").read_text())["tables"])
    screen = README.split("## ")[0].replace("\xa0", " ")  # a figure does not break before its deviation
    rows = [line for line in screen.splitlines() if line.startswith("|") and "±" in line]
    figures = [re.findall(r"[\d.]+ ± [\d.]+", row) for row in rows]  # AUC, accuracy, ECE in one printed row
    assert [len(row) for row in figures] == [3] * 4
    for auc, accuracy, ece in figures:
        assert re.search(r"\s+".join(map(re.escape, (auc, accuracy))) + r"[^\n[]* " + re.escape(ece), printed)
    demo = json.loads((ROOT / "results/demo.json").read_text())
    gains = {gain["title"]: gain["figures"]["accuracy"] for gain in demo["gains"]}
    for name, told in (("student-T1", "the student is {} points more accurate"),
                       ("student-of-itself", "the same 20 labels brings {} points")):  # fmt: skip
        gain = f"{100 * gains[name]['mean']:.1f} ± {100 * gains[name]['sd']:.1f}"
        assert told.format(gain) in screen.replace("\n", " ")
    for alpha, weight in ((0.9, "at alpha 0.9 leaves labels a weight of 0.3 %"), (0.5, "1.6 % at 0.5")):
        assert weight in README.replace("\n", " ") and f"{100 * (1 - alpha) * 20 / 640:.1f}" in weight
    few = json.loads((ROOT / "results/draws.json").read_text())["runs"]
    for name, told in (("alone", "{} alone"), ("taught", "{} with the logits of a teacher"),
                       ("self", "{} with those of a network that has read the same 20")):  # fmt: skip
        aucs = torch.tensor([100 * few[f"runs/draws/{name}-{draw}"]["test"]["auc"] for draw in range(5)])
        assert told.format(f"{aucs.mean():.1f} ± {aucs.std():.1f}") in screen.replace("\n", " ")


@pytest.mark.parametrize("result, metric, student, baseline", [
    ("demo", "accuracy", "demo/student-T1-seed", "demo/baseline-seed"),
    ("draws", "auc", "draws/taught-", "draws/alone-"),
    ("draws", "auc", "draws/self-", "draws/alone-"),
    ("draws", "accuracy", "draws/taught-", "draws/alone-"),
    ("draws", "accuracy", "draws/self-", "draws/alone-"),
])  # fmt: skip
def test_the_gains_over_five_runs_follow_from_the_results(result, metric, student, baseline):
    runs = json.loads((ROOT / f"results/{result}.json").read_text())["runs"]
    gains = [runs[f"runs/{student}{i}"]["test"][metric] - runs[f"runs/{baseline}{i}"]["test"][metric]
             for i in range(5)]  # fmt: skip
    gains = 100 * torch.tensor(gains, dtype=torch.float64)
    half = 2.776 * gains.std() / 5**0.5  # Student's t, 97.5 %, four degrees of freedom
    page = " ".join(RESULTS.split())
    assert f"{gains.mean():.1f} ± {gains.std():.1f}" in page
    assert f"[{gains.mean() - half:.1f}, {gains.mean() + half:.1f}]" in page
