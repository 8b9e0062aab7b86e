"""The pages: their commands are parsed and run in their order, and their figures are those of files or of code."""

import contextlib
import glob
import io
import json
import re
import shlex
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from itertools import chain
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
PAGES = {"README": README, "results": RESULTS}
MAINS = {"train.py": train.main, "evaluate.py": evaluate.main, "data.py": data.main,
         "profile_gpu.py": profile_gpu.main}
# Commands that this suite cannot run in its own process are only echoed. `set -f` keeps globs as they are typed.
ECHO = "set -f; echoed() { printf '%q ' \"$@\"; echo; }\n" + "".join(
    f"{name}() {{ echoed {name} \"$@\"; }}\n" for name in ("python", "make", "torchrun"))


def blocks(page, *languages):
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    return [text for language, text in fences if language in languages]


def one_line(page):
    return re.sub(r"\s+", " ", page.replace("\xa0", " "))  # a figure does not break before its deviation


def results(name):
    return json.loads((ROOT / f"results/{name}.json").read_text())


def commands(page, parts=None):
    """Yield every command of a page, with variables expanded by the shell, and of each loop over a single
    letter the first turn. parts: of all.sh, by default all of them in one shell."""
    for block in [page] if page.startswith("#!") else blocks(page, "bash", "sh"):
        block = re.sub(r"for (\w) in (\S+)[^;\n]*;", r"for \1 in \2;", block)
        block = re.sub(r"python3 -m venv.*?requirements.txt|pip install.*", "", block.replace("\\\n", " "))
        parts = parts or re.findall(r"^(\w+)\(\) {", block, re.MULTILINE)
        told = subprocess.run(["bash", "-ec", ECHO + block, "", *parts], capture_output=True, text=True, check=True)
        yield from (shlex.split(line) for line in told.stdout.splitlines())


@pytest.fixture
def miniatures(tmp_path, monkeypatch, few_phantoms, kermany, mura, nih, chexpert):
    """Make everything that the pages use, but tiny: folders of images, ImageNet weights, and recipes of one epoch.
    One small network has every name, because the commands are tested here and not the networks."""
    (tmp_path / "data").mkdir()
    kermany.rename(tmp_path / "data/chest_xray")
    for name in ("images", "data/draw-0", "data/draw-1"):
        shutil.copytree(tmp_path / "data/chest_xray", tmp_path / name)
    for name in ("image.jpeg", "image.png", "new-images/1.png", "new-images/2.png"):
        image_file(tmp_path / name)
    squeezenet = models.bare_network
    monkeypatch.setattr(models, "bare_network", lambda arch, aux: squeezenet("squeezenet1_1", aux))
    state = squeezenet("squeezenet1_1", False).state_dict()
    monkeypatch.setattr(models, "imagenet_weights", lambda arch: {"model": dict(state)})
    monkeypatch.setattr(data, "download", lambda folder: print(f"to {folder}"))
    for name, roles in train.RECIPES.items():
        tiny = {"size": 32, "epochs": 3 if name == "demo" else 1, "batch_size": 8, "lr": 0.01,
                "steps_per_epoch": 2}
        monkeypatch.setitem(train.RECIPES, name, {role: {**r, **tiny} for role, r in roles.items()})


def run(words):
    """Run one command in this process and return what it prints."""
    script, words = words[1], [re.sub(r"(-10-seed)\d$", r"\g<1>0", word) for word in words[2:]]  # one was trained
    for flag, tiny in (("--epochs", "1"), ("--size", "32"), ("--steps-per-epoch", "1"),
                       ("--val-fraction", "0.1")):
        if flag in words:
            words[words.index(flag) + 1] = tiny
    if script == "profile_gpu.py":
        words += ["--size", "32", "--batch-size", "2", "--many", "2", "--steps", "1", "--rounds", "1"]
    words = [path for word in words for path in (sorted(glob.glob(word)) if glob.has_magic(word) else [word])]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        MAINS[script](words)
    return said.getvalue()


def shape(text):
    """Return the lines of a text without its digits, widths and names of networks."""
    text = re.sub(r"inception_v3|alexnet|shufflenet_v2_x0_5", "NETWORK", text)
    text = re.sub(r"train \d+\.\d", "", text)  # not shown where few images have a label
    text = re.sub(r"[+-]?\d+(\.\d+)?", "0", text)
    return [re.sub(r"[-\s]+", " ", line).strip() for line in text.splitlines() if line.strip()]


def typed(page):
    """Run the commands of a page in their order, and yield what each prints."""
    for words in commands(page):
        if words[0] == "make":
            assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(), words
        elif words[0] == "torchrun":
            train.get_args(words[words.index("train.py") + 1 :])
        elif words[1] in MAINS:
            try:
                yield run(list(words))
            except (SystemExit, data.UserError) as error:
                pytest.fail(f"{shlex.join(words)}: {error}")
        else:
            assert words[1] == "-m" or (ROOT / words[1]).exists(), words


def test_every_command_of_the_readme_runs(miniatures):
    """The demo prints the table that is shown, and the code for the export runs."""
    printed = shape("".join(typed(README)))
    place = 0
    [table] = [block[block.index("600 test images") :] for block in blocks(README, "") if "600 test images" in block]
    for line in shape(table):
        if line != "...":
            found = [i for i, said in enumerate(printed) if i >= place and said.startswith(line)]
            assert found, f"the README shows a line that is not printed: {line}"
            place = found[0] + 1
    [export] = [code for code in blocks(README, "python") if "torch.export" in code]
    exec(export, {})
    student = torch.export.load("student.pt2").module()
    x = torch.randn(3, 3, 32, 32)
    model, _ = models.load_checkpoint("runs/demo/student-T1")
    assert torch.allclose(student(x).flatten(1), models.forward(model, x)[0], atol=1e-5)


def test_every_command_of_all_sh_runs(miniatures):
    assert len(list(typed(ALL))) >= 90 and not blocks(RESULTS, "bash", "sh")


def test_parts_of_all_sh_do_not_change_each_other():
    """They share a shell, so a part could overwrite a variable that a later part reads."""
    parts = re.findall(r"^(\w+)\(\) {", ALL, re.MULTILINE)
    assert len(parts) > 9
    assert [*commands(ALL)] == [command for part in parts for command in commands(ALL, [part])]


def test_a_draw_labels_ten_others_per_class(tmp_path, capsys):
    for kind, pattern, n in (("NORMAL", "IM-{:04}-{}.png", 60), ("SICK", "person{}_virus_{}.png", 150)):
        for i in range(n):
            folder = tmp_path / "set" / ("train" if i % 6 > 1 else "test") / kind
            image_file(folder / pattern.format(i // 2, i), side=8)
    whole, labelled = data.load("set", 8, labels_per_class=10), []
    for draw in (0, 1, 1):  # links stay
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


# ---- figures on the pages


def test_python_on_the_readme_prints_what_is_shown():
    for code in blocks(README, "python"):
        compile(code, "README", "exec")
        if "print(" in code:
            with contextlib.redirect_stdout(io.StringIO()) as said:
                exec(code, {})
            assert README.split(f"{code}```\n\n")[1].startswith(f"```\n{said.getvalue()}```\n")


def test_softened_probabilities_and_gradients():
    """The README tabulates p, the gradient of KL and the gradient of T² KL, for a student with logits 0, 0, 0."""
    teacher = torch.tensor([[-1.0, 4.0, 2.5]])
    page = one_line(README.replace("|", " "))
    for T in (1, 4, 20):
        student = torch.zeros(1, 3, requires_grad=True)
        kd.kd_loss(student, teacher, T).backward()
        size = student.grad.norm().item()
        p = " ".join(f"{value:.2f}" for value in (teacher / T).softmax(1)[0].tolist())
        assert f" {T} {p} {size / T**2:.5f} {size:.3f} " in page


def test_the_target_of_a_viral_image():
    """The README has the probabilities towards which alpha 0.9 and 0.5 pull the student, in this order."""
    teacher, viral, targets = torch.tensor([[-1.0, 4.0, 2.5]]), torch.tensor([2]), []
    for alpha in (0.9, 0.5):
        student = torch.zeros(1, 3, requires_grad=True)
        kd.distillation_loss(student, teacher, viral, 1, alpha)[0].backward()
        targets += (student.softmax(1)[0] - student.grad[0]).tolist()  # the gradient is q - target
    assert " ".join(f"{p:.2f}" for p in targets) in " ".join(re.findall(r"\b\d\.\d\d\b", README))


def test_the_bars_of_the_figure_are_softened_probabilities():
    shapes = ElementTree.parse(ROOT / "figures/distillation.svg").iter()
    bars = {shape.get("id"): float(shape.get("height")) for shape in shapes if shape.get("id", "")[:1] == "T"}
    logits = torch.tensor([-1.0, 4.0, 2.5])
    for T in (1, 4, 20):
        heights = torch.tensor([bars[f"T{T}-{name}"] for name in ("normal", "bacterial", "viral")])
        assert torch.allclose(heights / 112, (logits / T).softmax(0), atol=1e-3)


def table_rows(page):
    for line in page.splitlines():
        if line.startswith("| ") and line.count("|") > 2:
            yield [cell.strip() for cell in line.strip()[1:-1].split("|")]


def test_costs_are_those_of_their_files():
    networks, training, inference = results("cost-networks")["tables"].values()
    for arch, n in networks.items():
        paper, more = results("paper")["networks"][arch], n["auxiliary M"]
        depth = [f"{n['depth']} ({paper['depth']})"] if "depth" in n else []  # profile_gpu.py counted it once
        measured = [
            *depth,
            f"{n['parameters M']:.2f}{f' + {more:.2f}' if more else ''} ({paper['parameters M']:.2f})",
            f"{n['multiply-adds M']:,.0f} ({paper['multiply-adds M']:,})", f"{n['MB']:.0f}",
            f"{training[arch]['images/s']:.1f}", f"{inference[arch]['median ms']:.0f}",
            f"{inference[arch]['images/s']:.1f}",
        ]
        cells = next(cells for name, *cells in table_rows(RESULTS) if name == f"{arch} at {n['size']}")
        assert len(cells) >= 5 and cells == [cell for cell in measured if cell in cells], arch
    bare, *ratios = [step["ratio to a"] for step in results("cost-inception_v3-alexnet")["tables"]["a step"].values()]
    baseline, precomputed, at_every_step = ratios
    text = r"the baseline takes ([\d.]+) times .* precomputed logits ([\d.]+) times, .* every step ([\d.]+) times"
    assert bare == 1 and re.search(text, one_line(RESULTS)).groups() == tuple(f"{ratio:.3f}" for ratio in ratios)
    assert f"{at_every_step / precomputed:.1f} times as long" in one_line(README)


def test_costs_of_the_small_students_and_their_teacher():
    """Every figure of the table is that of a file. The README has the speeds of one student and of the teacher."""
    speeds = []
    for name, arch, file in (("InceptionV3", "inception_v3", "teacher"), ("MobileNetV3-Small", "mobilenet_v3_small",
                             "student"), ("SqueezeNet 1.1", "squeezenet1_1", "student"),
                             ("ShuffleNetV2 x0.5", "shufflenet_v2_x0_5", "student")):
        size, timed = results("onnx-sizes")["networks"][arch], results(f"cost-small-{file}")["tables"]["inference"][arch]
        row = next(cells for cells in table_rows(RESULTS) if cells[0].startswith(f"{name}, ") and len(cells) == 7)
        speeds.append(f"{timed['images/s']:,.0f}")
        assert row[1:] == [f"{size['parameters'] / 1e6:.2f}", f"{size['weights in bytes'] / 1e6:.1f}",
                           f"{size['ONNX file in bytes'] / 1e6:.1f}", f"{size['multiply_adds'] / 1e6:.1f}",
                           f"{timed['median ms']:.1f}", speeds[-1]]
    teacher, *_, student = speeds
    assert f"classifies {student} images per second on one core, and its teacher {teacher}" in one_line(README)
    assert f"classifies {int(student.replace(',', '')) / int(teacher):.0f} times as many images" in one_line(RESULTS)


def test_names_and_links_on_the_pages_exist():
    scripts = {"kd": kd, "data": data, "models": models, "evaluate": evaluate, "train": train,
               "profile_gpu": profile_gpu}
    names = re.findall(r"`(kd|data|models|evaluate|train|profile_gpu)\.(\w+)`", README + RESULTS)
    assert len(names) >= 3
    for script, name in names:
        assert name == "py" or hasattr(scripts[script], name), f"{script}.{name}"
    for page, folder in ((README, ROOT), (RESULTS, ROOT / "results")):
        for path in re.findall(r"\]\(([^)#:]+)\)", page):
            assert (folder / path).exists(), path


def test_lengths_of_scripts_on_the_readme():
    for name, n in re.findall(r"^\| \[(\w+\.py)\]\(\w+\.py\) \| (\d+) \|", README, re.MULTILINE):
        assert int(n) == pytest.approx(len((ROOT / name).read_text().splitlines()), abs=10), name


def linked_tables():
    """Yield the name of a file of results, its content, and a table of the results page that follows a link to it."""
    links = re.split(r"\]\(([\w-]+)\.json\)", RESULTS)
    for name, text in zip(links[1::2], links[2::2], strict=True):
        content, rows = results(name), list(table_rows(text.split("\n## ")[0].split("\n[")[0]))
        if rows and "runs" in content:
            yield name, content, rows


def test_cells_of_the_results_stand_in_their_files():
    """Every cell of a table that follows a link to a file of results stands in that file's tables."""
    files = set()
    for name, content, rows in linked_tables():
        files.add(name)
        measured = one_line(" ".join(content["tables"]))
        assert len(rows) > 2
        for cell in chain.from_iterable(row[1:] for row in rows[1:]):
            for part in cell.split(" / "):
                # A bracket of two figures is an interval. Figures in parentheses are the paper's.
                figure = re.sub(r" \[.*| ± .*| \(.*", "", part)
                assert not figure or f" {figure}" in measured, (name, cell)
    with_runs = {path.stem for path in (ROOT / "results").glob("*.json") if "runs" in results(path.stem)}
    assert files == with_runs - {"temperatures-h100", "ten", "augmented", "choices", "draws", "findings",
                                  "small-other-teachers"}  # figures of these stand in sentences


def networks(content):
    """Return title -> metric -> mean and sd over seeds, with the interval where the file has it."""
    if "rows" in content:
        return {row["title"]: {**row["figures"], "validation": row["validation"]} for row in content["rows"]}
    groups = {}  # this file was written before files had rows
    for path, run in content["runs"].items():
        figures = {k: v for k, v in run["test"].items() if isinstance(v, float)}
        title = re.sub(r"-seed\d+$", "", path.split("/")[-1])
        groups.setdefault(title, []).append({**figures, "validation": run["validation"]["accuracy"]})
    values = {title: {metric: torch.tensor([run[metric] for run in runs], dtype=torch.float64) for metric in runs[0]}
              for title, runs in groups.items()}
    return {title: {metric: {"mean": x.mean().item(), "sd": x.std().item() if len(x) > 1 else None}
                    for metric, x in metrics.items()} for title, metrics in values.items()}


def fits(cell, figure, sign=""):
    """Return whether a cell such as "92.0 ± 1.0 [90.1 93.5]", or a part of it, shows this figure."""
    text = f"{100 * figure['mean']:{sign}.1f}"
    text += f" ± {100 * figure['sd']:.1f}" if figure["sd"] is not None else ""
    cell = re.sub(r" \(.*", "", cell)
    if "low" not in figure:
        cell = cell.split(" [")[0]
    if "[" in cell:
        text += f" [{100 * figure['low']:{sign}.1f} {100 * figure['high']:{sign}.1f}]"
    return cell == text


COLUMNS = {"AUC": "auc", "accuracy": "accuracy", "accuracy (paper)": "accuracy", "ECE": "ece",
           "specificity": "specificity", "validation": "validation"}
ROWS = {  # the run folders of a table's rows, from top to bottom, without -seedN; "-" is not a run
    "xrays": "- inception inception-head vgg16 alexnet alexnet-smoothed T1 T1-alpha0.5 T1-alpha1 T1-two-teachers "
             "T1-of-head",
    "two-cores": "inception alexnet T1 T10 T20 T30 T40 T50",
    "demo": "teacher baseline student-T1 self-distilled baseline-all-labels",
}
PAIRS = {  # the same for tables of gains: each baseline and its students, from left to right, and the rows
    "labels": (["alone-{0} taught-{0} self-{0}"], "10 30 100 300"),
    "patient": (["{1}baseline-{0} {1}precomputed-{0}", "{1}augmented-baseline-{0} {1}consistent-{0}"],
                "8: 40: 8:all-labels- 40:all-labels-"),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_the_results_is_a_row_of_its_file(name):
    """All cells of a row, with their intervals, are those of its network."""
    [(content, [[_, *header], *rows])] = [(content, rows) for n, content, rows in linked_tables() if n == name]
    for [text, *cells], title in zip(rows, ROWS[name].split(), strict=True):
        for column, cell in zip(header, cells, strict=True):
            if title != "-":
                assert fits(cell, networks(content)[title][COLUMNS[column]]), (text, column, cell)


def test_each_small_student_stands_in_its_column():
    """The results page has a table of AUC, and one of gains, with a column per network and a row per kind of run."""
    columns = ("shufflenet_v2_x0_5", "mobilenet_v3_small", "squeezenet1_1")
    kinds = ("baseline-20-labels student-20-labels self-20-labels baseline-all-labels student-all-labels "
             "student-all-labels-alpha0.5 student-all-labels-alpha1 student-all-labels-T4").split()
    [[_, *aucs], [_, *gains]] = [rows for name, _, rows in linked_tables() if name == "small"]
    found = {title: row["auc"] for title, row in networks(results("small")).items()}
    gained = {gain["title"]: gain["figures"]["auc"] for gain in results("small")["gains"]}
    for rows, titles, figures, sign in ((aucs, kinds, found, ""),
                                        (gains, [kind for kind in kinds if "baseline" not in kind], gained, "+")):
        for [text, *cells], kind in zip(rows, titles, strict=True):
            for cell, column in zip(cells, columns, strict=True):
                title = f"{kind}-{column}"
                assert fits(cell, figures[title], sign) if title in figures else not cell, (text, cell)


@pytest.mark.parametrize("name", PAIRS)
def test_a_gain_stands_beside_its_student(name):
    """In tables of gains, a row has the AUC of its baseline, and of each student, which its gain follows."""
    [(content, [_, *rows])] = [(content, rows) for n, content, rows in linked_tables() if n == name]
    auc = {title: figures["auc"] for title, figures in networks(content).items()}
    gains = {(gain["title"], gain["minus"]): gain["figures"]["auc"] for gain in content["gains"]}
    groups, keys = PAIRS[name]
    for [_, *cells], key in zip(rows, keys.split(), strict=True):
        cells = iter(cells)
        for baseline, *students in (group.format(*key.split(":")).split() for group in groups):
            assert fits(next(cells), auc[baseline]), baseline
            for student in students:
                assert fits(next(cells), auc[student]), student
                assert fits(next(cells), gains[student, baseline], "+"), student
        assert not [*cells]


def test_figures_that_stand_in_sentences():
    """Three experiments without a table: other choices of 20 labels, twice, and several findings per image."""
    def auc(title, minus):
        gains = results("choices")["gains"]
        return next(g["figures"]["auc"] for g in gains if (g["title"], g["minus"]) == (title, minus))

    pair = r".*? is (\+.*?) and (\+.*?)"
    cells = re.search(rf"other choices of the 20 {pair}\. {pair} \(", one_line(RESULTS)).groups()
    for cell, kind, i in zip(cells, ("student", "student", "self", "self"), (1, 2, 1, 2), strict=True):
        assert fits(cell, auc(f"{kind}-{i}", f"baseline-{i}"), "+"), (cell, kind)
    ranges = re.search(r"from ([\d.]+) to ([\d.]+) .*? is ([\d.]+) to ([\d.]+) with", one_line(RESULTS.split("## Who")[1]))
    runs = [over_runs("draws", "auc", f"draws/{way}-") for way in ("alone", "taught")]
    assert ranges.groups() == tuple(f"{x:.1f}" for values in runs for x in (values.min(), values.max()))
    section = one_line(RESULTS.split("## Several")[1])
    both, accuracy = re.search(r"teacher and baseline are ([\d.]+), .*? is ([\d.]+ \[.*?\])", section).groups()
    change, interval = re.search(r"gain is (-[\d.]+) .*?(\[.*?\])", section).groups()
    found, [gain] = networks(results("findings")), results("findings")["gains"]
    assert fits(both, found["teacher"]["auc"]) and fits(both, found["baseline"]["auc"])
    assert fits(accuracy, found["baseline"]["accuracy"])
    assert fits(f"{change} {interval}", gain["figures"]["accuracy"], "+")


def test_shares_of_healthy_images_that_are_called_sick():
    """A range in a sentence is that of the means over seeds: on the README of all networks with all labels, on the
    results page of all networks of the paper's part, and of all small networks of small.json."""
    def shares(name, every_label=False):
        groups = {}
        for path, run in results(name).get("runs", {}).items():
            config, title = run["config"], re.sub(r"seed\d+$", "", path)
            part = config.get("per_class") or every_label and config.get("labels_per_class")
            if run["classes"] == ["NORMAL", "PNEUMONIA"] and config["data"] == "data/chest_xray" and not part:
                groups.setdefault(title, []).append(100 - 100 * run["test"]["specificity"])
        return {title: sum(group) / len(group) for title, group in groups.items()}

    everywhere = [share for path in ROOT.glob("results/*.json") for share in shares(path.stem, True).values()]
    small = [share for title, share in shares("small").items() if "inception" not in title]
    for page, found in ((README, everywhere), (RESULTS, small), (RESULTS, [*shares("xrays").values()])):
        assert len(found) >= 10
        assert f"call {min(found):.0f} to {max(found):.0f} % of the healthy" in one_line(page)


def test_the_tables_of_two_figures_per_cell():
    """In the course's table, a cell has the validation accuracy and the test AUC of one row of its file. In that of
    three classes, training, validation and test accuracy."""
    tables = {name: (content, rows) for name, content, rows in linked_tables()}
    content, [_, *rows] = tables["course"]
    found, titles = networks(content), [f"{a}-{f}" for a in ("alexnet", "vgg16") for f in ("all", "fc", "head")]
    for title, [_, *cells] in zip(titles, rows, strict=True):
        for share, cell in zip(("0.2", "0.3", "0.4"), cells, strict=True):
            accuracy, auc = cell.split(" / ")
            row = found[f"{title}-{share}"]
            assert fits(accuracy, row["validation"]) and fits(auc, row["auc"]), (title, share)
    content, [_, *rows] = tables["three-classes"]
    found, titles = networks(content), ["small large", "small-smoothed large-smoothed", "normal -", "- reversed",
                                        "defective -", "- stopped"]
    for pair, [_, *cells] in zip(titles, rows, strict=True):
        for title, cell in zip(pair.split(), cells, strict=True):
            if title == "-":
                assert not cell
                continue
            _, validation, test = cell.split(" / ")
            assert f"{100 * found[title]['validation']['mean']:.1f}" == validation, title
            assert fits(test, found[title]["accuracy"]), title
            assert f" {cell}" in " ".join(content["tables"])


def over_runs(result, metric, run, minus=None, n=5):
    """Return a metric of the runs run0, run1, ... in percent, or its difference to that of other runs: (n,)."""
    runs = results(result)["runs"]

    def values(name):
        return torch.tensor([100 * runs[f"runs/{name}{i}"]["test"][metric] for i in range(n)], dtype=torch.float64)

    return values(run) - values(minus) if minus else values(run)


def plus_minus(values):
    return f"{values.mean():.1f} ± {values.std():.1f}"


GAINS = [
    ("demo", "accuracy", "demo/student-T1-seed", "demo/baseline-seed"),
    ("draws", "auc", "draws/taught-", "draws/alone-"),
    ("draws", "auc", "draws/self-", "draws/alone-"),
    ("draws", "accuracy", "draws/taught-", "draws/alone-"),
    ("draws", "accuracy", "draws/self-", "draws/alone-"),
    ("xrays", "auc", "xrays/inception-head-seed", "xrays/inception-seed"),
]


def measured_spreads():
    """Yield every mean and standard deviation in the files of results, as "m ± s"."""
    for path in sorted(ROOT.glob("results/*.json")):
        content = json.loads(path.read_text())
        yield from re.findall(r"\d[\d.]* ± [\d.]+", " ".join(content.get("tables", [])))
        for row in content.get("rows", []) + content.get("gains", []):
            for figure in row["figures"].values():
                if figure["sd"] is not None:
                    yield f"{abs(100 * figure['mean']):.1f} ± {100 * figure['sd']:.1f}"
    yield from (plus_minus(over_runs(*gain)) for gain in GAINS)
    yield from (plus_minus(over_runs("draws", "auc", f"draws/{way}-")) for way in ("alone", "taught", "self"))


def test_every_interval_on_the_results_page_is_measured():
    measured = set()
    for path in sorted(ROOT.glob("results/*.json")):
        content = json.loads(path.read_text())
        measured.update(re.findall(r"\[[^][ ]+ [^][ ]+\]", " ".join(content.get("tables", []))))
        for sign, rows in (("", content.get("rows", [])), ("+", content.get("gains", []))):
            measured.update(f"[{100 * figure['low']:{sign}.1f} {100 * figure['high']:{sign}.1f}]"
                            for row in rows for figure in row["figures"].values() if figure["low"] is not None)
    found = re.findall(r"\[[+-]?\d+\.\d [+-]?\d+\.\d\]", one_line(RESULTS))
    assert len(found) > 40 and not set(found) - measured


@pytest.mark.parametrize("page", PAGES)
def test_every_spread_on_a_page_is_measured(page):
    """The sign of a difference is free, because a text may turn it round: "falls by 3.2 ± 1.9"."""
    found = re.findall(r"\d+\.\d+ ± \d+\.\d+", one_line(PAGES[page]))
    assert len(found) >= 10
    unknown = set(found) - set(measured_spreads())
    assert not unknown


def test_rows_of_the_first_table_are_rows_of_the_demo():
    """All figures of a row, such as AUC and accuracy, belong to one row of demo.json."""
    rows = [re.findall(r"[\d.]+ ± [\d.]+", line) for line in README.split("\n## ")[0].replace("\xa0", " ").splitlines()
            if line.startswith("|") and "±" in line]
    measured = [{f"{100 * figure['mean']:.1f} ± {100 * figure['sd']:.1f}" for figure in row["figures"].values()
                 if figure["sd"] is not None} for row in results("demo")["rows"]]
    assert len(rows) == 4
    for row in rows:
        assert len(row) >= 2 and any(set(row) <= figures for figures in measured), row


@pytest.mark.parametrize("gain", GAINS, ids="-".join)
def test_gains_over_five_runs_and_their_intervals(gain):
    values = over_runs(*gain)
    half = 2.776 * values.std() / 5**0.5  # Student's t, 97.5 %, four degrees of freedom
    page = one_line(RESULTS)
    assert plus_minus(values) in page
    assert f"[{values.mean() - half:.1f}, {values.mean() + half:.1f}]" in page
