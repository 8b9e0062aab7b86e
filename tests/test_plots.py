"""The figures of the pages: every point is where its file says, and what is missing is not drawn."""

import json
import math
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from conftest import fit

import data
import evaluate
import models

pytest.importorskip("matplotlib")

from figures import plots  # noqa: E402

ROOT = Path(plots.__file__).parents[1]


def figure(mean, low, high):
    return {"auc": {"mean": mean, "sd": None, "low": low, "high": high},
            "accuracy": {"mean": mean - 0.1, "sd": 0.01, "low": low, "high": high}}


def row(title, *figures):
    return {"title": title, "arch": "alexnet", "runs": [title], "figures": figure(*figures)}


ROWS = [row("baseline", 0.9, 0.85, 0.95), row("one & only", 0.962, None, None), row("last", 0.7, 0.6, 0.8)]
GAINS = [{"title": "last", "minus": "baseline", "pairs": 2, "students": 3, "figures": figure(-0.2, -0.3, 0.0)}]


def drawn(ax):
    """Of every row its dot, and both ends of its interval."""
    dots = [line.get_xydata()[0].tolist() for line in ax.lines if line.get_marker() == "o"]
    intervals = [line.get_xydata().tolist() for line in ax.lines if line.get_marker() == "None" and len(
        set(line.get_ydata())) == 1]
    return dots, intervals


def type_in(monkeypatch, *words):
    """What `python figures/plots.py ...` does."""
    monkeypatch.setattr(sys, "argv", ["plots.py", *map(str, words)])
    runpy.run_path(str(ROOT / "figures/plots.py"), run_name="__main__")


def texts(path):
    return ["".join(shape.itertext()).strip() for shape in ElementTree.parse(path).iter() if shape.tag.endswith("}text")]


# ---- the table


def test_every_row_is_a_dot_within_its_interval():
    """null is not drawn."""
    auc, accuracy, gained, _ = plots.table({"rows": ROWS, "gains": GAINS}).axes
    dots, intervals = drawn(auc)
    assert dots == [[pytest.approx(90), 0], [pytest.approx(96.2), 1], [pytest.approx(70), 2]]
    assert [end[0] for end in intervals[0]] == pytest.approx([85, 95]) and intervals[0][0][1] == 0
    assert all(math.isnan(end[0]) for end in intervals[1])
    assert drawn(accuracy)[0][2] == [pytest.approx(60), 2]
    assert drawn(gained)[0] == [[pytest.approx(-20), 0]]
    bottom, top = auc.get_ylim()
    assert bottom > 2 and top < 0  # the first row stands on top


def test_only_gains_have_a_line_at_zero():
    """Without gains, there is one block."""
    def dotted(ax):
        return [line.get_xdata() for line in ax.lines if line.get_linestyle() == ":"]

    fig = plots.table({"rows": ROWS, "gains": GAINS})
    assert [dotted(ax) for ax in fig.axes] == [[], [], [[0, 0]], [[0, 0]]]
    assert [ax.get_title() for ax in fig.axes[2:]] == ["AUC, points gained", "accuracy, points gained"]
    assert [ax.get_title() for ax in plots.table({"rows": ROWS, "gains": []}).axes] == ["AUC, %", "accuracy, %"]


def test_no_line_runs_through_a_caption():
    nothing = [{**GAINS[0], "figures": figure(0.0, -0.1, 0.1)}]
    ax = plots.table({"rows": ROWS, "gains": nothing}).axes[2]
    [zero] = [line for line in ax.lines if line.get_linestyle() == ":"]
    [caption] = ax.texts
    assert caption.get_text() == "0.0" and caption.get_bbox_patch().get_facecolor()[:3] == (1, 1, 1)
    others = [line.get_zorder() for line in ax.lines if line is not zero]
    assert zero.get_zorder() < caption.get_zorder() < min(others)  # its white ground hides no dot


def test_a_picture_holds_its_text_as_text_and_no_date(monkeypatch):
    Path("all.json").write_text(json.dumps({"rows": ROWS, "gains": GAINS}))
    for name in ("one.svg", "two.svg"):
        type_in(monkeypatch, "table", "all.json", name)
    said = texts("one.svg")
    for words in ("one & only", "alexnet", "96.2", "minus baseline", "-20.0", "AUC, %"):
        assert words in said, words
    assert 'width="630pt"' in Path("one.svg").read_text()  # 840 pixels
    assert Path("one.svg").read_bytes() == Path("two.svg").read_bytes()
    assert "date" not in Path("one.svg").read_text()


@pytest.mark.parametrize("name, words", [
    ("teacher", "teacher"), ("student-T1", "student"), ("student-T4-alpha0.5-seed3", "student, T 4, alpha 0.5, seed 3"),
    ("baseline-all-labels", "baseline, all labels"), ("student-T1-20-images", "student, 20 images"),
    ("self-distilled", "self-distilled student"), ("self-20-labels", "self-distilled student, 20 labels"),
    ("moved-alone-10", "moved-alone-10"), ("teacher-resnet18", "teacher-resnet18")])
def test_names_of_run_folders_in_words(name, words):
    assert plots.in_words(name) == words
    assert words in plots.table({"rows": [row(name, 0.9, 0.8, 1.0)], "gains": []}).axes[0].get_yticklabels()[0].get_text()


# ---- AUC by multiply-adds


def test_costs_have_a_point_per_row_at_its_multiply_adds():
    """Rows of one network stand side by side around its multiply-adds, and its name in their folders does not make
    another kind of row. The rows may come from several files."""
    rows, runs = [], {}
    for title, arch, *auc in (("baseline", "small", 0.8, 0.7, 0.85), ("student-T4", "small", 0.9, 0.85, 0.95),
                              ("large-seed", "large", 0.95, 0.9, 1.0), ("baseline-large", "large", 0.7, 0.6, 0.8)):
        rows.append({**row(title, *auc), "arch": arch})
        runs[title] = {"cost": {"multiply_adds": {"small": 7e6, "large": 300e6}[arch]},
                       "config": {"role": "teacher" if title == "large-seed" else title[:8]}}
    others = {"rows": rows[3:], "runs": {"baseline-large": runs.pop("baseline-large")}}
    ax = plots.costs({"rows": rows[:3], "runs": runs}, others).axes[0]
    handles, kinds = ax.get_legend_handles_labels()
    assert kinds == ["baseline", "student, T 4", "teacher"] and ax.get_xscale() == "log"
    assert [*ax.get_xticks()] == [7, 300] and [t.get_text() for t in ax.get_xticklabels()] == ["7\nsmall", "300\nlarge"]
    points = [handle.lines[0].get_xydata().tolist() for handle in handles]
    half = 1.04**0.5
    assert points[0] == [pytest.approx([7 / half, 80]), pytest.approx([300 * half, 70])]
    assert points[1] == [pytest.approx([7 * half, 90])] and points[2] == [pytest.approx([300 / half, 95])]
    bars = handles[0].lines[2][0].get_segments()
    assert [bar[:, 1].tolist() for bar in bars] == [pytest.approx([70, 85]), pytest.approx([60, 80])]


@pytest.mark.parametrize("kind", ["table", "labels", "costs"])
def test_a_forgotten_output_overwrites_no_file_of_results(kind, monkeypatch, tmp_path):
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text('{"rows": [], "gains": [], "runs": {}}')
    with pytest.raises(SystemExit, match="Draw the figures"):
        type_in(monkeypatch, kind, tmp_path / "a.json", tmp_path / "b.json")
    assert (tmp_path / "b.json").read_text().startswith("{")


# ---- the curves


def history(folder, train, validation):
    Path(folder).mkdir(parents=True)
    lines = [f"{epoch},0.5,{a},{b}" for epoch, (a, b) in enumerate(zip(train, validation, strict=True), 1)]
    Path(folder, "history.csv").write_text("\n".join(["epoch,loss,train_accuracy,val_accuracy", *lines]) + "\n")


def test_seeds_share_a_panel():
    """Validation is solid, training dashed."""
    history("runs/demo/teacher", [0.5, 0.75], [0.6, 0.7])
    history("runs/demo/teacher-seed1", [0.25, 0.5, 1.0], [0.4, 0.8, 0.9])
    history("runs/demo/student-T1-seed10", [math.nan], [0.9])
    folders = ["runs/demo/teacher/", "runs/demo/student-T1-seed10", "runs/demo/teacher-seed1"]
    teacher, student = plots.curves(folders).axes
    assert [teacher.get_title(), student.get_title()] == ["teacher", "student-T1"]
    told = [(line.get_linestyle(), line.get_xdata().tolist(), line.get_ydata().tolist()) for line in teacher.lines]
    assert told == [("--", [1, 2], [50, 75]), ("-", [1, 2], [60, 70]),
                    ("--", [1, 2, 3], [25, 50, 100]), ("-", [1, 2, 3], [40, 80, 90])]
    dashed, solid = student.lines
    assert math.isnan(dashed.get_ydata()[0]) and solid.get_ydata().tolist() == [90]


def test_more_than_three_panels_go_below(monkeypatch):
    for name in "abcde":
        history(f"runs/{name}", [0.5, 0.75], [0.6, 0.7])
    type_in(monkeypatch, "curves", "curves.svg", *sorted(Path("runs").iterdir()))
    assert set("abcde") <= set(texts("curves.svg"))
    places = [ax.get_subplotspec().rowspan.start for ax in plots.curves(sorted(Path("runs").iterdir())).axes]
    assert places == [0, 0, 0, 1, 1]


# ---- the labels


def run(role, n, auc, teacher=None, alpha=0.9):
    figures = {"auc": auc, "accuracy": auc - 0.1}
    return {"config": {"role": role, "labels_per_class": n, "teacher": teacher, "alpha": alpha},
            "test": figures, "validation": {name: value + 0.01 for name, value in figures.items()}}


def points(ax):
    """{legend: [(place, mean, lower end, upper end), ...]}"""
    return {line.get_label(): [(*xy, segment[0][1], segment[1][1]) for xy, segment in zip(
        line[0].get_xydata().tolist(), line[2][0].get_segments(), strict=True)] for line in ax.containers}


SELF = "self-distilled student (teacher: the baseline)"
ALL, FEWER = (f"student, teacher trained on {which} labels" for which in ("all", "fewer"))


def test_points_are_means_with_students_intervals():
    runs = {f"b-seed{s}": run("baseline", 10, auc) for s, auc in enumerate((0.8, 0.9, 0.7))}
    runs["all"] = run("baseline", None, 0.95)  # a single seed has no bar
    [ax] = plots.labels({"runs": runs}).axes
    assert "AUC, %" in ax.get_title() and ax.get_xlabel() == "labels per class"
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["10", "all"]
    half = 4.303 * 10 / 3**0.5  # by hand: the deviation of 80, 90 and 70 is 10
    few, every = points(ax)["baseline"]
    assert few == pytest.approx((0, 80, 80 - half, 80 + half), abs=0.01)
    assert every == pytest.approx((1, 95, 95, 95))


@pytest.mark.parametrize("n", [3, 10, 11, 15, 40])
def test_t_holds_975_permille_of_its_density(n):
    t = np.linspace(-400, plots.T_975[n], 2_000_001)
    density = (1 + t**2 / (n - 1)) ** (-n / 2) * math.gamma(n / 2) / math.gamma((n - 1) / 2) / ((n - 1) * math.pi) ** 0.5
    assert density.sum() * (t[1] - t[0]) == pytest.approx(0.975, abs=2e-4)


def test_more_runs_than_the_table_of_t_are_drawn():
    runs = {f"b{s}": run("baseline", 10, 0.8 + 0.1 * (s % 2)) for s in range(2000)}
    [(_, mean, low, high)] = points(plots.labels({"runs": runs}).axes[0])["baseline"]
    assert (mean, high - low) == pytest.approx((85, 2 * 1.96 * 5 / 2000**0.5), rel=0.002)


def test_lines_are_named_by_their_teachers():
    runs = {
        "b10": run("baseline", 10, 0.7),
        "zero": run("student", 30, 0.71, ["elsewhere"], alpha=0),  # a baseline, by another name
        "t10": run("teacher", 10, 0.1), "t": run("teacher", None, 0.1),
        "same": run("student", 10, 0.8, ["t10/"]), "same-file": run("student", 10, 0.8, ["t10/best.pt"]),
        "all": run("student", 10, 0.9, ["t"]), "absent": run("student", 10, 0.9, ["runs/elsewhere"]),
        "all-labels": run("student", None, 0.95, ["t"]), "none": run("student", 0, 0.85, ["t"]),
        "self": run("student", 10, 0.6, ["b10"]),
    }
    [ax] = plots.labels({"runs": runs}).axes
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["0", "10", "30", "all"]
    rounded = {words: [(round(p), round(m)) for p, m, *_ in line] for words, line in points(ax).items()}
    assert rounded == {"baseline": [(1, 70), (2, 71)], ALL: [(0, 85), (1, 90), (3, 95)], FEWER: [(1, 80)],
                       SELF: [(1, 60)]}


def test_each_alpha_has_a_line_of_its_own_and_seven_differ():
    runs = {f"{a}": run("student", 10, a, ["t"], alpha=a) for a in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)}
    ax = plots.labels({"runs": runs}).axes[0]
    assert len(points(ax)) == 7 and f"{ALL}, alpha 0.5" in points(ax) and ALL in points(ax)
    assert len({(line[0].get_marker(), line[0].get_color()) for line in ax.containers}) == 7


def test_the_auc_of_findings_is_their_mean():
    runs = {"a": run("baseline", 10, 0.8)}
    runs["a"]["test"]["auc"] = [0.8, None, 0.9]
    assert points(plots.labels({"runs": runs}).axes[0])["baseline"][0][1] == pytest.approx(85)


def test_the_figure_of_labels_is_drawn_from_the_results(monkeypatch):
    type_in(monkeypatch, "labels", ROOT / "results/labels.json", "labels.svg")
    marks = [[float(shape.get(at)) for shape in ElementTree.parse(path).iter() if shape.tag.endswith("}use")
              for at in "xy"] for path in ("labels.svg", ROOT / "figures/labels.svg")]
    assert len(marks[0]) > 30 and marks[0] == pytest.approx(marks[1], abs=2)  # another matplotlib's margins
    assert texts("labels.svg") == texts(ROOT / "figures/labels.svg")


# ---- Grad-CAM


def tiles(fig):
    """The tiles of a picture, a list per row; a run's tile holds its image and its heat."""
    columns = fig.axes[0].get_gridspec().ncols
    return [fig.axes[i : i + columns] for i in range(0, len(fig.axes), columns)]


def shown(monkeypatch, classes, labels, runs, patients=None, **options):
    """Draw runs {name: probabilities}, and return the rows of the drawn images and the texts below their tiles."""
    labels, n = torch.tensor(labels), len(labels)
    images = torch.arange(n, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)  # each knows its own row
    test = SimpleNamespace(labels=labels, images=images, groups=patients or [*range(n)], ids=[f"{i}" for i in range(n)])
    loaded = SimpleNamespace(classes=classes, multilabel=labels.dim() == 2, test=test)
    monkeypatch.setattr(plots, "load", lambda name: (torch.nn.Linear(1, 1), loaded, np.array(runs[name])))
    monkeypatch.setattr(models, "grad_cam", lambda model, x, target: torch.zeros(len(x), 4, 4))
    fig = plots.cams([*runs], **options)
    rows = [] if fig is None else tiles(fig)
    return [row[0].images[0].get_array()[0, 0] for row in rows], [[ax.get_xlabel() for ax in row] for row in rows]


def both(*positive):
    return [[1 - p, p] for p in positive]


HALF = [0, 1] * 6


def test_mistakes_come_first_then_classes_in_turn(monkeypatch):
    """Healthy images are among both: a false alarm is a mistake like others."""
    first = both(0.4, 0.9, 0.8, 0.1, 0.3, 0.7, 0.2, 0.8, 0.1, 0.6, 0.45, 0.65)  # wrong of 2 and 3
    second = both(0.4, 0.9, 0.3, 0.6, 0.3, 0.7, 0.2, 0.8, 0.7, 0.05, 0.1, 0.9)  # wrong of 8 and 9
    rows, texts = shown(monkeypatch, ["normal", "ill"], HALF, {"a": first, "b": second})
    assert rows == [9, 3, 2] + [6, 1, 10]  # at most three mistakes, of four
    assert texts[:3] == [["ill", "ill 60 %", "normal 95 %"], ["ill", "normal 90 %", "ill 60 %"],
                         ["normal", "ill 80 %", "normal 70 %"]]
    assert shown(monkeypatch, ["normal", "ill"], HALF, {"b": second})[0] == [9, 8, 10, 1, 6, 11]


def test_without_mistakes_all_rows_are_right(monkeypatch):
    rows, _ = shown(monkeypatch, ["normal", "ill"], HALF, {"a": both(*[0.1, 0.9] * 6)})
    assert rows == [0, 1, 2, 3, 4, 5]


def test_a_patient_is_drawn_once(monkeypatch):
    p = both(0.9, 0.8, 0.4, 0.4, 0.1, 0.2, 0.3, 0.4)  # of class 0: two mistakes, six images called correctly
    rows, _ = shown(monkeypatch, ["normal", "ill"], [0] * 8, {"a": p}, patients=[*"AABCACCD"])
    assert rows == [0, 5, 2, 7]


def test_only_mistakes_are_drawn_on_request(monkeypatch, capsys):
    p = both(*[0.6, 0.9] * 10, *[0.7, 0.2] * 10)
    rows, _ = shown(monkeypatch, ["normal", "ill"], [0, 1] * 20, {"a": p}, only_mistakes=True)
    assert rows == [*range(21, 40, 2), 20, 22]  # 0.2 for an ill one is surer than 0.7 for a healthy one
    assert capsys.readouterr().out.count("\n") == 13
    right = both(*[0.1, 0.9] * 6)
    assert shown(monkeypatch, ["normal", "ill"], HALF, {"a": right}, only_mistakes=True) == ([], [])
    assert capsys.readouterr().out.count("\n") == 1


def test_the_target_is_the_first_finding(monkeypatch):
    labels = [[0.0, 1.0], [1.0, 1.0], [0.0, 0.0], [math.nan, 1.0]]
    p = [[0.9, 0.3], [0.2, 0.9], [0.9, 0.9], [0.1, 0.6]]
    rows, texts = shown(monkeypatch, ["MASS", "EDEMA"], labels, {"a": p})
    assert rows == [1, 0, 3]
    assert texts == [["MASS", "no MASS 80 %"], ["EDEMA", "no EDEMA 70 %"], ["EDEMA", "EDEMA 60 %"]]


def test_each_run_has_its_own_heat(few_phantoms):
    """The heat is that of the true class, on the run's own images; a contour is drawn where an opacity is."""
    sizes = {"a": 128, "b": 160}
    for seed, (name, size) in enumerate(sizes.items()):
        fit("--out", name, "--size", str(size), "--seed", str(seed))
    rows = tiles(plots.cams([*sizes]))
    for column, (name, size) in enumerate(sizes.items(), 1):
        test, model = data.load("phantoms", size, ("test",)).test, models.load_checkpoint(name)[0]
        for row in rows:
            grey, heat = (image.get_array() for image in row[column].images)
            i = next(j for j, image in enumerate(test.images) if (image[0].numpy() == grey).all())
            target = test.labels[i].item()
            assert row[0].get_xlabel() == ["NORMAL", "PNEUMONIA"][target] and len(row[0].collections) == target
            x = data.prepare(test.images[i : i + 1], torch.device("cpu"))
            assert np.allclose(heat, models.grad_cam(model, x, target)[0], atol=1e-4)
            assert np.allclose(row[column].images[1].get_alpha(), 0.6 * heat)
            p = evaluate.predict(model, models.from_images(test.images[i : i + 1], torch.device("cpu")), 1, "cpu").softmax(1)[0]
            assert row[column].get_xlabel().endswith(f" {100 * p.max():.0f} %")
    assert {row[0].get_xlabel() for row in rows} == {"NORMAL", "PNEUMONIA"}


def test_a_run_with_coarse_maps_counts_for_nothing(few_phantoms, monkeypatch, capsys):
    fit("--out", "fine", "--size", "128")
    fit("--out", "coarse", "--size", "48", "--seed", "1")
    said = []
    for out, runs in (("one.png", ["fine"]), ("two.png", ["fine", "coarse"]), ("none.png", ["coarse"])):
        capsys.readouterr()
        type_in(monkeypatch, "cams", out, *runs)
        said.append(capsys.readouterr().out.splitlines())
    assert "coarse" in said[1][0] and said[1][1:] == said[0] and said[2][0] == said[1][0] and len(said[2]) == 2
    assert Path("one.png").read_bytes() == Path("two.png").read_bytes() and not Path("none.png").exists()


def test_runs_on_other_images_are_not_mixed(few_phantoms, monkeypatch):
    fit("--out", "a", "--size", "128")
    with monkeypatch.context() as fewer:
        fewer.setitem(data.PHANTOMS, "test", (14, 13))
        fit("--out", "b", "--size", "128")
    real = plots.load
    monkeypatch.setattr(plots, "load", lambda folder: (
        data.PHANTOMS.update(test=(14 + 2 * (folder == "a"), 13)), real(folder))[1])
    with pytest.raises(data.UserError, match="different test images"):
        plots.cams(["a", "b"])


# ---- ROC curves


def write_predictions(folder, labels, logits, classes=("normal", "ill"), split=None):
    Path(folder).mkdir()
    p = torch.tensor(logits, dtype=torch.float64).softmax(1).tolist()
    more = [] if split is None else ["split"]
    rows = [[f"{i}.png", f"p{i}", k, *values, *([split[i]] if split else [])]
            for i, (k, values) in enumerate(zip(labels, p, strict=True))]
    evaluate.write_csv(Path(folder, "predictions.csv"), ["image", "patient", "label", *classes, *more], rows)


def test_the_legend_holds_the_auc_with_ties():
    """Above 37 the probability in float64 is 1: the order of such images must not be lost."""
    labels, margins = [0, 1, 0, 1, 1, 0, 1], [0.5, 0.5, -1.0, 40.0, 45.0, 42.0, -1.0]
    write_predictions("a", labels, [[0.0, m] for m in margins])
    pairs = [(p > n) + (p == n) / 2 for p, k in zip(margins, labels, strict=True) if k == 1
             for n, j in zip(margins, labels, strict=True) if j == 0]
    ax = plots.roc(["a"]).axes[0]
    assert ax.lines[0].get_label() == f"a, AUC {100 * np.mean(pairs):.1f} %"
    logits = torch.tensor([[0.0, m] for m in margins])
    assert evaluate.metrics(logits, torch.tensor(labels))["auc"] == pytest.approx(np.mean(pairs))
    curve = ax.lines[0].get_xydata().tolist()
    assert curve == [pytest.approx(point) for point in (
        (0, 0), (0, 1 / 4), (1 / 3, 1 / 4), (1 / 3, 1 / 2), (2 / 3, 3 / 4), (1, 1))]


def test_reliability_bins_are_those_by_hand():
    shares = [0.01, 0.05, 0.64, 0.68, 0.9, 0.95, 1.0]  # in bins 0, 0, 9, 10, 13, 14, 14
    write_predictions("a", [0, 1, 0, 1, 1, 1, 0], [[math.log(max(1 - p, 1e-320)), math.log(p)] for p in shares])
    points = plots.roc(["a"]).axes[1].lines[0].get_xydata()
    assert np.allclose(points, [[0.03, 0.5], [0.64, 0], [0.68, 1], [0.9, 1], [0.975, 0.5]])


def test_roc_leaves_out_validation_rows():
    logits = [[0.0, m] for m in (-1.0, 1.0, 2.0, -2.0)]
    write_predictions("a", [0, 1, 0, 1], logits, split=["test", "test", "validation", "validation"])
    assert plots.roc(["a"]).axes[0].lines[0].get_label() == "a, AUC 100.0 %"


def test_roc_refuses_in_one_line(monkeypatch):
    Path("empty").mkdir()
    write_predictions("three", [0, 1, 2], [[0.0, 1.0, 2.0]] * 3, classes="xyz")
    for folder, told in (("empty", "Run evaluate.py"), ("three", "two classes")):
        with pytest.raises(SystemExit, match=told) as end:
            type_in(monkeypatch, "roc", "roc.svg", folder)
        assert folder in end.value.code and "\n" not in end.value.code and not Path("roc.svg").exists()


# ---- the command line


@pytest.mark.parametrize("words", [["table", "absent.json", "x.svg"], ["curves", "x.svg", "absent"],
                                   ["mistakes", "x.svg", "absent"], ["roc", "x.svg", "absent"]])
def test_a_file_that_is_not_there_is_named_in_one_line(monkeypatch, words):
    with pytest.raises(SystemExit) as end:
        type_in(monkeypatch, *words)
    assert "absent" in end.value.code and "\n" not in end.value.code and not Path("x.svg").exists()


@pytest.mark.parametrize("words", [[], ["table", "one.json"], ["curves", "x.svg"], ["cams", "x.png"], ["roc"],
                                   ["plot", "one.json", "x.svg"]])
def test_an_incomplete_command_shows_all_six(monkeypatch, words):
    with pytest.raises(SystemExit, match="(?s)table .*curves .*labels .*cams .*mistakes .*roc "):
        type_in(monkeypatch, *words)
