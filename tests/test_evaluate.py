"""Figures against brute force, closed forms and committed values of scikit-learn 1.7 on the same inputs."""

import argparse
import itertools
import json
import math
import random
import re
import shutil
from decimal import Decimal, localcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import fit, image_file
from PIL import Image, ImageOps

import data
import evaluate
import models
import train
from evaluate import (
    auc,
    bootstrap_weights,
    calibration_error,
    cell,
    interval,
    measure,
    metrics,
    over_seeds,
    report,
    rows_and_gains,
    short,
    summary,
    variants,
)

CPU = torch.device("cpu")
NAMES = evaluate.COLUMNS + evaluate.MORE
NORMAL = ["NORMAL", "PNEUMONIA"]
FINGERPRINTS = ("train", "val", "test", "train_pixels", "val_pixels")

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


def test_predict_reads_every_row_once_and_in_order():
    model = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(4, 2)).train()
    rows = torch.randn(131, 4)  # more than two batches, the last of them short
    said = evaluate.predict(model, models.from_tensor(rows, CPU), len(rows), CPU)
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


def test_odds_that_are_equal_tie_whatever_the_order_of_the_other_classes():
    """Sums in another order differ in their last bit; a tie that this splits counts 0 or 1, not half."""
    rows = [list(row) for row in itertools.product([0.1, 0.7, 1.3, 2.2], repeat=3)]
    logits = torch.tensor([[own, *other] for own, *other in rows for other in itertools.permutations(other)] * 2)
    labels = torch.arange(len(logits)).mul(7).remainder(5).remainder(3)
    wanted = 0.0
    for k in range(3):
        odds = [(z[k], tuple(sorted(z[:k] + z[k + 1 :]))) for z in logits.double().tolist()]
        values = {pair: pair[0] - math.log(sum(math.exp(z) for z in pair[1])) for pair in odds}
        pairs = [(a, b) for a, y in zip(odds, labels.tolist(), strict=True) if y == k
                 for b, other in zip(odds, labels.tolist(), strict=True) if other != k]
        wins = sum(0.5 if a == b or abs(values[a] - values[b]) < 1e-12 else values[a] > values[b] for a, b in pairs)
        wanted += wins / len(pairs) / 3
    assert metrics(logits, labels, ["a", "b", "c"])["auc"] == pytest.approx(wanted, abs=1e-12)


def test_auc_of_a_single_class_is_not_a_number():
    assert math.isnan(auc(torch.rand(5), torch.ones(5), ones(5)).item())


def test_calibration_error_is_zero_for_a_calibrated_toy_and_the_gap_for_an_overconfident_one():
    confidence, right = torch.full((10,), 0.7, dtype=torch.float64), torch.tensor([True] * 7 + [False] * 3)
    assert calibration_error(confidence, right, ones(10)).item() == pytest.approx(0, abs=1e-12)
    sure = torch.full((10,), 0.99, dtype=torch.float64)
    assert calibration_error(sure, right, ones(10)).item() == pytest.approx(0.29, abs=1e-9)


def test_calibration_error_agrees_with_a_loop_over_15_bins():
    confidence = torch.rand(400).double() / 2 + 0.5
    right = torch.rand(400) < confidence + 0.4 * torch.sin(30 * confidence)  # gaps of both signs, whose bins do not merge

    def gaps(bins):
        inside = [(confidence * bins).long().clamp(max=bins - 1) == b for b in range(bins)]
        return [(confidence[i] - right[i].double()).sum().item() / 400 for i in inside if i.any()]

    brute = {bins: sum(map(abs, gaps(bins))) for bins in (5, 10, 15, 20)}
    assert min(gaps(15)) < -0.001 and max(gaps(15)) > 0.001 and len({f"{v:.3f}" for v in brute.values()}) == 4
    assert calibration_error(confidence, right, ones(400)).item() == pytest.approx(brute[15], abs=1e-12)


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


def test_a_finding_is_called_positive_above_a_logit_of_0():
    m = metrics(torch.tensor([[0.2], [-0.2], [0.7], [-0.7]]), torch.tensor([[1.0], [0], [0], [1]]), ["a"])
    assert m["confusion"] == [[[1, 1], [1, 1]]] and m["accuracy"] == [0.5]


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
    mean, spread, *ends = numbers(cell(summary(list(runs))))
    assert mean == pytest.approx(100 * right.mean().item(), abs=0.06)
    assert spread == pytest.approx(100 * right.mean(1).std().item(), abs=0.06)
    assert ends == pytest.approx([100 * low, 100 * high], abs=0.06)


def test_the_interval_of_a_paired_difference_draws_pairs_of_seeds_and_patients_as_loops_do():
    baseline = right_calls([0.8, 0.6, 0.7, 0.75, 0.65], 60).double()
    student = torch.maximum(baseline, right_calls([0.8, 0.1, 0.4, 0.6, 0.2], 60).double())  # right wherever the other is
    gains = student - baseline
    weights = bootstrap_weights(range(60), repeats=4000)
    figures = [weights @ s / 60 - weights @ b / 60 for s, b in zip(student, baseline, strict=True)]
    mean, spread, *ends = numbers(cell(summary(figures)))
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
    figure = summary([samples])
    assert math.isnan(figure.pop("sd")) and figure == pytest.approx({"mean": 0.5, "low": 0.025, "high": 0.975})
    figure = summary([samples])
    assert cell(figure) == "50.0\n[2.5 97.5]" and cell(figure, sign="+") == "+50.0\n[+2.5 +97.5]"
    assert cell(figure, "loss") == "0.500\n[0.025 0.975]"  # no percentage
    assert cell(summary([torch.tensor([0.5]), torch.tensor([0.7])])) == "60.0 ± 14.1"  # no samples, no interval


# ---- the report


def cells_of(text):
    return [re.split(r" {2,}", line.strip()) for line in text if line]


def test_the_report_holds_the_figures_that_scikit_learn_prints_and_below_them_the_confusion_matrix():
    assert cells_of(report([[2, 1], [1, 3]], ["NORMAL", "ILL"])) == [
        ["precision", "recall", "f1-score", "support"],
        ["NORMAL", "0.67", "0.67", "0.67", "3"],
        ["ILL", "0.75", "0.75", "0.75", "4"],
        ["macro avg", "0.71", "0.71", "0.71", "7"],
        ["weighted avg", "0.71", "0.71", "0.71", "7"],
        ["images called", "NORMAL", "ILL"],
        ["NORMAL", "2", "1"],
        ["ILL", "1", "3"],
    ]


def test_the_report_tells_precision_from_recall_where_they_differ():
    text = report([[2, 2], [1, 5]], ["NORMAL", "ILL"])  # 4 NORMAL, of which 2 are found; 3 called so, 2 rightly
    cells = {name: row for name, *row in cells_of(text)[:5]}
    assert cells["NORMAL"] == ["0.67", "0.50", "0.57", "4"]  # 2/3, 2/4, 4/7
    assert cells["ILL"] == ["0.71", "0.83", "0.77", "6"]  # 5/7, 5/6, 10/13
    assert cells["macro avg"] == ["0.69", "0.67", "0.67", "10"]
    assert cells["weighted avg"] == ["0.70", "0.70", "0.69", "10"]  # 4 and 6 times the lines above


# ---- what belongs together

def a_run(role="baseline", folder="runs/a", seed=0, teachers=None, **changes):
    """Return a run as far as its comparisons go. changes: of its flags, and of what else its config holds."""
    args = train.get_args(["--role", role, "--arch", "resnet18", "--seed", str(seed)])
    flags = {name: value for name, value in changes.items() if name in args}
    vars(args).update(flags)
    train_images = SimpleNamespace(ids=[f"{i}.png" for i in range(640)], groups=[])
    images = SimpleNamespace(fingerprints={name: f"hash of {name}" for name in FINGERPRINTS}, train=train_images,
                             classes=NORMAL, multilabel=False)
    model = SimpleNamespace(facts={"first_weights": None, "seen_groups": []})
    teachers = ([teacher(seed)] if role == "student" else []) if teachers is None else teachers
    config = {**train.run_facts(args, images, model, teachers)["config"], **changes}
    return {"config": config, "folder": Path(folder), "facts": {}, "validation": {"accuracy": 0.5},
            "samples": {k: torch.full((3,), 0.5) for k in NAMES}}


def teacher(seed=0, done=20, last=None, role="teacher", teachers=(), **changes):
    """Return the facts of a teacher after `done` epochs."""
    config = a_run(role, seed=seed, teachers=teachers, **{"epochs": 20, **changes})["config"]
    return {"config": config, "arch": config["arch"], "history": [{}] * done, "last": last, "seen_groups": [],
            "weights_hash": f"hash of {seed} {done} {changes}"}


def has_gain(student, baseline):
    named = {**student, "folder": Path("student")}, {**baseline, "folder": Path("baseline")}
    _, gains = rows_and_gains([[run] for run in named], "accuracy")
    return any((gain["title"], gain["minus"]) == ("student", "baseline") for gain in gains)


def test_a_gain_is_that_over_the_baseline_of_the_same_training():
    assert has_gain(a_run("student"), a_run("baseline"))
    assert has_gain(a_run("student", T=8.0, alpha=0.5, teachers=[teacher(arch="vgg11")]), a_run("baseline"))
    assert has_gain(a_run("student", alpha=0.0, teachers=[]), a_run("baseline"))


@pytest.mark.parametrize("flag, value", [
    ("lr", 0.123), ("batch_size", 7), ("optimizer", "adam"), ("clip", 0.5), ("label_smoothing", 0.1),
    ("val_fraction", 0.3), ("seed", 5), ("epochs", 3), ("arch", "alexnet"), ("size", 64), ("augment", True),
    ("wrong_labels", 0.4), ("labels_per_class", 3), ("lr_gamma", 0.5), ("steps_per_epoch", 9),
    ("input", "residual"), ("weight_decay", 0.1), ("precision", "bfloat16"),
])
def test_a_baseline_of_other_training_gives_no_gain(flag, value):
    assert a_run()["config"][flag] != value
    assert not has_gain(a_run("student"), a_run("baseline", **{flag: value}))
    assert has_gain(a_run("student", **{flag: value}), a_run("baseline", **{flag: value}))


def test_a_gain_is_a_students_over_a_baseline():
    roles, same = ("teacher", "baseline", "student"), a_run("student")["config"]
    runs = {role: a_run(role) | {"config": {**same, "role": role}} for role in roles}
    assert {(a, b) for a in roles for b in roles if has_gain(runs[a], runs[b])} == {("student", "baseline")}


def test_runs_and_teachers_of_other_seeds_share_a_row():
    students = [a_run("student", f"s{i}", i) for i in range(3)]  # each of the teacher of its own seed
    assert [len(group) for group in variants(students)] == [3]
    both = [a_run("student", f"t{i}", 0, [teacher(i)]) for i in range(2)]  # one seed, two teachers
    with pytest.raises(data.UserError, match="they would count as two seeds"):
        variants(both)


@pytest.mark.parametrize("changes", [
    {"arch": "alexnet"}, {"epochs": 3}, {"done": 3, "stop_at": 0.5}, {"done": 2, "last": {}}, {"lr": 0.5},
    {"first_weights": "another file"}, {"train_pixels": "other images"}, {"label_smoothing": 0.1},
])
def test_students_of_other_teachers_share_no_row(changes):
    """Also where the teacher's path is the same, and was trained again in between with other flags."""
    first, second = a_run("student", "s0", 0), a_run("student", "s1", 1, [teacher(1, **changes)])
    assert len(variants([first, second])) == 2
    assert len(variants([first, a_run("student", "s1", 1)])) == 1
    two = a_run("student", "s1", 1, [teacher(1), teacher(1, **changes)])
    assert len(variants([first, two])) == 2


def test_students_whose_teachers_had_other_teachers_share_no_row():
    taught = [teacher(i, role="student", teachers=[teacher(arch=arch)]) for i, arch in enumerate(("vgg11", "vgg13"))]
    runs = [a_run("student", f"s{i}", i, [each]) for i, each in enumerate(taught)]
    assert len(variants(runs)) == 2


@pytest.mark.parametrize("what, value", [
    ("train", "other labels"), ("val", "other labels"), ("test", "other labels"), ("processes", 2),
    ("train_pixels", "other pixels"), ("val_pixels", "other pixels"), ("epoch_length", 20),
    ("precision", "bfloat16"), ("first_weights", "a file"),
])
def test_runs_of_other_images_steps_or_weights_give_no_gain_and_share_no_row(what, value):
    runs = [a_run("student", "s", 0), a_run("baseline", "b", 0), a_run("student", "t", 1)]
    assert runs[0]["config"][what] != value
    assert has_gain(*runs[:2]) and len(variants(runs[::2])) == 1
    for run in runs[1:]:
        run["config"][what] = value
    assert not has_gain(*runs[:2]) and len(variants(runs[::2])) == 2


@pytest.mark.parametrize("name", ["data", "teacher", "weights", "out", "cache", "recipe", "device"])
def test_a_path_the_recipe_or_the_machine_separates_no_runs(name):
    runs = [a_run("student", "s", 0), a_run("student", "t", 1, **{name: "other"}), a_run(**{name: "other"})]
    assert len(variants(runs[:2])) == 1 and has_gain(runs[0], runs[2])


@pytest.mark.parametrize("role", ["baseline", "student"])
def test_two_folders_of_one_seed_are_no_two_seeds(role):
    first, copy = a_run(role, "runs/first", 3), a_run(role, "elsewhere/copy", 3)
    for pair in ([first, copy], [copy, first], [first, a_run(role, seed=4), copy]):
        with pytest.raises(data.UserError, match="seed") as error:
            variants(pair)
        assert "runs/first" in str(error.value) and "elsewhere/copy" in str(error.value)
    assert len(variants([first, a_run(role, seed=4)])) == 1


# ---- tables, from records made here


def judged(name, logits, labels, classes, seed=0, done=None, last=None, repeats=300, n_val=500, **changes):
    """Return a run as the table takes it, of any logits. done: its epochs so far, otherwise all."""
    split = SimpleNamespace(labels=labels, groups=list(range(len(labels))))
    figures, record = metrics(logits, labels, classes), a_run(folder=name, seed=seed, **changes)
    epochs = record["config"]["epochs"] if done is None else done
    facts = {"config": record["config"], "history": [{}] * epochs, "last": last, "validation": figures,
             "train_accuracy": 0.5, "epoch": 1}
    samples = measure(logits, labels, bootstrap_weights(split.groups, repeats))
    return record | {
        "state": models.state_of(facts), "facts": facts,
        "data": SimpleNamespace(test=split, val=SimpleNamespace(labels=torch.zeros(n_val)), classes=classes,
                                multilabel=labels.dim() == 2),
        "cost": {"parameters": 1e6, "multiply_adds": 1e9}, "validation": figures, "test": logits,
        "figures": {**figures, "interval": {k: interval(samples[k][1:]).tolist() for k in NAMES}},
        "samples": samples,
    }


def tables(records, report=False):
    """The lines that evaluate.py prints of these runs."""
    multilabel, groups = records[0]["data"].multilabel, variants(records)
    score = "auc" if multilabel else "accuracy"
    rows, gains = rows_and_gains(groups, score)
    text = evaluate.table(groups, rows, gains, evaluate.COLUMNS, score)
    text += evaluate.table(groups, rows, gains, evaluate.MORE, score) if report else []
    text += evaluate.findings(groups, rows) if multilabel else []
    return [*text, "", *evaluate.notes(records)]


def column(text, name):
    """What the table of test images says under a title: {row: cell}, and {row: the line below it}."""
    start = next(i for i, line in enumerate(text) if " test images, %" in line)
    end = re.search(rf" {name}(?!\S)", text[start]).end()
    lines = text[start + 2 : text.index("", start)]  # the title has two lines
    cells = [(re.split(r" {2,}", line)[0], re.split(r" {2,}", line[:end])[-1] if line[end - 1 : end].strip() else "")
             for line in lines]
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
    findings = [line.split("  ")[0] for line in text]
    assert {"COMMON", "RARE (too rare for the mean)", "OFTEN"} <= set(findings)
    assert not any("too rare" in line for line in tables([alone]))


def test_a_rare_finding_is_left_out_of_every_seed_alike():
    labels = torch.randint(2, (60, 2)).float()
    labels[:, 1] = (torch.arange(60) == 3).float()
    runs = [judged(f"a-seed{i}", torch.randn(60, 2) + labels * i, labels, ["OFTEN", "RARE"], i) for i in range(2)]
    wanted = cell(summary([run["samples"]["auc"][:, 0] for run in runs]))
    told, below, names = column(tables(runs), "auc")
    assert f"{told['a']}\n{below['a']}" == wanted and names["a"] == "resnet18, 2 seeds"


@pytest.mark.parametrize("classes, told", [
    (["NORMAL", "PNEUMONIA"], "positive: PNEUMONIA"), (["normal", "covid"], "positive: covid"),
    (["NORMAL", "BACTERIAL", "VIRAL"], None),
])
def test_the_table_names_the_positive_class_where_there_is_one(classes, told):
    logits, labels = torch.randn(40, len(classes)), torch.arange(40) % len(classes)
    named = [line for line in tables([judged("a", logits, labels, classes)]) if line.startswith("positive")]
    assert named == ([told] if told else [])


def test_the_floor_is_what_always_the_commonest_class_would_reach():
    labels = torch.tensor([1] * 30 + [0] * 10)
    text = tables([judged("a", torch.randn(40, 2), labels, ["NORMAL", "ILL"])])
    told = {name: column(text, name)[0]["always ILL"] for name in ("accuracy", "auc", "specificity", "ece")}
    assert told == {"accuracy": "75.0", "auc": "50.0", "specificity": "0.0", "ece": ""}


def test_the_row_of_an_unfinished_or_defective_run_says_so():
    logits, labels = torch.randn(40, 2), torch.arange(40) % 2

    def told(*runs):
        return column(tables([judged(*run[:1], logits, labels, ["a", "b"], epochs=6, **run[1]) for run in runs]),
                      "accuracy")[2]

    names = told(("part", {"done": 2, "last": {}}), ("whole", {"lr": 0.5}), ("stopped", {"done": 2, "stop_at": 0.7}))
    assert names["whole"] == "resnet18" and names["stopped"] == "resnet18, stopped at 0.7"
    assert names["part"].startswith("resnet18, ") and "2 of 6" in names["part"]
    assert "5 of 6" in told(("x-seed0", {}), ("x-seed1", {"seed": 1, "done": 5, "last": {}}))["x"]


def test_a_gain_says_how_many_of_the_seeds_it_rests_on_where_that_is_not_all():
    labels = torch.arange(40) % 2
    students = [judged(f"s-seed{i}", torch.randn(40, 2), labels, ["a", "b"], i, role="student") for i in range(3)]
    baselines = [judged(f"b-seed{i}", torch.randn(40, 2), labels, ["a", "b"], i) for i in range(3)]
    for run in baselines:
        run["config"] = {**students[0]["config"], "role": "baseline", "seed": run["config"]["seed"]}
    for n, says in ((3, "  minus b "), (2, "  minus b, 2 of 3 ")):
        assert any(line.startswith(says) for line in tables([*students, *baselines[:n]])), says


def test_a_figure_that_some_sample_cannot_have_keeps_the_interval_of_the_others():
    labels = torch.tensor([1] * 3 + [0] * 8)  # a few samples are without a positive
    run = judged("a", torch.randn(11, 2), labels, ["a", "b"])
    assert run["samples"]["auc"].isnan().any()
    low, high = (100 * interval(run["samples"]["auc"][1:])).tolist()
    assert cell(summary([run["samples"]["auc"]])).endswith(f"[{low:.1f} {high:.1f}]")


def test_a_finding_without_a_positive_has_no_precision_as_it_has_no_recall():
    m = metrics(torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 0]), ["a", "b"])
    assert math.isnan(m["precision"]) and math.isnan(m["sensitivity"]) and math.isnan(m["f1"])


def test_a_run_that_says_one_class_of_every_image_is_named_also_where_it_ranks_well():
    labels = torch.tensor([0, 1] * 30)
    dead = judged("dead", torch.tensor([[1.0, 0.0]]).expand(60, 2), labels, NORMAL)
    shifted = judged("shifted", torch.stack([torch.full((60,), 9.0), labels + torch.rand(60)], 1), labels, NORMAL, lr=0.5)
    fine = judged("fine", torch.randn(60, 2), labels, NORMAL, lr=0.6)
    said = [line for line in tables([dead, shifted, fine]) if "of every image" in line]
    assert said == ["dead says NORMAL of every image", "shifted says NORMAL of every image"]
    assert column(tables([dead]), "accuracy")[0] == {"always NORMAL": "50.0", "dead": "50.0"}  # the floor's row


def test_few_validation_images_are_told_with_the_step_that_one_of_them_makes():
    labels = torch.arange(40) % 2
    runs = [judged(name, torch.randn(40, 2), labels, NORMAL, n_val=n, lr=n / 100) for name, n in (("a", 49), ("b", 16))]
    assert "16 validation images: their accuracy moves in steps of 6.2 points" in tables(runs)
    assert any("49 validation images" in line for line in tables(runs[:1]))
    assert not any("steps of" in line for line in tables([judged("c", torch.randn(40, 2), labels, NORMAL, n_val=50)]))
    assert [line for line in tables(runs) if "lower is better" in line] == ["ece: lower is better"]


def test_a_long_name_is_shortened_in_the_middle_with_a_sign_and_others_are_whole():
    whole, long = "x" * 34, "student-T10-lr0.0003-clip1-weightdecay0.0001-seed3"
    assert short(whole) == whole
    assert len(short(long)) == 34 and short(long).count("…") == 1
    start, end = short(long).split("…")
    assert long.startswith(start) and long.endswith(end) and abs(len(start) - len(end)) <= 1
    labels = torch.arange(40) % 2
    text = tables([judged(long, torch.randn(40, 2), labels, NORMAL)])
    assert [line[:34] for line in text if line.startswith("student")] == [short(long)]


def test_the_table_of_many_seeds_fits_a_hundred_columns_and_the_report_a_hundred_and_ten(capsys):
    classes = ["ELBOW", "FINGER", "FOREARM", "HAND", "HUMERUS", "SHOULDER", "WRIST"]
    labels = torch.arange(70) % 7
    runs = [judged(f"student-T10-seed{i}", torch.randn(70, 7), labels, classes, i, arch="inception_v3")
            for i in range(5)]
    assert max(map(len, tables(runs))) <= 100
    long = [judged(f"student-T10-of-another-teacher-lr0.05-seed{i}", torch.randn(70, 7), labels, classes, i)
            for i in range(5)]
    text = [*tables(long, report=True), *report(long[0]["figures"]["confusion"], classes)]
    assert max(map(len, text)) <= 110 and any(line.split()[-3:] == evaluate.MORE for line in text)


def test_the_rows_kept_are_those_that_the_text_shows():
    labels = torch.arange(40) % 2
    students = [judged(f"s-seed{i}", torch.randn(40, 2), labels, NORMAL, i, role="student") for i in range(2)]
    baselines = [judged(f"b-seed{i}", torch.randn(40, 2), labels, NORMAL, i) for i in range(2)]
    for run in baselines:
        run["config"] = {**students[0]["config"], "role": "baseline", "seed": run["config"]["seed"]}
    rows, gains = rows_and_gains(variants([*students, *baselines]), "accuracy")
    assert [(row["title"], row["arch"], row["runs"]) for row in rows] == [
        ("s", "resnet18", ["s-seed0", "s-seed1"]), ("b", "resnet18", ["b-seed0", "b-seed1"])]
    [gain] = gains
    assert (gain["title"], gain["minus"], gain["pairs"], gain["students"]) == ("s", "b", 2, 2)
    assert rows[0]["validation"]["mean"] == sum(run["validation"]["accuracy"] for run in students) / 2
    for k in NAMES:
        assert set(gain["figures"][k]) == {"mean", "sd", "low", "high"} == set(rows[0]["figures"][k])
        values = [[run["figures"][k] for run in runs] for runs in (students, baselines)]
        for row, two in zip(rows, values, strict=True):
            assert row["figures"][k]["mean"] == pytest.approx(sum(two) / 2), k
            assert row["figures"][k]["sd"] == pytest.approx(abs(two[0] - two[1]) / 2**0.5), k
        assert gain["figures"][k]["mean"] == pytest.approx((sum(values[0]) - sum(values[1])) / 2), k
    json.dumps([rows, gains])  # plain values
    told, below, _ = column(tables([*students, *baselines])[:-1], "accuracy")
    figure = rows[1]["figures"]["accuracy"]
    assert told["b"] == f"{100 * figure['mean']:.1f} ± {100 * figure['sd']:.1f}"
    assert below["b"] == f"[{100 * figure['low']:.1f} {100 * figure['high']:.1f}]"


def test_a_cell_of_the_grid_holds_means_and_the_spread_of_test_accuracy():
    labels = torch.arange(40) % 2
    runs = [judged(f"s{T}-seed{i}", torch.randn(40, 2), labels, NORMAL, i, role="student", T=float(T),
                   teachers=[teacher(arch="vgg11")]) for T in (1, 20) for i in range(2)]
    for i, run in enumerate(runs):
        run["validation"] = {"accuracy": 0.6 + 0.3 * (i % 2)}
        run["facts"]["train_accuracy"] = math.nan if run["config"]["T"] == 20 else 0.8 + 0.2 * (i % 2)
    head, *lines = evaluate.grid(variants(runs))[1:]
    assert head.split("  ")[-1].strip() == "resnet18" and lines[0].startswith("vgg11 ") and len(lines) == 2
    for line, T, train_accuracy, pair in ((lines[0], 1, "90.0", runs[:2]), (lines[1], 20, "n/a", runs[2:])):
        values = 100 * torch.tensor([run["figures"]["accuracy"] for run in pair], dtype=torch.float64)
        told = f"T {T}, alpha 0.9: {train_accuracy} / 75.0 / {values.mean():.1f} ± {values.std():.1f}"
        assert line.endswith(told) and 0 < values.std() < 14  # of the others 14.1 and 21.2


# ---- runs, without their training


ARCH = "shufflenet_v2_x0_5"  # small, and its last layer is the linear fc


def save_run(folder, source="phantoms", role="baseline", network=0, size=32, bias=None, **flags):
    """Save a run as train.py leaves it, of random weights; runs of one `network` share them. bias: all its logits."""
    args = train.get_args(["--role", role, "--arch", ARCH, "--epochs", "1"])
    vars(args).update({"data": str(source), "size": size, "out": folder, **flags})
    loaded = data.load_as(vars(args), size, ("train", "val"), "cache")
    torch.manual_seed(network)
    model = models.build(ARCH, len(loaded.classes), size).eval()
    with torch.no_grad():  # it calls about half of all images either class
        logits = models.forward(model, data.prepare(loaded.train.images, CPU))[0]
        model.fc.bias.sub_(logits.median(0).values)
        if bias is not None:
            model.fc.weight.zero_()
            model.fc.bias.copy_(torch.tensor(bias))
    val_inputs = models.from_images(loaded.val.images, CPU)
    validation = metrics(evaluate.predict(model, val_inputs, len(loaded.val.ids), CPU), loaded.val.labels,
                         loaded.classes)
    models.save_checkpoint(
        Path(folder) / "best.pt", model, **train.run_facts(args, loaded, model, []), history=[{"epoch": 1}],
        last=None, epoch=1, train_accuracy=0.5, validation=validation)
    return folder


@pytest.mark.parametrize("source", ["phantoms", "findings"])
def test_predictions_keep_probabilities_that_float32_rounds_to_1(few_phantoms, source):
    bias = [0.0, 20.0] if source == "phantoms" else [20.0] * 3
    save_run("run", source, bias=bias, wrong_labels=0.0, labels_per_class=None)
    evaluate.main(["run"])
    sure = "PNEUMONIA" if source == "phantoms" else "FLUID"
    p = {float(row[sure]) for row in data.read_csv("run/predictions.csv")}
    assert torch.tensor(20.0).sigmoid() == 1 and p == {torch.tensor(20.0).double().sigmoid().item()}


def test_other_pixels_of_the_same_names_and_lengths_are_told(kermany, capsys):
    def save(turn):
        for path in kermany.glob("train/*/[!._]*.jpeg"):
            with Image.open(path) as image:
                pixels = turn(image.convert("L"))
            pixels.save(path, "BMP")  # not compressed, so a negative has the same length

    save(lambda image: image)
    save_run("run", kermany)
    evaluate.main(["run"])
    assert "have changed since training" not in capsys.readouterr().out
    save(ImageOps.invert)
    evaluate.main(["run"])
    assert "images of " + str(kermany) + " have changed since training" in capsys.readouterr().out


def test_an_interval_draws_patients_and_not_their_images(tmp_path):
    """Eight images of each of a few patients, all alike: by images the interval would be far too narrow."""
    root = tmp_path / "images"
    for split, patients in (("train", 6), ("test", 10)):
        for k, name in enumerate(NORMAL):
            for i in range(patients):
                first = image_file(root / f"{split}/{name}/patient{1000 * (split == 'test') + 100 * k + i}_0.png")
                for j in range(1, 8 if split == "test" else 2):
                    shutil.copy(first, str(first).replace("_0.png", f"_{j}.png"))
    save_run("run", root)
    evaluate.main(["run"])
    right = {}
    for row in data.read_csv("run/predictions.csv"):
        called = float(row["PNEUMONIA"]) > float(row["NORMAL"])
        right.setdefault(row["patient"], []).append(called == (row["label"] == "1"))
    shares = [sum(calls) / len(calls) for calls in right.values()]
    assert len(shares) == 20 and set(shares) == {0.0, 1.0}  # a patient's images are called alike
    low, high = stored("run")["test"]["interval"]["accuracy"]
    wanted = brute_interval(torch.tensor([shares]))
    assert low == pytest.approx(wanted[0], abs=0.051) and high == pytest.approx(wanted[1], abs=0.051)
    assert high - low > 0.3  # of 160 images: at most 0.16


def test_the_runs_of_a_table_are_judged_by_the_same_samples(few_phantoms):
    """A student that is its baseline gains nothing, in no sample: with samples of its own it would seem to."""
    save_run("baseline")
    save_run("student", role="student", alpha=0.0)
    evaluate.main(["baseline", "student", "--json", "all.json"])
    [gain] = json.loads(open("all.json").read())["gains"]
    assert stored("student")["test"]["interval"]["accuracy"][0] < stored("student")["test"]["interval"]["accuracy"][1]
    assert {k: gain["figures"][k] for k in NAMES} == {k: {"mean": 0, "sd": None, "low": 0, "high": 0} for k in NAMES}


def test_every_run_is_validated_on_the_validation_images_of_its_own_flags(kermany):
    runs = {save_run(f"run{fraction}", kermany, val_fraction=fraction): fraction for fraction in (0.1, 0.4)}
    evaluate.main(list(runs))
    for folder, fraction in runs.items():
        labels = data.load(kermany, 32, ("val",), val_fraction=fraction).val.labels
        rows = [sum(row) for row in stored(folder)["validation"]["confusion"]]
        assert rows == labels.bincount().tolist(), fraction
        assert stored(folder)["validation"]["confusion"] == models.load_checkpoint(folder)[1]["validation"]["confusion"]


def test_a_folder_of_runs_stands_for_the_runs_in_it(few_phantoms, capsys):
    for name, lr in (("a", 0.1), ("b", 0.2), ("begun", 0.3)):
        save_run(f"runs/demo/{name}", lr=lr)
    Path("runs/demo/begun/best.pt").unlink()
    evaluate.main(["runs/demo", "--json", "all.json"])
    assert set(json.loads(open("all.json").read())["runs"]) == {"runs/demo/a", "runs/demo/b"}
    evaluate.main(["runs/demo/a", "runs/demo/begun"])
    assert "no best.pt, or not yet, in runs/demo/begun: left out" in capsys.readouterr().out
    Path("empty").mkdir()
    for paths in (["runs/demo/begun"], ["empty", "nowhere"]):
        with pytest.raises(data.UserError, match=f"no best.pt in {', '.join(paths)}") as error:
            evaluate.main(paths)
        assert "\n" not in str(error.value) and capsys.readouterr().out == ""


def test_runs_that_are_judged_by_other_labels_share_no_table(kermany):
    shutil.copytree(kermany, "other/chest_xray")
    first = Path("other/chest_xray/test/NORMAL/IM-0100-0001-0002.jpeg")
    first.rename(first.parent.with_name("PNEUMONIA") / first.name)  # the same image with another label
    runs = [save_run("a", kermany), save_run("b", "other/chest_xray", seed=1)]
    with pytest.raises(data.UserError, match="different test images or classes"):
        evaluate.main(runs)
    evaluate.main([runs[0]])


def test_a_folder_typed_in_two_ways_or_moved_is_the_same(kermany, capsys):
    runs = [save_run("a", "chest_xray"), save_run("b", "./chest_xray", seed=1)]
    evaluate.main(runs)
    assert ", 2 seeds " in capsys.readouterr().out
    kermany.rename("moved")
    evaluate.main([*runs, "--data", "moved"])
    said = capsys.readouterr().out
    assert ", 2 seeds " in said and "have changed since" not in said
    assert stored("a")["data"] == "moved"  # where they were read


def test_tables_are_shown_though_no_file_can_be_written(few_phantoms, capsys):
    save_run("run")
    evaluate.main(["run", "--json", "all.json"])
    before = capsys.readouterr().out
    assert before.splitlines()[-1] == "written: metrics.json and predictions.csv in each run's folder, all.json"
    evaluate.main(["run"])
    assert capsys.readouterr().out.splitlines()[-1].endswith("folder; --json FILE keeps the tables")
    table = before[: before.index("\nwritten")]
    two = "metrics.json or predictions.csv of run"
    for name, told in (("run/metrics.json", two), ("run/predictions.csv", two), ("all.json", "all.json")):
        Path(name).unlink()
        Path(name).mkdir()  # a name that cannot be written to
        with pytest.raises(data.UserError, match=f"^{told} could not be written") as error:
            evaluate.main(["run", "--json", "all.json"])
        assert capsys.readouterr().out.startswith(table) and "\n" not in str(error.value)
        Path(name).rmdir()
        Path(name).touch()


@pytest.mark.parametrize("name", ["auc", "calibration_error", "interval", "cell", "metrics"])
def test_a_mistake_in_a_metric_comes_out_as_itself(name, few_phantoms, monkeypatch):
    save_run("run")

    def mistaken(*args):
        return undefined_name  # noqa: F821

    monkeypatch.setattr(evaluate, name, mistaken)
    with pytest.raises(NameError, match="undefined_name"):
        evaluate.main(["run"])


def test_a_checkpoint_that_is_not_a_runs_is_one_line(few_phantoms):
    models.save_checkpoint(Path("net/best.pt"), models.build("squeezenet1_1", 2, 32), classes=NORMAL, multilabel=False)
    with pytest.raises(data.UserError, match="net/best.pt was not made by train.py") as error:
        evaluate.main(["net"])
    assert "\n" not in str(error.value)


# ---- runs, trained


@pytest.fixture
def three_runs(few_phantoms):
    fit("--out", "runs/teacher")
    fit("--out", "runs/baseline", role="baseline")
    fit("--out", "runs/student", "--teacher", "runs/teacher", role="student")
    return ["runs/teacher", "runs/baseline", "runs/student"]


def stored(folder):
    return json.loads((Path(folder) / "metrics.json").read_text())


def test_one_table_holds_floor_runs_and_gain(three_runs, capsys):
    capsys.readouterr()
    evaluate.main([*three_runs, "--json", "all.json"])
    text = capsys.readouterr().out
    kept = json.loads(open("all.json").read())
    assert kept["runs"] == {run: stored(run) for run in three_runs}
    assert text.startswith("\n".join(kept["tables"]) + "\n")
    assert [row["title"] for row in kept["rows"]] == ["teacher", "baseline", "student"]
    assert [row["runs"] for row in kept["rows"]] == [[run] for run in three_runs]
    assert [(gain["title"], gain["minus"]) for gain in kept["gains"]] == [("student", "baseline")]
    for wanted in ("always NORMAL ", "teacher ", "  squeezenet1_1 ", "baseline ", "student ",
                   "positive: PNEUMONIA", "16 test images", "  minus baseline "):
        assert f"\n{wanted}" in text, wanted
    told, below, _ = column(kept["tables"], "accuracy")
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
        assert run["trained_by"]["commit"] and run["judged_by"]["torch"] and run["config"]["seed"] == 0
        assert run["images"] == run["patients"] == 16 and run["classes"] == ["NORMAL", "PNEUMONIA"]
        assert run["epoch"] == asked["epoch"] and run["cost"]["parameters"] > 7e5
        assert run["validation"]["accuracy"] == pytest.approx(asked["validation"]["accuracy"])


def test_the_report_has_more_columns_and_the_figures_of_each_class_and_fits_a_screen(few_phantoms, capsys):
    args = fit("--out", "runs/teacher-squeezenet1_1-lr0.01-epochs2-batchsize8-seed0")
    capsys.readouterr()
    evaluate.main([args.out])
    assert not any(name in capsys.readouterr().out for name in ("precision", "f1", "loss", "weighted avg"))
    evaluate.main([args.out, "--report"])
    text = capsys.readouterr().out
    at = stored(args.out)["test"]
    low, high = at["interval"]["loss"]
    assert f" {at['loss']:.3f}\n" in text and f" [{low:.3f} {high:.3f}]\n" in text
    for wanted in (*evaluate.MORE, "weighted avg", "images called", f"{args.out}: best on validation in epoch"):
        assert wanted in text, wanted
    assert max(map(len, text.splitlines())) <= 115


def test_a_run_given_twice_or_copied_is_not_two_seeds(few_phantoms):
    fit("--out", "runs/a")
    shutil.copytree("runs/a", "runs/copy")
    for twice in (["runs/a", "runs/a/best.pt"], ["runs/a", "runs/copy"], ["runs", "runs/a"]):
        with pytest.raises(data.UserError, match="they would count as two seeds"):
            evaluate.main(twice)


def test_a_folder_that_has_changed_since_is_told(kermany, capsys):
    args = fit("--data", str(kermany), "--weights", "none", "--finetune", "all")
    for i in range(20, 40):
        image_file(kermany / f"train/NORMAL/IM-{i:04d}-0001.jpeg")
    shutil.rmtree(kermany / "val")
    try:
        evaluate.main([args.out])
    except data.UserError as error:  # the new split may hold patients of training
        assert "was trained on" in str(error)
    else:
        assert f"images of {kermany} have changed since training" in capsys.readouterr().out


def test_an_unfinished_run_is_judged_and_named_so(few_phantoms, capsys):
    model, facts = models.load_checkpoint(save_run("run"))
    facts["config"]["epochs"], facts["last"] = 2, {"model": model.state_dict()}
    models.save_checkpoint("run/best.pt", model, **facts)
    evaluate.main(["run"])
    assert re.search(rf"\n  {ARCH}, .*1 of 2", capsys.readouterr().out)


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
    args = fit("--data", str(kermany), "--weights", "none", "--finetune", "all")
    findings = fit("--data", "findings", "--recipe", "findings")
    for out, classes in ((args.out, ["NORMAL", "PNEUMONIA"]), (findings.out, ["OPACITY", "LARGE_HEART", "FLUID"])):
        evaluate.main([out])
        rows = data.read_csv(Path(out) / "predictions.csv")
        p = torch.tensor([[float(row[name]) for name in classes] for row in rows]).double()
        if out == args.out:
            assert len(rows) == 12 and {row["patient"] for row in rows if "virus" in row["image"]} == {
                f"person{i}_virus" for i in range(100, 104)}
            labels = torch.tensor([int(row["label"]) for row in rows])
            assert [classes[k] in row["image"] for k, row in zip(labels, rows, strict=True)] == [True] * 12
            assert torch.allclose(p.sum(1), torch.ones(12).double(), atol=1e-6)
            again = metrics(p.log(), labels, classes)
        else:
            labels = torch.tensor([[float(row[f"label {name}"]) for name in classes] for row in rows])
            again = metrics(p.logit(), labels, classes)
        for name in ("accuracy", "auc"):
            assert stored(out)["test"][name] == pytest.approx(again[name], abs=1e-4), name


def test_decoded_images_are_kept_in_the_cache_of_evaluate(few_phantoms):
    args = fit("--cache", "of-the-training")
    assert models.load_checkpoint(args.out)[1]["config"]["cache"] == "of-the-training"
    for flags, folder in (([], "cache"), (["--cache", "mine"], "mine")):
        shutil.rmtree("of-the-training", ignore_errors=True)
        shutil.rmtree("cache", ignore_errors=True)
        evaluate.main([args.out, *flags])
        assert any(Path(folder).glob("*-test-*.npy"))
        assert not Path("of-the-training").exists() and Path("cache").exists() == (folder == "cache")


def test_runs_of_other_images_or_classes_do_not_share_a_table(few_phantoms, kermany):
    phantoms = fit()
    images = fit("--data", str(kermany), "--weights", "none", "--finetune", "all")
    three = fit("--data", str(kermany), "--weights", "none", "--finetune", "all", "--classes", "3", "--out", "three")
    for pair in ([phantoms.out, images.out], [images.out, three.out]):
        with pytest.raises(data.UserError, match="different test images or classes"):
            evaluate.main(pair)


def test_a_run_is_not_judged_on_its_training_patients(kermany):
    args = fit("--data", str(kermany), "--weights", "none", "--finetune", "all")
    for image in (kermany / "train/NORMAL").glob("IM-*.jpeg"):
        (kermany / "test/NORMAL" / image.name).write_bytes(image.read_bytes())
    with pytest.raises(data.UserError, match="was trained on IM-.*, a validation or test patient"):
        evaluate.main([args.out])


def test_a_student_is_not_judged_on_its_teachers_training_patients(few_phantoms):
    fit("--out", "t")
    model, facts = models.load_checkpoint("t")
    models.save_checkpoint("t/best.pt", model, **{**facts, "seen_groups": ["patient-of-the-teacher"]})
    fit("--out", "s", "--teacher", "t", role="student")
    model, facts = models.load_checkpoint("s")
    assert "patient-of-the-teacher" in facts["seen_groups"]  # a student remembers whom its teacher saw
    seen = [*facts["seen_groups"], "phantom-test-3"]
    models.save_checkpoint("s/best.pt", model, **{**facts, "seen_groups": seen})
    with pytest.raises(data.UserError, match="s was trained on phantom-test-3, a validation or test"):
        evaluate.main(["s"])


def test_classes_other_than_those_of_training_are_refused(kermany, few_phantoms):
    args = fit()
    for split in ("train", "test", "val"):
        (kermany / split / "PNEUMONIA").rename(kermany / split / "COVID")
    with pytest.raises(data.UserError, match="'PNEUMONIA'.*'COVID'"):
        evaluate.main([args.out, "--data", str(kermany)])


@pytest.mark.parametrize("name", ["meta", "mps", "cuda", "cuda:99", "cuda:-1", "cuda:x", "cuda:", "gpu", ""])
def test_a_device_that_is_not_there_is_said_whole(name, capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", type=evaluate.usable_device)
    assert parser.parse_args(["--device", "cpu"]).device == "cpu"
    with pytest.raises(SystemExit):
        parser.parse_args(["--device", name])
    assert f"argument --device: {name} is no device of this machine. Expected cpu, or cuda or cuda:N " in capsys.readouterr().err


def test_of_two_gpus_the_third_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("cpu", "cuda", "cuda:0", "cuda:1"):
        assert evaluate.usable_device(name) == name
    with pytest.raises(argparse.ArgumentTypeError, match="^cuda:2 is no device of this machine"):
        evaluate.usable_device("cuda:2")
