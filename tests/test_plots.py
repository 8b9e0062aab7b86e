"""The figures of the pages: every point is where its file says, and what is missing is not drawn."""

import json
import math
import runpy
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib")

from figures import plots  # noqa: E402

ROOT = Path(plots.__file__).parents[1]


def figure(mean, low, high):
    return {"auc": {"mean": mean, "sd": None, "low": low, "high": high},
            "accuracy": {"mean": mean - 0.1, "sd": 0.01, "low": low, "high": high}}  # fmt: skip


def row(title, *figures):
    return {"title": title, "arch": "alexnet", "runs": [title], "figures": figure(*figures)}


ROWS = [row("baseline", 0.9, 0.85, 0.95), row("one & only", 0.962, None, None), row("last", 0.7, 0.6, 0.8)]
GAINS = [{"title": "last", "minus": "baseline", "pairs": 2, "students": 3, "figures": figure(-0.2, -0.3, 0.0)}]


def drawn(ax):
    """Of every row its dot, and both ends of its interval."""
    dots = [line.get_xydata()[0].tolist() for line in ax.lines if line.get_marker() == "o"]
    intervals = [line.get_xydata().tolist() for line in ax.lines if line.get_marker() == "None" and len(
        set(line.get_ydata())) == 1]  # fmt: skip
    return dots, intervals


def type_in(monkeypatch, *words):
    """What `python figures/plots.py ...` does."""
    monkeypatch.setattr(sys, "argv", ["plots.py", *map(str, words)])
    runpy.run_path(str(ROOT / "figures/plots.py"), run_name="__main__")


def texts(path):
    return ["".join(shape.itertext()).strip() for shape in ElementTree.parse(path).iter() if shape.tag.endswith("}text")]


# ---- the table


def test_every_row_is_a_dot_within_its_interval_and_null_is_not_drawn():
    auc, accuracy, gained, _ = plots.table({"rows": ROWS, "gains": GAINS}).axes
    dots, intervals = drawn(auc)
    assert dots == [[pytest.approx(90), 0], [pytest.approx(96.2), 1], [pytest.approx(70), 2]]
    assert [end[0] for end in intervals[0]] == pytest.approx([85, 95]) and intervals[0][0][1] == 0
    assert all(math.isnan(end[0]) for end in intervals[1])
    assert drawn(accuracy)[0][2] == [pytest.approx(60), 2]
    assert drawn(gained)[0] == [[pytest.approx(-20), 0]]
    bottom, top = auc.get_ylim()
    assert bottom > 2 and top < 0  # the first row stands on top


def test_the_gains_alone_have_a_line_of_no_change_and_without_gains_there_is_one_block():
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
    assert Path("one.svg").read_bytes() == Path("two.svg").read_bytes()
    assert "date" not in Path("one.svg").read_text()


# ---- the curves


def history(folder, train, validation):
    Path(folder).mkdir(parents=True)
    lines = [f"{epoch},0.5,{a},{b}" for epoch, (a, b) in enumerate(zip(train, validation, strict=True), 1)]
    Path(folder, "history.csv").write_text("\n".join(["epoch,loss,train_accuracy,val_accuracy", *lines]) + "\n")


def test_seeds_share_a_panel_with_validation_solid_and_training_dashed():
    history("runs/demo/teacher", [0.5, 0.75], [0.6, 0.7])
    history("runs/demo/teacher-seed1", [0.25, 0.5, 1.0], [0.4, 0.8, 0.9])
    history("runs/demo/student-T1-seed10", [math.nan], [0.9])
    folders = ["runs/demo/teacher/", "runs/demo/student-T1-seed10", "runs/demo/teacher-seed1"]
    teacher, student = plots.curves(folders).axes
    assert [teacher.get_title(), student.get_title()] == ["teacher", "student-T1"]
    told = [(line.get_linestyle(), line.get_xdata().tolist(), line.get_ydata().tolist()) for line in teacher.lines]
    assert told == [("--", [1, 2], [50, 75]), ("-", [1, 2], [60, 70]),
                    ("--", [1, 2, 3], [25, 50, 100]), ("-", [1, 2, 3], [40, 80, 90])]  # fmt: skip
    dashed, solid = student.lines
    assert math.isnan(dashed.get_ydata()[0]) and solid.get_ydata().tolist() == [90]


def test_more_than_three_rows_go_below_and_every_one_has_a_panel(monkeypatch):
    for name in "abcde":
        history(f"runs/{name}", [0.5, 0.75], [0.6, 0.7])
    type_in(monkeypatch, "curves", "curves.svg", *sorted(Path("runs").iterdir()))
    assert set("abcde") <= set(texts("curves.svg"))
    places = [ax.get_subplotspec().rowspan.start for ax in plots.curves(sorted(Path("runs").iterdir())).axes]
    assert places == [0, 0, 0, 1, 1]


# ---- the labels


def run(role, n, auc, teacher=None, alpha=0.9):
    figures = {"auc": auc, "accuracy": auc - 0.1}
    return {"args": {"role": role, "labels_per_class": n, "teacher": teacher, "alpha": alpha},
            "test": figures, "validation": {name: value + 0.01 for name, value in figures.items()}}  # fmt: skip


def points(ax):
    """{legend: [(place, mean, lower end, upper end), ...]}"""
    return {line.get_label(): [(*xy, segment[0][1], segment[1][1]) for xy, segment in zip(
        line[0].get_xydata().tolist(), line[2][0].get_segments(), strict=True)] for line in ax.containers}  # fmt: skip


ALONE = "on those labels alone"
ALL, SAME = (f"with a teacher of {which} labels, alpha 0.9" for which in ("all", "the same"))


def test_a_point_is_the_mean_over_seeds_and_its_bar_students_interval_of_that_mean():
    runs = {f"alone-seed{s}": run("baseline", 10, auc) for s, auc in enumerate((0.8, 0.9, 0.7))}
    runs["all"] = run("baseline", None, 0.95)  # a single seed has no bar
    axes = plots.labels({"runs": runs}).axes
    assert [ax.get_title() for ax in axes] == ["AUC, % (validation)", "AUC, % (test)", "accuracy, % (validation)",
                                               "accuracy, % (test)"]  # fmt: skip
    assert [tick.get_text() for tick in axes[1].get_xticklabels()] == ["10", "all"]
    half = 4.303 * 10 / 3**0.5  # by hand: the deviation of 80, 90 and 70 is 10
    few, every = points(axes[1])[ALONE]
    assert few == pytest.approx((0, 80, 80 - half, 80 + half), abs=0.01)
    assert every == pytest.approx((1, 95, 95, 95))
    assert [points(ax)[ALONE][0][1] for ax in axes] == pytest.approx([81, 80, 71, 70])


def test_a_line_is_told_by_who_taught_its_runs():
    runs = {
        "alone": run("baseline", 10, 0.7),
        "zero": run("student", 30, 0.71, ["elsewhere"], alpha=0),  # a baseline, by another name
        "t10": run("teacher", 10, 0.1), "t": run("teacher", None, 0.1),
        "same": run("student", 10, 0.8, ["t10/"]), "same-file": run("student", 10, 0.8, ["t10/best.pt"]),
        "all": run("student", 10, 0.9, ["t"]), "absent": run("student", 10, 0.9, ["runs/elsewhere"]),
        "all-labels": run("student", None, 0.95, ["t"]), "none": run("student", 0, 0.85, ["t"]),
    }  # fmt: skip
    ax = plots.labels({"runs": runs}).axes[1]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["0", "10", "30", "all"]
    rounded = {words: [(round(p), round(m)) for p, m, *_ in line] for words, line in points(ax).items()}
    assert rounded == {ALONE: [(1, 70), (2, 71)], ALL: [(0, 85), (1, 90), (3, 95)], SAME: [(1, 80)]}


def test_students_of_another_alpha_have_a_line_of_their_own():
    runs = {"a": run("student", 10, 0.8, ["t"]), "b": run("student", 10, 0.9, ["t"], alpha=1.0)}
    assert len(points(plots.labels({"runs": runs}).axes[0])) == 2


def test_the_figure_of_labels_is_drawn_from_the_results(monkeypatch):
    type_in(monkeypatch, "labels", ROOT / "results/labels.json", "labels.svg")
    marks = [[float(shape.get(at)) for shape in ElementTree.parse(path).iter() if shape.tag.endswith("}use")
              for at in "xy"] for path in ("labels.svg", ROOT / "figures/labels.svg")]  # fmt: skip
    assert len(marks[0]) > 80 and marks[0] == pytest.approx(marks[1], abs=2)  # another matplotlib's margins
    assert texts("labels.svg") == texts(ROOT / "figures/labels.svg")


# ---- the command line


@pytest.mark.parametrize("words", [["table", "absent.json", "x.svg"], ["curves", "x.svg", "absent"]])
def test_a_file_that_is_not_there_is_named_in_one_line(monkeypatch, words):
    with pytest.raises(SystemExit) as end:
        type_in(monkeypatch, *words)
    assert "absent" in end.value.code and "\n" not in end.value.code and not Path("x.svg").exists()


@pytest.mark.parametrize("words", [[], ["table", "one.json"], ["curves", "x.svg"], ["plot", "one.json", "x.svg"]])
def test_a_command_that_lacks_something_shows_the_three_there_are(monkeypatch, words):
    with pytest.raises(SystemExit, match="plots.py table .*\n.*plots.py curves .*\n.*plots.py labels"):
        type_in(monkeypatch, *words)
