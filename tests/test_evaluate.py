"""Figures against brute force, closed forms and committed values of scikit-learn 1.7 on the same inputs."""

import csv
import json
import math
import random
import re
import shutil
from decimal import Decimal, localcontext
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
from conftest import fit, image_file

import data
import evaluate
import models
import train
from evaluate import (
    auc,
    bootstrap_weights,
    calibration_error,
    cell,
    comparable,
    interval,
    measure,
    metrics,
    over_seeds,
    report,
    tables,
    variants,
)

NAMES = evaluate.COLUMNS + evaluate.MORE

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


def test_accuracy_is_right_calls_over_all_images():
    logits, labels = torch.randn(101, 2), torch.randint(2, (101,))
    m = metrics(logits, labels, ["a", "b"])
    (tn, fp), (fn, tp) = m["confusion"]
    assert tn + fp + fn + tp == 101 and m["accuracy"] == pytest.approx((tp + tn) / 101, abs=1e-12)
    assert m["sensitivity"] == pytest.approx(tp / (tp + fn)) and m["specificity"] == pytest.approx(tn / (tn + fp))


def test_a_network_is_asked_about_every_row_once_and_in_order():
    model = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(4, 2)).train()
    rows = torch.randn(131, 4)  # more than two batches, the last of them short
    said = evaluate.predict(model, rows, torch.device("cpu"))
    assert said.shape == (131, 2) and torch.allclose(said, model[1](rows), atol=1e-6)


def test_auc_is_the_share_of_pairs_won_with_ties_counted_half_and_weights_as_copies():
    for _ in range(5):
        scores, truth = torch.randint(6, (60,)).double(), torch.randint(2, (60,))
        copies = torch.randint(0, 3, (60,))
        copied = scores.repeat_interleave(copies), truth.repeat_interleave(copies)
        pairs = [(a, b) for a in copied[0][copied[1] == 1] for b in copied[0][copied[1] == 0]]
        brute = sum(bool(a > b) + bool(a == b) / 2 for a, b in pairs) / len(pairs)
        assert auc(scores, truth, copies[None].double()).item() == pytest.approx(float(brute), abs=1e-12)


def test_images_of_which_a_network_is_very_sure_are_ranked_and_do_not_tie():
    margins = torch.tensor([38.0, 39.0, 41.0, 45.0, 60.0, 80.0])  # each rounds to a probability of 1
    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    assert (margins.double().sigmoid() == 1).sum() >= 5
    logits = torch.stack([torch.zeros(6), margins], 1)
    assert metrics(logits, labels, ["a", "b"])["auc"] == pytest.approx(6 / 9)  # 39 beats 38; 45 two; 80 three
    assert metrics(-logits, labels, ["a", "b"])["auc"] == pytest.approx(3 / 9)


def test_three_classes_of_which_a_network_is_very_sure_are_ranked_as_exact_arithmetic_ranks_them():
    logits = 30 * torch.randn(40, 3)
    logits[:, 1] += 60  # the class that nearly every image is called
    labels = torch.randint(3, (40,))
    assert (logits.double().softmax(1) == 1).sum() > 5
    with localcontext() as context:
        context.prec = 120
        odds = []
        for row in logits.tolist():
            e = [Decimal(z).exp() for z in row]
            odds.append([e[k] / (sum(e) - e[k]) for k in range(3)])
    brute = 0.0
    for k in range(3):
        yes, no = ([o[k] for o, y in zip(odds, labels.tolist(), strict=True) if (y == k) is t] for t in (True, False))
        brute += sum((a > b) + (a == b) / 2 for a in yes for b in no) / (len(yes) * len(no)) / 3
    assert metrics(logits, labels, ["a", "b", "c"])["auc"] == pytest.approx(brute, abs=1e-12)


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
        for name in NAMES:
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
    assert weights.shape == (6, 40) and (weights[0] == 1).all()  # first the images themselves
    for r in range(6):
        rows = torch.arange(40).repeat_interleave(weights[r].long())
        again = metrics(logits[rows], labels[rows], ["a", "b"])
        for name in NAMES:
            assert samples[name][r].item() == pytest.approx(again[name], abs=1e-9), name


def test_patients_are_drawn_whole():
    groups = ["a", "b", "a", "c", "b", "a"]
    weights = bootstrap_weights(groups, repeats=200)
    assert torch.equal(weights[:, 0], weights[:, 2]) and torch.equal(weights[:, 0], weights[:, 5])
    assert ((weights[:, 0] + weights[:, 1] + weights[:, 3]) == 3).all()
    assert torch.equal(weights, bootstrap_weights(groups, repeats=200))


def test_an_interval_is_the_middle_95_percent_of_its_samples():
    uniform = torch.arange(1001)[torch.randperm(1001)] / 1000  # whose quantiles are known
    assert interval(uniform).tolist() == pytest.approx([0.025, 0.975], abs=1e-6)
    normal = torch.distributions.Normal(3.0, 2.0).icdf((torch.arange(20000) + 0.5).double() / 20000)
    assert interval(normal).tolist() == pytest.approx([3 - 1.95996 * 2, 3 + 1.95996 * 2], abs=2e-3)
    with_gaps = torch.cat([uniform, torch.full((500,), math.nan)])  # samples of one class
    assert interval(with_gaps).tolist() == pytest.approx([0.025, 0.975], abs=1e-6)
    two = interval(torch.stack([uniform, 2 * uniform], 1))  # a column a finding
    assert torch.allclose(two, torch.tensor([[0.025, 0.05], [0.975, 1.95]]).double(), atol=1e-6)


def test_the_interval_of_an_accuracy_is_close_to_the_normal_one_and_wider_when_images_share_patients():
    n = 400
    labels = torch.arange(n) % 2
    right = torch.arange(n) % 5 != 0  # 80 %
    logits = torch.stack([torch.zeros(n), (labels * 2.0 - 1) * (right * 2.0 - 1)], 1)
    alone = measure(logits, labels, bootstrap_weights(range(n)))["accuracy"]
    low, high = interval(alone[1:]).tolist()
    half = 1.96 * (0.8 * 0.2 / n) ** 0.5
    assert low == pytest.approx(0.8 - half, abs=0.012) and high == pytest.approx(0.8 + half, abs=0.012)
    groups = [i // 10 % 40 if r else i % 5 + 100 for i, r in enumerate(right)]
    low_wide, high_wide = interval(measure(logits, labels, bootstrap_weights(groups))["accuracy"][1:]).tolist()
    assert high_wide - low_wide > 1.5 * (high - low)


def right_calls(shares, n):
    """Runs (S, n) of True where an image is called rightly, the share of each run as asked for."""
    return torch.stack([torch.rand(n) < share for share in shares])


def brute_interval(values, repeats=4000):
    """By loops: patients (columns) and runs (rows) are drawn with replacement, and the figures averaged."""
    chance, means = random.Random(5), []
    runs, n = values.tolist(), values.shape[1]
    for _ in range(repeats):
        patients, total = chance.choices(range(n), k=n), 0.0
        for seed in chance.choices(range(len(runs)), k=len(runs)):
            total += sum(runs[seed][i] for i in patients) / n
        means.append(total / len(runs))
    means.sort()
    return means[int(0.025 * repeats)], means[int(0.975 * repeats)]


def numbers(text):
    return [float(number) for number in re.findall(r"-?\d+\.\d+", text)]


def test_the_interval_of_several_seeds_draws_seeds_and_patients_as_loops_do():
    right = right_calls([0.95, 0.6, 0.75, 0.85, 0.7], 60).double()
    weights = bootstrap_weights(range(60), repeats=4000)
    runs = torch.stack([weights @ one / 60 for one in right])  # (S, 1 + R)
    drawn = over_seeds(runs)
    assert drawn[0].item() == pytest.approx(right.mean().item())  # the figure itself is drawn from nothing
    low, high = interval(drawn[1:]).tolist()
    wanted = brute_interval(right)
    assert low == pytest.approx(wanted[0], abs=0.012) and high == pytest.approx(wanted[1], abs=0.012)
    alone = interval(runs.mean(0)[1:]).tolist()  # patients alone
    assert high - low > 1.5 * (alone[1] - alone[0])
    mean, spread, *ends = numbers(cell(list(runs)))
    assert mean == pytest.approx(100 * right.mean().item(), abs=0.06)
    assert spread == pytest.approx(100 * right.mean(1).std().item(), abs=0.06)
    assert ends == pytest.approx([100 * low, 100 * high], abs=0.06)


def test_the_interval_of_a_paired_difference_draws_pairs_of_seeds_and_patients_as_loops_do():
    baseline = right_calls([0.8, 0.6, 0.7, 0.75, 0.65], 60).double()
    student = torch.maximum(baseline, right_calls([0.8, 0.1, 0.4, 0.6, 0.2], 60).double())  # right wherever the other is
    gains = student - baseline
    weights = bootstrap_weights(range(60), repeats=4000)
    figures = [weights @ s / 60 - weights @ b / 60 for s, b in zip(student, baseline, strict=True)]
    mean, spread, *ends = numbers(cell(figures))
    assert mean == pytest.approx(100 * gains.mean().item(), abs=0.06)
    assert spread == pytest.approx(100 * gains.mean(1).std().item(), abs=0.06)
    assert ends == pytest.approx([100 * end for end in brute_interval(gains)], abs=0.6)
    alone = interval(torch.stack(figures).mean(0)[1:]).tolist()  # patients alone
    assert ends[1] - ends[0] > 1.1 * 100 * (alone[1] - alone[0])


def test_two_seeds_are_drawn_as_two_coins_fall_and_each_from_its_own_sample_of_patients():
    apart = torch.tensor([0.0, 1.0])[:, None].expand(2, 8001)  # the seeds differ, the patients do not
    drawn = over_seeds(apart)[1:]
    for value, share in ((0, 0.25), (0.5, 0.5), (1, 0.25)):
        assert (drawn == value).double().mean().item() == pytest.approx(share, abs=0.02)
    same = torch.arange(101.0).expand(3, 101)  # the samples differ, the seeds do not
    assert torch.equal(over_seeds(same), torch.arange(101.0))


def test_one_seed_has_the_interval_of_its_patients_and_no_deviation():
    samples = torch.cat([torch.tensor([0.5]), torch.arange(1001) / 1000])
    assert cell([samples]) == "50.0\n[2.5 97.5]" and cell([samples], sign="+") == "+50.0\n[+2.5 +97.5]"
    assert cell([samples], "loss") == "0.500\n[0.025 0.975]"  # no percentage


# ---- the report


def test_the_report_holds_the_figures_that_scikit_learn_prints():
    text = report([[2, 1], [1, 3]], ["NORMAL", "ILL"])
    assert [re.split(r" {2,}", line.strip()) for line in text if line] == [
        ["precision", "recall", "f1-score", "support", "called NORMAL", "called ILL"],
        ["NORMAL", "0.67", "0.67", "0.67", "3", "2", "1"],
        ["ILL", "0.75", "0.75", "0.75", "4", "1", "3"],
        ["macro avg", "0.71", "0.71", "0.71", "7"],
        ["weighted avg", "0.71", "0.71", "0.71", "7"],
    ]


def test_the_report_tells_precision_from_recall_where_they_differ():
    text = report([[2, 2], [1, 5]], ["NORMAL", "ILL"])  # 4 NORMAL, of which 2 are found; 3 called so, 2 rightly
    rows = [re.split(r" {2,}", line.strip()) for line in text if line]
    cells = {name: row[:4] for name, *row in rows}
    assert cells["NORMAL"] == ["0.67", "0.50", "0.57", "4"]  # 2/3, 2/4, 4/7
    assert cells["ILL"] == ["0.71", "0.83", "0.77", "6"]  # 5/7, 5/6, 10/13
    assert cells["macro avg"] == ["0.69", "0.67", "0.67", "10"]
    assert cells["weighted avg"] == ["0.70", "0.70", "0.69", "10"]  # 4 and 6 times the lines above


# ---- what belongs together


def made(role="baseline", folder="runs/a", **changes):
    """A run as far as its flags go, those of train.py with some changed."""
    args = {**vars(train.get_args(["--role", role, "--arch", "resnet18"])), **changes}
    facts = {"images": ["training images", "validation images"], "processes": 1}
    return {"args": args, "facts": facts, "folder": Path(folder), "name": Path(folder).name}


TAUGHT = {"teacher": ["runs/other"], "T": 8.0, "alpha": 0.5}


def test_a_student_is_compared_with_the_baseline_of_its_own_training():
    assert comparable(made("student"), made("baseline"))
    assert comparable(made("student", **TAUGHT), made("baseline"))


@pytest.mark.parametrize("flag, value", [
    ("lr", 0.123), ("batch_size", 7), ("optimizer", "adam"), ("clip", 0.5), ("label_smoothing", 0.1),
    ("val_fraction", 0.3), ("seed", 5), ("epochs", 3), ("arch", "alexnet"), ("size", 64), ("augment", True),
    ("wrong_labels", 0.4), ("labels_per_class", 3), ("lr_gamma", 0.5), ("steps_per_epoch", 9),
    ("input", "residual"), ("weights", "imagenet"), ("weight_decay", 0.1), ("data", "elsewhere"),
])  # fmt: skip
def test_a_student_is_not_compared_with_a_baseline_of_another_training(flag, value):
    assert made()["args"][flag] != value
    assert not comparable(made("student"), made("baseline", **{flag: value}))
    assert comparable(made("student", **{flag: value}), made("baseline", **{flag: value}))


@pytest.mark.parametrize("flag, value", [
    ("out", "elsewhere"), ("recipe", "small"), ("device", "cuda:1"), ("no_amp", True), ("cache", "/tmp"),
    ("tensorboard", True),
])  # fmt: skip
def test_the_machine_that_trained_a_run_does_not_matter(flag, value):
    assert made()["args"][flag] != value and flag in evaluate.MACHINE
    assert comparable(made("student", **{flag: value}), made("baseline"))
    assert len(variants([made(folder="a", seed=0), made(folder="b", seed=1, **{flag: value})])) == 1


def test_only_a_student_is_compared_and_only_with_a_baseline():
    roles = ("teacher", "baseline", "student")
    pairs = {(a, b) for a in roles for b in roles
             if comparable(made(a, size=64, epochs=1, batch_size=8, lr=0.1, lr_step=1, labels_per_class=None,
                                steps_per_epoch=None),
                           made(b, size=64, epochs=1, batch_size=8, lr=0.1, lr_step=1, labels_per_class=None,
                                steps_per_epoch=None))}  # fmt: skip
    assert pairs == {("student", "baseline")}


def test_runs_that_differ_in_their_seed_and_their_teachers_seed_alone_are_variants_of_one():
    students = [made("student", f"s{i}", seed=i, teacher=[f"runs/t-seed{i}"]) for i in range(3)]
    others = [made("student", "hot", seed=0, T=9.0), made("student", "b", seed=0, teacher=["runs/u"])]
    groups = variants([*students, *others])
    assert sorted(len(same) for same in groups) == [1, 1, 3]
    both = [made("student", f"t{i}", teacher=[f"runs/t-seed{i}"]) for i in range(2)]  # one seed, two teachers
    with pytest.raises(data.UserError, match="they would count as two seeds"):
        variants(both)


@pytest.mark.parametrize("fact, value", [("images", ["training images", "more of them"]), ("processes", 2)])
def test_runs_of_other_images_or_processes_are_neither_compared_nor_variants_of_one(fact, value):
    runs = [made("student", "s", seed=0), made("baseline", "b", seed=0), made("student", "t", seed=1)]
    assert comparable(*runs[:2]) and len(variants(runs[::2])) == 1
    for run in runs[1:]:
        run["facts"][fact] = value
    assert not comparable(*runs[:2]) and len(variants(runs[::2])) == 2


def test_hidden_labels_leave_a_student_comparable_though_it_has_more_training_images():
    student, baseline = made("student", labels_per_class=3), made("baseline", labels_per_class=3)
    student["facts"]["images"] = ["many images", "validation images"]
    assert comparable(student, baseline)


@pytest.mark.parametrize("role", ["baseline", "student"])
def test_two_folders_of_one_seed_are_no_two_seeds_and_both_are_named(role):
    first, copy = made(role, "runs/first", seed=3), made(role, "elsewhere/copy", seed=3, out="other", cache="c")
    for pair in ([first, copy], [copy, first], [first, made(role, seed=4), copy]):
        with pytest.raises(data.UserError, match="seed") as error:
            variants(pair)
        assert "runs/first" in str(error.value) and "elsewhere/copy" in str(error.value)
    assert len(variants([first, made(role, seed=4)])) == 1


# ---- tables, from records made here


def judged(name, logits, labels, classes, seed=0, history=None, repeats=300, **args):
    """A run as tables() takes it, of any logits. history: how many epochs its folder tells of."""
    several = labels.dim() == 2
    split = SimpleNamespace(labels=labels, groups=list(range(len(labels))))
    if history is not None:
        Path(name).mkdir()
        rows = [{"epoch": i + 1, "loss": 0.5} for i in range(history)]
        with open(Path(name) / "history.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, ["epoch", "loss"])
            writer.writeheader()
            writer.writerows(rows)
        (Path(name) / "best.pt").touch()
    record = made(folder=name, seed=seed, **args)
    return record | {
        "data": SimpleNamespace(test=split, classes=classes, multilabel=several), "test": logits,
        "facts": {**record["facts"], "args": record["args"], "validation": metrics(logits, labels, classes), "teachers": [],
                  "sha256": name, "taught_by": [], "train_accuracy": 0.5, "epoch": 1},
        "cost": {"parameters": 1e6, "multiply_adds": 1e9}, "validation": metrics(logits, labels, classes),
        "figures": metrics(logits, labels, classes),
        "samples": measure(logits, labels, bootstrap_weights(split.groups, repeats)),
    }  # fmt: skip


def column(text, name):
    """What the table of test images says under a title: {row: cell}, and {row: the line below it}."""
    start = next(i for i, line in enumerate(text) if " test images, %" in line)
    end = re.search(rf" {name}(?!\S)", text[start]).end()
    lines = text[start + 2 : text.index("", start)]  # the title has two lines
    cells = [(re.split(r" {2,}", line)[0], re.split(r" {2,}", line[:end])[-1] if line[end - 1 : end].strip() else "")
             for line in lines]  # fmt: skip
    rows = [i for i, line in enumerate(lines) if line[0] != " "]
    below = {lines[i].split("  ")[0]: cells[i + 1] for i in rows if i + 1 not in rows and i + 1 < len(lines)}
    names = {lines[i].split("  ")[0]: lines[i + 1].strip().split("  ")[0] for i in rows if i + 1 < len(lines)}
    return {cells[i][0]: cells[i][1] for i in rows}, {name: cell for name, (_, cell) in below.items()}, names


def test_a_finding_that_some_sample_leaves_without_a_positive_counts_neither_in_the_mean_nor_in_its_interval():
    labels, logits = torch.randint(2, (80, 3)).float(), torch.randn(80, 3)
    logits[:, 0] += 2 * labels[:, 0]
    labels[:, 1] = 0
    labels[7, 1] = 1  # a third of all samples are without patient 7
    logits[7, 1] = -9  # and an AUC of 0 would show
    classes = ["COMMON", "RARE", "OFTEN"]
    run = judged("a", logits, labels, classes)
    assert run["samples"]["auc"][1:, 1].isnan().any() and not run["samples"]["auc"][0].isnan().any()
    text = tables([run])
    alone = judged("b", logits[:, ::2], labels[:, ::2], classes[::2])
    wanted = run["samples"]["auc"][:, ::2].mean(1)
    low, high = interval(100 * wanted[1:]).tolist()
    told, below, _ = column(text, "auc")
    assert (told["a"], below["a"]) == (f"{100 * wanted[0]:.1f}", f"[{low:.1f} {high:.1f}]")
    told_alone, below_alone, _ = column(tables([alone]), "auc")
    assert (told["a"], below["a"]) == (told_alone["b"], below_alone["b"])
    [line] = [line for line in text if "left out" in line]
    assert "RARE" in line and "COMMON" not in line and "OFTEN" not in line
    assert not any("left out" in line for line in tables([alone]))


def test_a_rare_finding_is_left_out_of_every_seed_alike():
    labels = torch.randint(2, (60, 2)).float()
    labels[:, 1] = (torch.arange(60) == 3).float()
    runs = [judged(f"a-seed{i}", torch.randn(60, 2) + labels * i, labels, ["OFTEN", "RARE"], i) for i in range(2)]
    wanted = cell([run["samples"]["auc"][:, 0] for run in runs])
    told, below, names = column(tables(runs), "auc")
    assert f"{told['a']}\n{below['a']}" == wanted and names["a"] == "resnet18, 2 seeds"


@pytest.mark.parametrize("classes, told", [
    (["NORMAL", "PNEUMONIA"], "positive: PNEUMONIA"), (["normal", "covid"], "positive: covid"),
    (["NORMAL", "BACTERIAL", "VIRAL"], None),
])  # fmt: skip
def test_the_table_names_the_positive_class_where_there_is_one(classes, told):
    logits, labels = torch.randn(40, len(classes)), torch.arange(40) % len(classes)
    named = [line for line in tables([judged("a", logits, labels, classes)]) if line.startswith("positive")]
    assert named == ([told] if told else [])


def test_the_floor_is_what_always_the_commonest_class_would_reach():
    labels = torch.tensor([1] * 30 + [0] * 10)
    text = tables([judged("a", torch.randn(40, 2), labels, ["NORMAL", "ILL"])])
    told = {name: column(text, name)[0]["always ILL"] for name in ("accuracy", "auc", "specificity", "ece")}
    assert told == {"accuracy": "75.0", "auc": "50.0", "specificity": "0.0", "ece": ""}


def test_a_run_that_has_not_ended_is_named_so_in_its_row():
    logits, labels = torch.randn(40, 2), torch.arange(40) % 2
    part = judged("part", logits, labels, ["a", "b"], history=2, epochs=6)
    whole = judged("whole", logits, labels, ["a", "b"], history=6, epochs=6, lr=0.5)
    *_, names = column(tables([part, whole]), "accuracy")
    assert names["part"] == "resnet18, epoch 2 of 6" and names["whole"] == "resnet18"
    seeds = [judged(f"x-seed{i}", logits, labels, ["a", "b"], i, history=n, epochs=6)
             for i, n in enumerate((6, 5))]  # fmt: skip
    assert column(tables(seeds), "accuracy")[2]["x"] == "resnet18, 2 seeds, epoch 5 of 6"


def test_a_defective_teacher_has_ended_where_it_was_told_to_stop():
    logits, labels = torch.randn(40, 2), torch.arange(40) % 2
    accuracy = metrics(logits, labels, ["a", "b"])["accuracy"]
    for stop_at, name in ((accuracy - 0.01, "resnet18"), (accuracy + 0.01, "resnet18, epoch 2 of 6")):
        shutil.rmtree("d", ignore_errors=True)
        run = judged("d", logits, labels, ["a", "b"], history=2, epochs=6, stop_at=stop_at)
        assert column(tables([run]), "accuracy")[2]["d"] == name


def test_a_student_agrees_with_its_teachers_only_where_all_of_them_are_among_the_runs():
    labels = torch.arange(40) % 2
    a, b, s = (judged(name, torch.randn(40, 2), labels, ["x", "y"], arch=name) for name in ("a", "b", "s"))
    s["args"]["role"], s["facts"]["teachers"] = "student", ["a", "b"]
    assert not any("agrees" in line for line in [*tables([s]), *tables([s, a])])
    together = a["test"].softmax(1) + b["test"].softmax(1)
    share = (s["test"].argmax(1) == together.argmax(1)).double().mean().item()
    wanted = f"s agrees with its teacher on {100 * share:.1f} % of the images"
    assert [line for line in tables([a, s, b]) if "agrees" in line] == [wanted]
    other = judged("s-seed1", torch.randn(40, 2), labels, ["x", "y"], seed=1, arch="s")
    other["args"] |= {"role": "student"}
    other["facts"]["teachers"] = ["elsewhere"]  # a share of the seeds would pass for all of them
    assert not any("agrees" in line for line in tables([a, s, b, other]))


def test_a_gain_says_how_many_of_the_seeds_it_rests_on_where_that_is_not_all():
    labels = torch.arange(40) % 2
    students = [judged(f"s-seed{i}", torch.randn(40, 2), labels, ["a", "b"], i, role="student") for i in range(3)]
    baselines = [judged(f"b-seed{i}", torch.randn(40, 2), labels, ["a", "b"], i) for i in range(3)]
    for n, says in ((3, "  minus b "), (2, "  minus b, 2 of 3 ")):
        for run in baselines:
            run["args"] = {**students[0]["args"], "role": "baseline", "seed": run["args"]["seed"]}
        assert any(line.startswith(says) for line in tables([*students, *baselines[:n]])), says


def test_a_figure_that_some_sample_cannot_have_keeps_the_interval_of_the_others():
    labels = torch.tensor([1] * 3 + [0] * 8)  # a few samples are without a positive
    run = judged("a", torch.randn(11, 2), labels, ["a", "b"])
    assert run["samples"]["auc"].isnan().any()
    low, high = (100 * interval(run["samples"]["auc"][1:])).tolist()
    assert cell([run["samples"]["auc"]]).endswith(f"[{low:.1f} {high:.1f}]")
    evaluate.plot("plot.svg", variants([run]))


def test_a_finding_without_a_positive_has_no_precision_as_it_has_no_recall():
    m = metrics(torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 0]), ["a", "b"])
    assert math.isnan(m["precision"]) and math.isnan(m["sensitivity"]) and math.isnan(m["f1"])


# ---- runs


@pytest.fixture
def three_runs(few_phantoms):
    fit("--out", "runs/teacher")
    fit("--out", "runs/baseline", role="baseline")
    fit("--out", "runs/student", "--teacher", "runs/teacher", role="student")
    return ["runs/teacher", "runs/baseline", "runs/student"]


def stored(folder):
    return json.loads((Path(folder) / "metrics.json").read_text())


def test_one_table_holds_the_floor_the_three_runs_their_agreement_and_the_paired_difference(three_runs, capsys):
    capsys.readouterr()
    evaluate.main([*three_runs, "--json", "all.json"])
    text = capsys.readouterr().out
    kept = json.loads(open("all.json").read())
    assert kept["runs"] == {run: stored(run) for run in three_runs}
    assert text == "\n".join(kept["tables"]) + "\n"
    for wanted in ("always NORMAL ", "teacher ", "  squeezenet1_1 ", "baseline ", "student ",
                   "positive: PNEUMONIA", "16 test images", "  minus baseline "):  # fmt: skip
        assert f"\n{wanted}" in text, wanted
    told, below, _ = column(kept["tables"][:-1], "accuracy")
    for folder in three_runs:
        run = stored(folder)
        at, asked = run["test"], models.load_checkpoint(folder)[1]
        (tn, fp), (fn, tp) = at["confusion"]
        assert tn + fp == fn + tp == 8 and at["accuracy"] == pytest.approx((tp + tn) / 16)
        assert set(NAMES) | {"confusion", "interval"} == set(at) and set(NAMES) == set(at["interval"])
        low, high = at["interval"]["accuracy"]
        assert low <= at["accuracy"] <= high
        if not folder.endswith("student"):  # whose name has two rows, itself and what it gained
            name = Path(folder).name
            assert (told[name], below[name]) == (f"{100 * at['accuracy']:.1f}", f"[{100 * low:.1f} {100 * high:.1f}]")
        assert run["trained_by"]["commit"] and run["judged_by"]["torch"] and run["args"]["seed"] == 0
        assert run["images"] == run["patients"] == 16 and run["classes"] == ["NORMAL", "PNEUMONIA"]
        assert run["epoch"] == asked["epoch"] and run["cost"]["parameters"] > 7e5
        assert run["validation"]["accuracy"] == pytest.approx(asked["validation"]["accuracy"])
    student, teacher = (models.load_checkpoint(run)[0] for run in ("runs/student", "runs/teacher"))
    with torch.no_grad():
        x = data.prepare(data.load("phantoms", 32, ("test",)).test.images, torch.device("cpu"))
        same = student(x).argmax(1) == teacher(x).argmax(1)
    share = f"{100 * same.double().mean().item():.1f}"
    assert f"student agrees with its teacher on {share} % of the images" in text
    evaluate.main(["runs/baseline", "runs/student"])
    assert "agrees with its teacher" not in capsys.readouterr().out


def test_the_report_has_more_columns_and_the_figures_of_each_class(few_phantoms, capsys):
    args = fit()
    capsys.readouterr()
    evaluate.main([args.out])
    assert not any(name in capsys.readouterr().out for name in ("precision", "f1", "loss", "weighted avg"))
    evaluate.main([args.out, "--report"])
    text = capsys.readouterr().out
    at = stored(args.out)["test"]
    low, high = at["interval"]["loss"]
    assert f" {at['loss']:.3f}\n" in text and f" [{low:.3f} {high:.3f}]\n" in text
    for wanted in (*evaluate.MORE, "weighted avg", "called PNEUMONIA", f"{args.out}: best on validation in epoch"):
        assert wanted in text, wanted


def test_a_student_agrees_with_the_teacher_it_had_and_not_with_one_that_took_its_place(three_runs, capsys):
    model, facts = models.load_checkpoint("runs/teacher")
    models.save_checkpoint("runs/teacher/best.pt", model, **{**facts, "epoch": 7})
    capsys.readouterr()
    evaluate.main(three_runs)
    assert "agrees with its teacher" not in capsys.readouterr().out


def test_a_run_given_twice_or_copied_is_not_two_seeds(few_phantoms):
    fit("--out", "runs/a")
    shutil.copytree("runs/a", "runs/copy")
    for twice in (["runs/a", "runs/a"], ["runs/a", "runs/a/best.pt"], ["runs/a", "runs/copy"]):
        with pytest.raises(data.UserError, match="they would count as two seeds|lie in one folder"):
            evaluate.main(twice)


def test_a_folder_without_weights_is_left_out_with_a_line_and_alone_it_is_an_error(few_phantoms, capsys):
    args = fit()
    Path("runs/begun").mkdir()
    capsys.readouterr()
    evaluate.main([args.out, "runs/begun", "--json", "all.json"])
    text = capsys.readouterr().out
    assert "runs/begun has no best.pt" in text and "\nteacher" in text
    assert list(json.loads(open("all.json").read())["runs"]) == [args.out]
    with pytest.raises(data.UserError, match="No such file: runs/begun/best.pt"):
        evaluate.main(["runs/begun"])


def test_two_checkpoints_of_one_folder_do_not_share_its_metrics(few_phantoms):
    args = fit()
    shutil.copy(f"{args.out}/best.pt", f"{args.out}/copy.pt")
    with pytest.raises(data.UserError, match="two of these runs lie in one folder"):
        evaluate.main([args.out, f"{args.out}/copy.pt"])


def test_a_folder_that_has_changed_since_is_told(kermany, capsys):
    args = fit("--data", str(kermany), "--recipe", "scratch")
    for i in range(20, 40):
        image_file(kermany / f"train/NORMAL/IM-{i:04d}-0001.jpeg")
    shutil.rmtree(kermany / "val")
    try:
        evaluate.main([args.out])
    except data.UserError as error:  # the new split may hold patients of training
        assert "by whom it" in str(error)
    else:
        assert "has changed since. Validation is not what chose its epoch" in capsys.readouterr().out


def test_a_run_that_was_interrupted_is_judged_and_named_so(few_phantoms, capsys):
    args = fit()
    path = Path(args.out) / "history.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))  # its title and one epoch
    capsys.readouterr()
    evaluate.main([args.out])
    assert "\n  squeezenet1_1, epoch 1 of 2 " in capsys.readouterr().out


def test_what_is_no_number_is_null_in_the_files(tmp_path):
    evaluate.write_json("a.json", {"auc": [0.5, math.nan], "name": "NaN"})
    assert "NaN" not in open("a.json").read().replace('"NaN"', "")
    assert json.loads(open("a.json").read()) == {"auc": [0.5, None], "name": "NaN"}


def test_runs_that_differ_in_their_seed_share_a_row_of_their_mean_and_deviation(few_phantoms, capsys):
    runs = [fit("--lr", "0.03", "--epochs", "6", "--seed", seed, role="baseline").out for seed in "02"]
    capsys.readouterr()
    evaluate.main(runs)
    text = capsys.readouterr().out
    for name in ("accuracy", "ece"):
        values = 100 * torch.tensor([stored(run)["test"][name] for run in runs])
        [told] = [cell for row, cell in column([*text.splitlines(), ""], name)[0].items() if "baseline" in row]
        assert told == f"{values.mean():.1f} ± {values.std():.1f}", name
    assert ", 2 seeds " in text
    assert values.std() > 0.1  # of the calibration error, which two seeds never share


def test_evaluating_writes_nothing_but_the_metrics_and_the_predictions(few_phantoms):
    args = fit()
    before = {p.name: p.read_bytes() for p in Path(args.out).iterdir()}
    evaluate.main([args.out])
    after = {p.name: p.read_bytes() for p in Path(args.out).iterdir()}
    assert after.pop("metrics.json") and after.pop("predictions.csv") and after == before


def test_the_predictions_rebuild_every_figure_elsewhere(kermany, few_phantoms):
    args = fit("--data", str(kermany), "--recipe", "scratch")
    findings = fit("--data", "findings", "--recipe", "findings")
    for out, classes in ((args.out, ["NORMAL", "PNEUMONIA"]), (findings.out, ["OPACITY", "LARGE_HEART", "FLUID"])):
        evaluate.main([out])
        rows = data.read_csv(Path(out) / "predictions.csv")
        p = torch.tensor([[float(row[name]) for name in classes] for row in rows]).double()
        if out == args.out:
            assert len(rows) == 12 and {row["patient"] for row in rows if "virus" in row["image"]} == {
                f"person{i}_virus" for i in range(100, 104)}  # fmt: skip
            labels = torch.tensor([int(row["label"]) for row in rows])
            assert [classes[k] in row["image"] for k, row in zip(labels, rows, strict=True)] == [True] * 12
            assert torch.allclose(p.sum(1), torch.ones(12).double(), atol=1e-6)
            again = metrics(p.log(), labels, classes)
        else:
            labels = torch.tensor([[float(row[f"label {name}"]) for name in classes] for row in rows])
            again = metrics(p.logit(), labels, classes)
        for name in ("accuracy", "auc"):
            assert stored(out)["test"][name] == pytest.approx(again[name], abs=1e-4), name


def shapes(path, tag):
    return [shape for shape in ElementTree.parse(path).iter() if shape.tag.endswith(tag)]


def test_the_plot_has_a_dot_a_run_at_its_figure_and_a_line_over_its_interval():
    labels = torch.arange(60) % 2
    runs = [judged(name, torch.randn(60, 2) + 2 * F.one_hot(labels, 2), labels, ["a", "b"], role=role)
            for name, role in (("one & only", "baseline"), ("two", "student"))]  # fmt: skip
    runs[0]["args"] = {**runs[1]["args"], "role": "baseline"}
    groups = variants(runs)
    evaluate.plot("plot.svg", groups)
    dots, lines = shapes("plot.svg", "circle"), shapes("plot.svg", "polyline")
    assert len(dots) == 2 * (2 + 1)  # AUC and accuracy; two runs and their difference
    wide = [line for line in lines if line.get("stroke-width") == "2"]
    for i, values in enumerate([*(r["samples"]["accuracy"] for r in runs)]):
        low, high = (100 * end for end in interval(values[1:]).tolist())
        [a, b] = [float(point.split(",")[0]) for point in wide[2 + i].get("points").split()]
        at = float(dots[2 + i].get("cx"))
        assert (at - a) / (b - a) == pytest.approx((100 * values[0].item() - low) / (high - low), abs=0.02)
    said = [text.text for text in shapes("plot.svg", "text")]
    gain = 100 * (runs[1]["samples"]["auc"][0] - runs[0]["samples"]["auc"][0]).item()
    for words in ("one & only", "  minus one & only", "AUC, %", "accuracy, points gained", "0", f"{gain:.1f}"):
        assert words in said, words


def test_the_curves_go_through_the_accuracies_of_every_epoch(few_phantoms):
    runs = [fit("--seed", seed, "--epochs", "4", role="baseline").out for seed in "01"]
    evaluate.main([*runs, "--curves", "curves.svg"])
    curves = [line for line in shapes("curves.svg", "polyline") if line.get("stroke-width") is None]
    assert [line.get("stroke-dasharray") for line in curves] == ["5 3", None] * 2  # one panel, two seeds
    told = [[float(row[name]) for row in data.read_csv(Path(run) / "history.csv")]
            for run in runs for name in ("train_accuracy", "val_accuracy")]  # fmt: skip
    heights = [[float(point.split(",")[1]) for point in line.get("points").split()] for line in curves]
    flat = torch.tensor([sum(told, []), sum(heights, [])]).double()
    assert heights[0][0] != heights[1][0] and torch.corrcoef(flat)[0, 1].item() == pytest.approx(-1, abs=1e-6)


def test_the_table_of_many_seeds_fits_a_hundred_columns():
    labels = torch.arange(60) % 2
    runs = [judged(f"student-T10-seed{i}", torch.randn(60, 2), labels, ["NORMAL", "PNEUMONIA"], i, arch="inception_v3")
            for i in range(5)]  # fmt: skip
    assert max(len(line) for line in tables(runs)) <= 100


def test_decoded_images_are_kept_where_evaluate_is_told_and_never_where_the_run_was_trained(few_phantoms):
    args = fit("--cache", "of-the-training")
    assert models.load_checkpoint(args.out)[1]["args"]["cache"] == "of-the-training"
    for flags, folder in (([], "cache"), (["--cache", "mine"], "mine")):
        shutil.rmtree("of-the-training", ignore_errors=True)
        shutil.rmtree("cache", ignore_errors=True)
        evaluate.main([args.out, *flags])
        assert any(Path(folder).glob("*-test-*.npy"))
        assert not Path("of-the-training").exists() and Path("cache").exists() == (folder == "cache")


def test_runs_of_other_images_or_classes_do_not_share_a_table(few_phantoms, kermany):
    phantoms = fit()
    images = fit("--data", str(kermany), "--recipe", "scratch")
    three = fit("--data", str(kermany), "--recipe", "scratch", "--classes", "3")
    for pair in ([phantoms.out, images.out], [images.out, three.out]):
        with pytest.raises(data.UserError, match="different test images or classes"):
            evaluate.main(pair)


def test_a_run_is_not_judged_on_patients_that_it_was_trained_on(kermany):
    args = fit("--data", str(kermany), "--recipe", "scratch")
    for image in (kermany / "train/NORMAL").glob("IM-*.jpeg"):
        (kermany / "test/NORMAL" / image.name).write_bytes(image.read_bytes())
    with pytest.raises(data.UserError, match="by whom it or its student is to be judged"):
        evaluate.main([args.out])


def test_a_student_is_not_judged_on_patients_that_its_teacher_was_trained_on(few_phantoms):
    fit("--out", "t")
    model, facts = models.load_checkpoint("t")
    models.save_checkpoint("t/best.pt", model, **{**facts, "seen_groups": ["patient-of-the-teacher"]})
    fit("--out", "s", "--teacher", "t", role="student")
    model, facts = models.load_checkpoint("s")
    assert "patient-of-the-teacher" in facts["seen_groups"]  # a student remembers whom its teacher saw
    seen = [*facts["seen_groups"], "phantom-test-3"]
    models.save_checkpoint("s/best.pt", model, **{**facts, "seen_groups": seen})
    with pytest.raises(data.UserError, match="s has learned from phantom-test-3, by whom it"):
        evaluate.main(["s"])


def test_classes_other_than_those_of_training_are_refused(kermany, few_phantoms):
    args = fit()
    for split in ("train", "test", "val"):
        (kermany / split / "PNEUMONIA").rename(kermany / split / "COVID")
    with pytest.raises(data.UserError, match="'PNEUMONIA'.*'COVID'"):
        evaluate.main([args.out, "--data", str(kermany)])


@pytest.mark.parametrize("flag", ["--plot", "--curves"])
def test_a_picture_is_not_called_what_it_is_not(flag, capsys):
    with pytest.raises(SystemExit):
        evaluate.get_args(["a", flag, "slide.png"])
    assert f"{flag} writes an SVG: its name must end in .svg, not slide.png" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--json", "b.json"], ["--report"], ["--grid"], ["--data", "images"],
                                   ["--plot", "p.svg"], ["--curves", "c.svg"]])
def test_flags_that_would_be_ignored_beside_a_single_image_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as end:
        evaluate.get_args(["a", "--image", "image.png", *flags])
    assert end.value.code == 2 and "--image" in capsys.readouterr().err.splitlines()[-1]
