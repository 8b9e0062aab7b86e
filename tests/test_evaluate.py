"""Figures against brute force, closed forms and committed values of scikit-learn 1.7 on the same inputs."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import fit

import data
import evaluate
import models
from evaluate import auc, bootstrap_weights, calibration_error, interval, measure, metrics, report

LOGITS = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 1.5], [0.5, 0.0], [0.0, 2.0], [1.0, 0.0], [0.0, 0.5]])
LABELS = torch.tensor([0, 1, 0, 1, 1, 0, 1])  # called 0 1 1 0 1 0 1: tn 2, fp 1, fn 1, tp 3


def ones(n):
    return torch.ones(1, n, dtype=torch.float64)


def test_binary_figures_are_the_fractions_counted_by_hand():
    m = metrics(LOGITS, LABELS, ["NORMAL", "PNEUMONIA"])
    assert m["confusion"] == [[2, 1], [1, 3]]
    wanted = {"accuracy": 5 / 7, "specificity": 2 / 3, "sensitivity": 3 / 4, "precision": 3 / 4, "f1": 3 / 4}
    for name, value in wanted.items():
        assert m[name] == pytest.approx(value, abs=1e-12), name
    # logit margins of positives 1, -.5, 2, .5 against negatives -2, .5, -1: 10 wins, 1 tie, 1 loss
    assert m["auc"] == pytest.approx(10.5 / 12, abs=1e-12)


def test_accuracy_is_right_calls_over_all_films_for_any_threshold():
    logits, labels = torch.randn(101, 2), torch.randint(2, (101,))
    for threshold in (0.1, 0.5, 0.9):
        m = metrics(logits, labels, ["a", "b"], threshold)
        (tn, fp), (fn, tp) = m["confusion"]
        assert tn + fp + fn + tp == 101 and m["accuracy"] == pytest.approx((tp + tn) / 101, abs=1e-12)
        assert m["sensitivity"] == pytest.approx(tp / (tp + fn)) and m["specificity"] == pytest.approx(
            tn / (tn + fp)
        )


def test_auc_is_the_share_of_pairs_won_with_ties_counted_half_and_weights_as_copies():
    for _ in range(5):
        scores, truth = torch.randint(6, (60,)).double(), torch.randint(2, (60,))
        copies = torch.randint(0, 3, (60,))
        copied = scores.repeat_interleave(copies), truth.repeat_interleave(copies)
        pairs = [(a, b) for a in copied[0][copied[1] == 1] for b in copied[0][copied[1] == 0]]
        brute = sum(bool(a > b) + bool(a == b) / 2 for a, b in pairs) / len(pairs)
        assert auc(scores, truth, copies[None].double()).item() == pytest.approx(float(brute), abs=1e-12)


def test_auc_of_a_single_class_is_not_a_number():
    assert math.isnan(auc(torch.rand(5), torch.ones(5), ones(5)).item())


def test_calibration_error_is_zero_for_a_calibrated_toy_and_the_gap_for_an_overconfident_one():
    confidence, right = torch.full((10,), 0.7, dtype=torch.float64), torch.tensor([True] * 7 + [False] * 3)
    assert calibration_error(confidence, right, ones(10)).item() == pytest.approx(0, abs=1e-12)
    sure = torch.full((10,), 0.99, dtype=torch.float64)
    assert calibration_error(sure, right, ones(10)).item() == pytest.approx(0.29, abs=1e-9)


def test_calibration_error_agrees_with_a_loop_over_bins():
    confidence, right = torch.rand(200).double() / 2 + 0.5, torch.rand(200) < 0.8
    brute = 0.0
    for b in range(15):
        inside = (confidence * 15).long().clamp(max=14) == b
        if inside.any():
            gap = confidence[inside].mean() - right[inside].double().mean()
            brute += abs(gap.item()) * inside.double().mean().item()
    assert calibration_error(confidence, right, ones(200)).item() == pytest.approx(brute, abs=1e-12)


def test_three_class_figures_are_macro_means_of_each_class_against_the_rest():
    logits, labels = torch.randn(90, 3), torch.randint(3, (90,))
    m, called = metrics(logits, labels, ["a", "b", "c"]), logits.argmax(1)
    assert m["accuracy"] == pytest.approx((called == labels).double().mean().item())
    recalls = [(called[labels == c] == c).double().mean().item() for c in range(3)]
    specs = [(called[labels != c] != c).double().mean().item() for c in range(3)]
    assert m["sensitivity"] == pytest.approx(sum(recalls) / 3) and m["specificity"] == pytest.approx(
        sum(specs) / 3
    )
    assert m["confusion"] == [
        [((labels == i) & (called == j)).sum().item() for j in range(3)] for i in range(3)
    ]


def test_several_findings_have_one_value_each_and_unknown_labels_count_for_nothing():
    logits, labels = torch.randn(50, 3), torch.randint(2, (50, 3)).float()
    labels[:10, 1] = math.nan
    m = metrics(logits, labels, ["a", "b", "c"])
    for k, rows in ((0, slice(None)), (1, slice(10, None))):
        z = torch.stack([torch.zeros(50), logits[:, k]], 1)[rows]
        alone = metrics(z, labels[rows, k].long(), ["no", "yes"])
        for name in evaluate.NAMES:
            assert m[name][k] == pytest.approx(alone[name], abs=1e-9), name
        assert m["confusion"][k] == alone["confusion"]


def test_the_loss_is_the_mean_surprise_at_the_truth():
    z, labels = torch.tensor([[0.0, 0.0], [0.0, math.log(3)]]), torch.tensor([1, 0])  # told 1/2 and 1/4
    assert metrics(z, labels, ["a", "b"])["loss"] == pytest.approx(1.5 * math.log(2), abs=1e-7)
    weights = torch.tensor([[3.0, 1.0]])
    assert measure(z, labels, weights)["loss"].item() == pytest.approx(1.25 * math.log(2), abs=1e-7)


def test_logits_that_are_not_finite_are_refused():
    with pytest.raises(data.UserError, match="diverged"):
        metrics(torch.tensor([[math.nan, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]), ["a", "b"])


# ---- intervals


def test_a_bootstrap_sample_of_figures_is_the_figures_of_the_sample():
    groups = [f"p{i // 2}" for i in range(40)]
    logits, labels = torch.randn(40, 2), torch.arange(40) % 2
    weights = bootstrap_weights(groups, repeats=5)
    samples = measure(logits, labels, weights)
    for r in range(5):
        rows = torch.arange(40).repeat_interleave(weights[r].long())
        again = metrics(logits[rows], labels[rows], ["a", "b"])
        for name in evaluate.NAMES:
            assert samples[name][r].item() == pytest.approx(again[name], abs=1e-9), name


def test_patients_are_drawn_whole():
    groups = ["a", "b", "a", "c", "b", "a"]
    weights = bootstrap_weights(groups, repeats=200)
    assert torch.equal(weights[:, 0], weights[:, 2]) and torch.equal(weights[:, 0], weights[:, 5])
    assert ((weights[:, 0] + weights[:, 1] + weights[:, 3]) == 3).all()
    assert torch.equal(weights, bootstrap_weights(groups, repeats=200))


def test_the_interval_of_an_accuracy_is_close_to_the_normal_one_and_wider_when_films_share_patients():
    n = 400
    labels = torch.arange(n) % 2
    right = torch.arange(n) % 5 != 0  # 80 %, the same for both films of a pair below
    logits = torch.stack([torch.zeros(n), (labels * 2.0 - 1) * (right * 2.0 - 1)], 1)
    alone = measure(logits, labels, bootstrap_weights(range(n)))["accuracy"]
    low, high = interval(alone).tolist()
    half = 1.96 * (0.8 * 0.2 / n) ** 0.5
    assert low == pytest.approx(0.8 - half, abs=0.012) and high == pytest.approx(0.8 + half, abs=0.012)
    pairs = measure(
        logits, labels, bootstrap_weights([i // 10 % 40 if r else i % 5 + 100 for i, r in enumerate(right)])
    )
    wide = interval(pairs["accuracy"]).tolist()
    assert wide[1] - wide[0] > 1.5 * (high - low)


def test_the_threshold_is_the_one_with_the_best_sensitivity_plus_specificity():
    scores = torch.tensor([0.1, 0.2, 0.3, 0.35, 0.6, 0.8], dtype=torch.float64)
    logits, labels = (
        torch.stack([torch.zeros(6).double(), scores.logit()], 1),
        torch.tensor([0, 0, 0, 1, 1, 1]),
    )
    assert evaluate.youden_threshold(logits, labels) == pytest.approx(0.325)
    undecided = torch.tensor([[0.0, 0.0], [0.0, 1.0]])  # a score of exactly 0.5 is no call at 0.5
    assert evaluate.youden_threshold(undecided, torch.tensor([0, 1])) == 0.5


# ---- the report


def test_the_report_is_the_one_scikit_learn_prints():
    text = report([[2, 1], [1, 3]], ["NORMAL", "PNEUMONIA"])
    assert text == (
        "              precision    recall  f1-score   support\n\n"
        "      NORMAL       0.67      0.67      0.67         3\n"
        "   PNEUMONIA       0.75      0.75      0.75         4\n\n"
        "    accuracy                           0.71         7\n"
        "   macro avg       0.71      0.71      0.71         7\n"
        "weighted avg       0.71      0.71      0.71         7\n"
    )


# ---- runs


@pytest.fixture
def three_runs(few_phantoms):
    fit("--out", "runs/teacher")
    fit("--out", "runs/baseline", role="baseline")
    fit("--out", "runs/student", "--teacher", "runs/teacher", role="student")
    return ["runs/teacher", "runs/baseline", "runs/student"]


def test_one_table_holds_the_floor_the_three_runs_their_agreement_and_the_paired_difference(
    three_runs, capsys
):
    capsys.readouterr()
    evaluate.main([*three_runs, "--json", "all.json"])
    text = capsys.readouterr().out
    kept = json.loads(open("all.json").read())
    assert set(kept["runs"]) == set(three_runs)
    assert text.startswith("\n".join(kept["tables"]) + "\n\nruns/teacher: best on")  # all but the reports
    evaluate.main(["all.json"])
    assert capsys.readouterr().out == "\n".join(kept["tables"]) + "\n"
    for wanted in ("| always NORMAL ", "| teacher (squeezenet1_1) ", "| baseline (", "| student (",
                   "student (squeezenet1_1) makes its teacher's call on", "16 test films",
                   "student (squeezenet1_1) minus baseline",
                   "at the threshold best on validation", "weighted avg", "confusion"):  # fmt: skip
        assert wanted in text, wanted
    for folder in three_runs:
        stored = json.loads((data.Path(folder) / "metrics.json").read_text())
        at = stored["test"]["0.5"]
        (tn, fp), (fn, tp) = at["confusion"]
        assert tn + fp == fn + tp == 8 and at["accuracy"] == pytest.approx((tp + tn) / 16)
        low, high = at["interval"]["accuracy"]
        assert low <= at["accuracy"] <= high
        assert f"| {100 * at['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]" in text
        assert stored["trained_by"]["commit"] and stored["args"]["seed"] == 0
    student, teacher = (models.load_checkpoint(run)[0] for run in ("runs/student", "runs/teacher"))
    with torch.no_grad():
        x = data.prepare(data.load("phantoms", 32, ("test",)).test.images, torch.device("cpu"))
        same = student(x).argmax(1) == teacher(x).argmax(1)
    assert stored["agreement_with_teacher"] == pytest.approx(same.double().mean().item())


def test_a_student_agrees_with_the_teacher_it_had_and_not_with_one_that_took_its_place(three_runs, capsys):
    model, facts = models.load_checkpoint("runs/teacher")
    models.save_checkpoint("runs/teacher/best.pt", model, **{**facts, "epoch": 7})
    capsys.readouterr()
    evaluate.main(three_runs)
    assert "makes its teacher's call" not in capsys.readouterr().out
    assert json.loads(open("runs/student/metrics.json").read())["agreement_with_teacher"] is None


def test_a_run_given_twice_is_not_two_seeds(three_runs):
    for twice in (["runs/teacher", "runs/teacher"], ["runs/teacher/best.pt", "runs/teacher/last.pt"]):
        with pytest.raises(data.UserError, match="every run once needed, found one twice"):
            evaluate.main(twice)


def test_what_is_no_number_is_null_in_the_files(tmp_path):
    evaluate.write_json("a.json", {"auc": [0.5, math.nan], "name": "NaN"})
    assert "NaN" not in open("a.json").read().replace('"NaN"', "")
    assert json.loads(open("a.json").read()) == {"auc": [0.5, None], "name": "NaN"}


def test_runs_that_differ_in_their_seed_share_a_row_of_their_mean_and_deviation(few_phantoms, capsys):
    runs = [fit("--lr", "0.03", "--epochs", "6", "--seed", seed, role="baseline").out for seed in "01"]
    capsys.readouterr()
    evaluate.main(runs)
    text = capsys.readouterr().out.partition("| at the threshold best on validation")
    stored = [json.loads((data.Path(run) / "metrics.json").read_text())["test"] for run in runs]
    assert stored[0]["0.5"]["accuracy"] != stored[1]["0.5"]["accuracy"]
    for at, table in (("0.5", text[0]), ("validation", text[2])):
        [row] = [line for line in table.splitlines() if ", 2 seeds) " in line]
        values = 100 * torch.tensor([figures[at]["accuracy"] for figures in stored])
        assert f"| {values.mean():.1f} ± {values.std():.1f} [" in row, (at, row)
    assert stored[0]["0.5"]["accuracy"] != stored[0]["validation"]["accuracy"]


def test_evaluating_writes_nothing_but_the_metrics(few_phantoms):
    args = fit()
    before = {p.name: p.read_bytes() for p in data.Path(args.out).iterdir()}
    evaluate.main([args.out])
    after = {p.name: p.read_bytes() for p in data.Path(args.out).iterdir()}
    assert after.pop("metrics.json") and after == before


def test_runs_of_other_films_or_classes_do_not_share_a_table(few_phantoms, kermany):
    phantoms = fit()
    films = fit("--data", str(kermany), "--recipe", "scratch")
    three = fit("--data", str(kermany), "--recipe", "scratch", "--classes", "3")
    for pair in ([phantoms.out, films.out], [films.out, three.out]):
        with pytest.raises(data.UserError, match="one set of test films and classes"):
            evaluate.main(pair)


def test_a_run_is_not_judged_on_patients_that_it_was_trained_on(kermany):
    args = fit("--data", str(kermany), "--recipe", "scratch")
    for film in (kermany / "train/NORMAL").glob("IM-*.jpeg"):
        (kermany / "test/NORMAL" / film.name).write_bytes(film.read_bytes())
    with pytest.raises(data.UserError, match="patients that it or its student is to be judged by"):
        evaluate.main([args.out])


def test_a_student_is_not_judged_on_patients_that_its_teacher_was_trained_on(few_phantoms):
    fit("--out", "t")
    model, facts = models.load_checkpoint("t")
    models.save_checkpoint("t/best.pt", model, **{**facts, "train_groups": ["phantom-test-3"]})
    fit("--out", "s", "--teacher", "t", role="student")
    with pytest.raises(data.UserError, match="t was trained on 1 of the patients.*phantom-test-3"):
        evaluate.main(["s"])


def test_classes_other_than_those_of_training_are_refused(kermany, few_phantoms):
    args = fit()
    (kermany / "train/PNEUMONIA").rename(kermany / "train/COVID")
    (kermany / "test/PNEUMONIA").rename(kermany / "test/COVID")
    (kermany / "val/PNEUMONIA").rename(kermany / "val/COVID")
    with pytest.raises(data.UserError, match="'PNEUMONIA'.*'COVID'"):
        evaluate.main([args.out, "--data", str(kermany)])


# ---- taken away


def test_an_exported_run_needs_torch_alone_and_says_what_the_run_says(few_phantoms, capsys):
    args = fit("--out", "student")
    evaluate.main(["student", "--export", "student.pt2"])
    assert "exported student to student.pt2" in capsys.readouterr().out
    films = data.phantoms(7, args.size, seed=5)[0]
    torch.save(films, "films.pt")
    alone = """
import json, sys, torch
about = {"about.json": ""}
student = torch.export.load("student.pt2", extra_files=about).module()
films = torch.load("films.pt")
torch.save([student(films), student(films[:1]), json.loads(about["about.json"])], "said.pt")
assert not {"torchvision", "models", "data"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", alone], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    seven, one, about = torch.load("said.pt")
    model, facts = models.load_checkpoint("student")
    with torch.no_grad():
        logits = models.forward(model, data.prepare(films, torch.device("cpu")))[0]
    assert (seven - logits).abs().max() < 1e-5 and (one - logits[:1]).abs().max() < 1e-5
    assert about["classes"] == facts["classes"] and str(args.size) in about["films"]
    stored = json.loads(open("student/metrics.json").read())["test"]["validation"]["threshold"]
    assert about["threshold"] == stored and about["commit"] and about["probabilities"].startswith("softmax")


def test_a_file_without_tables_is_refused(tmp_path):
    for text in ("no json", "[1]", "{}", '{"tables": 5}'):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(data.UserError, match="tables needed in other.json, found none"):
            evaluate.main(["other.json"])


@pytest.mark.parametrize("line, says", [
    ("a b --export x.pt2", "--export takes one run"),
    ("kept.json runs/a", "only shown again"),
    ("kept.json --json b.json", "only shown again"),
    ("kept.json --data films", "only shown again"),
    ("a --image film.png --json b.json", "judges nothing"),
])  # fmt: skip
def test_flags_that_would_be_ignored_are_refused(line, says, capsys):
    with pytest.raises(SystemExit) as end:
        evaluate.get_args(line.split())
    assert end.value.code == 2 and says in capsys.readouterr().err


@pytest.mark.parametrize("arch, size", [("googlenet", 64), ("shufflenet_v2_x0_5", 32)])
def test_networks_of_every_kind_can_be_exported_for_any_number_of_films(arch, size):
    model = models.build(arch, 3, size).requires_grad_(False).eval()
    model.facts["input"] = "residual"
    program, films = models.exported(model, size).module(), data.phantoms(3, size, seed=1)[0]
    for some in (films, films[:1]):
        says = models.forward(model, data.prepare(some, torch.device("cpu")))[0]
        assert (program(some) - says).abs().max() < 1e-5


def test_a_network_that_cannot_be_exported_is_refused_in_one_line():
    class Fickle(torch.nn.Module):
        def forward(self, x):
            return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))

    with pytest.raises(data.UserError, match="torch.export can follow"):
        models.exported(torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), Fickle()), 8)
