"""Figures against brute force, closed forms and committed values of scikit-learn 1.7 on the same inputs."""

import argparse
import itertools
import json
import math
import random
import re
import shutil
import statistics
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
    rows_and_gains,
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


def test_binary_figures_against_hand_counts():
    m = metrics(LOGITS, LABELS)
    assert m["confusion"] == [[2, 1], [1, 3]]
    wanted = {"accuracy": 5 / 7, "specificity": 2 / 3, "sensitivity": 3 / 4, "precision": 3 / 4, "f1": 3 / 4}
    for name, value in wanted.items():
        assert m[name] == pytest.approx(value, abs=1e-12), name
    # logit margins of positives 1, -.5, 2, .5 against negatives -2, .5, -1: 10 wins, 1 tie, 1 loss
    assert m["auc"] == pytest.approx(10.5 / 12, abs=1e-12)


def test_accuracy_is_right_calls_over_all_images():
    logits, labels = torch.randn(101, 2), torch.randint(2, (101,))
    m = metrics(logits, labels)
    (tn, fp), (fn, tp) = m["confusion"]
    assert tn + fp + fn + tp == 101 and m["accuracy"] == pytest.approx((tp + tn) / 101, abs=1e-12)
    assert m["sensitivity"] == pytest.approx(tp / (tp + fn)) and m["specificity"] == pytest.approx(tn / (tn + fp))


def test_predict_reads_every_row_once_and_in_order():
    model = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(4, 2)).train()
    rows = torch.randn(131, 4)  # more than two batches, the last of them short
    said = evaluate.predict(model, models.from_tensor(rows, CPU), len(rows), CPU)
    assert said.shape == (131, 2) and torch.allclose(said, model[1](rows), atol=1e-6)


def test_auc_is_the_share_of_pairs_won():
    for _ in range(5):
        scores, truth = torch.randint(6, (60,)).double(), torch.randint(2, (60,))
        copies = torch.randint(0, 3, (60,))
        copied = scores.repeat_interleave(copies), truth.repeat_interleave(copies)
        pairs = [(a, b) for a in copied[0][copied[1] == 1] for b in copied[0][copied[1] == 0]]
        brute = sum(bool(a > b) + bool(a == b) / 2 for a, b in pairs) / len(pairs)
        assert auc(scores, truth, copies[None].double()).item() == pytest.approx(float(brute), abs=1e-12)


def test_images_of_very_sure_networks_do_not_tie():
    margins = torch.tensor([38.0, 39.0, 41.0, 45.0, 60.0, 80.0])  # each rounds to a probability of 1
    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    assert (margins.double().sigmoid() == 1).sum() >= 5
    logits = torch.stack([torch.zeros(6), margins], 1)
    assert metrics(logits, labels)["auc"] == pytest.approx(6 / 9)  # 39 beats 38; 45 two; 80 three
    assert metrics(-logits, labels)["auc"] == pytest.approx(3 / 9)


def test_auc_of_three_sure_classes_against_decimals():
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
    assert metrics(logits, labels)["auc"] == pytest.approx(brute, abs=1e-12)


def test_equal_odds_tie_in_any_order_of_classes():
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
    assert metrics(logits, labels)["auc"] == pytest.approx(wanted, abs=1e-12)


def test_auc_of_a_single_class_is_not_a_number():
    assert math.isnan(auc(torch.rand(5), torch.ones(5), ones(5)).item())


def test_calibration_error_of_one_confidence():
    confidence, right = torch.full((10,), 0.7, dtype=torch.float64), torch.tensor([True] * 7 + [False] * 3)
    assert calibration_error(confidence, right, ones(10)).item() == pytest.approx(0, abs=1e-12)
    sure = torch.full((10,), 0.99, dtype=torch.float64)
    assert calibration_error(sure, right, ones(10)).item() == pytest.approx(0.29, abs=1e-9)


def test_calibration_error_against_loops():
    confidence = torch.rand(400).double() / 2 + 0.5
    right = torch.rand(400) < confidence + 0.4 * torch.sin(30 * confidence)  # gaps of both signs, whose bins do not merge

    def gaps(bins):
        inside = [(confidence * bins).long().clamp(max=bins - 1) == b for b in range(bins)]
        return [(confidence[i] - right[i].double()).sum().item() / 400 for i in inside if i.any()]

    brute = {bins: sum(map(abs, gaps(bins))) for bins in (5, 10, 15, 20)}
    assert min(gaps(15)) < -0.001 and max(gaps(15)) > 0.001 and len({f"{v:.3f}" for v in brute.values()}) == 4
    assert calibration_error(confidence, right, ones(400)).item() == pytest.approx(brute[15], abs=1e-12)


def test_three_class_figures_are_macro_means():
    logits, labels = torch.randn(90, 3), torch.randint(3, (90,))
    m, called = metrics(logits, labels), logits.argmax(1)
    assert m["accuracy"] == pytest.approx((called == labels).double().mean().item())
    recalls = [(called[labels == c] == c).double().mean().item() for c in range(3)]
    specs = [(called[labels != c] != c).double().mean().item() for c in range(3)]
    assert m["sensitivity"] == pytest.approx(sum(recalls) / 3) and m["specificity"] == pytest.approx(
        sum(specs) / 3
    )
    assert m["confusion"] == [
        [((labels == i) & (called == j)).sum().item() for j in range(3)] for i in range(3)
    ]


def test_findings_have_one_value_each():
    logits, labels = torch.randn(50, 3), torch.randint(2, (50, 3)).float()
    labels[:10, 1] = math.nan
    m = metrics(logits, labels)
    for k, rows in ((0, slice(None)), (1, slice(10, None))):
        z = torch.stack([torch.zeros(50), logits[:, k]], 1)[rows]
        alone = metrics(z, labels[rows, k].long())
        for name in NAMES:
            assert m[name][k] == pytest.approx(alone[name], abs=1e-9), name
        assert m["confusion"][k] == alone["confusion"]


def test_a_finding_is_positive_above_logit_0():
    m = metrics(torch.tensor([[0.2], [-0.2], [0.7], [-0.7], [0.0]]), torch.tensor([[1.0], [0], [0], [1], [0]]))
    assert m["confusion"] == [[[2, 1], [1, 1]]] and m["accuracy"] == [0.6]


def test_the_loss_is_the_weighted_cross_entropy():
    z, labels = torch.tensor([[0.0, 0.0], [0.0, math.log(3)]]), torch.tensor([1, 0])  # told 1/2 and 1/4
    assert metrics(z, labels)["loss"] == pytest.approx(1.5 * math.log(2), abs=1e-7)
    weights = torch.tensor([[3.0, 1.0]])
    assert measure(z, labels, weights)["loss"].item() == pytest.approx(1.25 * math.log(2), abs=1e-7)


def test_logits_that_are_not_finite_are_refused():
    with pytest.raises(data.UserError, match="diverged"):
        metrics(torch.tensor([[math.nan, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]))


# ---- a threshold


def best_other_rate(scores, labels, rate, share):
    """Try all thresholds: of those with the rate that is asked for, return the best other rate."""
    found, values = [], sorted(set(scores))
    for edge in [values[0] - 1, *((a + b) / 2 for a, b in itertools.pairwise(values)), values[-1] + 1]:
        right = {k: [(z > edge) == k for z, y in zip(scores, labels, strict=True) if y == k] for k in (0, 1)}
        shares = {"sensitivity": sum(right[1]) / len(right[1]), "specificity": sum(right[0]) / len(right[0])}
        reached = shares.pop(rate)
        found += [*shares.values()] if reached >= share - 1e-12 else []
    return max(found)


@pytest.mark.parametrize("rate", ["sensitivity", "specificity"])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.7, 0.9, 0.95, 1.0])
def test_a_threshold_is_the_best_of_all(rate, share):
    other = {"sensitivity": "specificity", "specificity": "sensitivity"}[rate]
    for n in (2, 3, 10, 20, 40, 40, 100):  # ties: up to nine different scores
        logits, labels = torch.randint(-4, 5, (n, 2)).float(), torch.arange(n) % 2
        logits[:, 0] = 0
        scores = (logits[:, 1] - logits[:, 0]).tolist()
        edge = evaluate.choose_threshold(logits, labels, rate, share)
        m = metrics(logits, labels, edge)
        assert m[rate] >= share - 1e-12 and m[other] == best_other_rate(scores, labels.tolist(), rate, share)
        assert edge not in scores  # an image just below or above is called as its equal was


# ---- intervals


def test_bootstrap_figures_are_those_of_the_sample():
    groups = [f"p{i // 2}" for i in range(40)]
    logits, labels = torch.randn(40, 2), torch.arange(40) % 2
    weights = bootstrap_weights(groups, repeats=5)
    samples = measure(logits, labels, weights)
    assert weights.shape == (6, 40) and (weights[0] == 1).all()  # first the images themselves
    for r in range(6):
        rows = torch.arange(40).repeat_interleave(weights[r].long())
        again = metrics(logits[rows], labels[rows])
        for name in NAMES:
            assert samples[name][r].item() == pytest.approx(again[name], abs=1e-9), name


def test_patients_are_drawn_whole():
    groups = ["a", "b", "a", "c", "b", "a"]
    weights = bootstrap_weights(groups, repeats=200)
    assert torch.equal(weights[:, 0], weights[:, 2]) and torch.equal(weights[:, 0], weights[:, 5])
    assert ((weights[:, 0] + weights[:, 1] + weights[:, 3]) == 3).all()
    assert torch.equal(weights, bootstrap_weights(groups, repeats=200))


def test_an_interval_is_the_middle_95_percent():
    uniform = torch.arange(1001)[torch.randperm(1001)] / 1000  # whose quantiles are known
    assert interval(uniform).tolist() == pytest.approx([0.025, 0.975], abs=1e-6)
    normal = torch.distributions.Normal(3.0, 2.0).icdf((torch.arange(20000) + 0.5).double() / 20000)
    assert interval(normal).tolist() == pytest.approx([3 - 1.95996 * 2, 3 + 1.95996 * 2], abs=2e-3)
    with_gaps = torch.cat([uniform, torch.full((500,), math.nan)])  # samples of one class
    assert interval(with_gaps).tolist() == pytest.approx([0.025, 0.975], abs=1e-6)
    two = interval(torch.stack([uniform, 2 * uniform], 1))  # a column a finding
    assert torch.allclose(two, torch.tensor([[0.025, 0.05], [0.975, 1.95]]).double(), atol=1e-6)


def test_shared_patients_widen_an_interval():
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


def test_the_interval_of_seeds_against_loops():
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


def test_the_interval_of_a_gain_against_loops():
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


def test_two_seeds_are_drawn_like_two_coins():
    apart = torch.tensor([0.0, 1.0])[:, None].expand(2, 8001)  # the seeds differ, the patients do not
    drawn = over_seeds(apart)[1:]
    for value, share in ((0, 0.25), (0.5, 0.5), (1, 0.25)):
        assert (drawn == value).double().mean().item() == pytest.approx(share, abs=0.02)
    same = torch.arange(101.0).expand(3, 101)  # the samples differ, the seeds do not
    assert torch.equal(over_seeds(same), torch.arange(101.0))


def test_one_seed_has_no_deviation():
    samples = torch.cat([torch.tensor([0.5]), torch.arange(1001) / 1000])
    figure = summary([samples])
    assert math.isnan(figure.pop("sd")) and figure == pytest.approx({"mean": 0.5, "low": 0.025, "high": 0.975})
    figure = summary([samples])
    assert cell(figure) == "50.0\n[2.5 97.5]" and cell(figure, sign="+") == "+50.0\n[+2.5 +97.5]"
    assert cell(figure, "loss") == "0.500\n[0.025 0.975]"  # no percentage
    assert cell(summary([torch.tensor([0.5]), torch.tensor([0.7])])) == "60.0 ± 14.1"  # no samples, no interval


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
    return {"config": config, "folder": Path(folder), "facts": {"last": None, "train_accuracy": 0.5}, "state": "",
            "validation": {"accuracy": 0.5},
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


def test_a_gain_is_over_a_like_baseline():
    assert has_gain(a_run("student"), a_run("baseline"))
    assert has_gain(a_run("student", T=8.0, alpha=0.5, teachers=[teacher(arch="vgg11")]), a_run("baseline"))
    assert has_gain(a_run("student", alpha=0.0, teachers=[]), a_run("baseline"))


@pytest.mark.parametrize("flag, value", [
    ("lr", 0.123), ("batch_size", 7), ("optimizer", "adam"), ("clip", 0.5), ("label_smoothing", 0.1),
    ("val_fraction", 0.3), ("seed", 5), ("epochs", 3), ("arch", "alexnet"), ("size", 64), ("augment", True),
    ("wrong_labels", 0.4), ("labels_per_class", 3), ("lr_gamma", 0.5), ("steps_per_epoch", 9),
    ("input", "residual"), ("weight_decay", 0.1), ("precision", "bfloat16"),
])
def test_a_baseline_of_other_flags_gives_no_gain(flag, value):
    assert a_run()["config"][flag] != value
    assert not has_gain(a_run("student"), a_run("baseline", **{flag: value}))
    assert has_gain(a_run("student", **{flag: value}), a_run("baseline", **{flag: value}))


def test_a_gain_is_a_students_over_a_baseline():
    roles, same = ("teacher", "baseline", "student"), a_run("student")["config"]
    runs = {role: a_run(role) | {"config": {**same, "role": role}} for role in roles}
    assert {(a, b) for a in roles for b in roles if has_gain(runs[a], runs[b])} == {("student", "baseline")}


def test_runs_of_other_seeds_share_a_row():
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


def test_other_teachers_of_teachers_share_no_row():
    taught = [teacher(i, role="student", teachers=[teacher(arch=arch)]) for i, arch in enumerate(("vgg11", "vgg13"))]
    runs = [a_run("student", f"s{i}", i, [each]) for i, each in enumerate(taught)]
    assert len(variants(runs)) == 2


@pytest.mark.parametrize("what, value", [
    ("train", "other labels"), ("val", "other labels"), ("test", "other labels"), ("processes", 2),
    ("train_pixels", "other pixels"), ("val_pixels", "other pixels"), ("epoch_length", 40),
    ("precision", "bfloat16"), ("first_weights", "a file"),
])
def test_runs_of_other_images_or_steps_do_not_mix(what, value):
    runs = [a_run("student", "s", 0), a_run("baseline", "b", 0), a_run("student", "t", 1)]
    assert runs[0]["config"][what] != value
    assert has_gain(*runs[:2]) and len(variants(runs[::2])) == 1
    for run in runs[1:]:
        run["config"][what] = value
    assert not has_gain(*runs[:2]) and len(variants(runs[::2])) == 2


@pytest.mark.parametrize("name", ["data", "teacher", "weights", "out", "cache", "recipe", "device"])
def test_paths_and_machines_separate_no_runs(name):
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


def judged(name, logits, labels, classes=NORMAL, seed=0, done=None, last=None, commit="abc", val="hash of val", **changes):
    """Return a run as the table takes it, of any logits. done: its epochs so far, otherwise all."""
    split = SimpleNamespace(labels=labels, groups=list(range(len(labels))))
    figures, record = metrics(logits, labels), a_run(folder=name, seed=seed, val=val, **changes)
    epochs = record["config"]["epochs"] if done is None else done
    facts = {"config": record["config"], "history": [{}] * epochs, "last": last, "train_accuracy": 0.5,
             "provenance": {"commit": commit}}
    return record | {
        "state": models.state_of(facts), "facts": facts, "cost": {"parameters": 1e6}, "threshold": 0.0,
        "data": SimpleNamespace(test=split, classes=classes, multilabel=labels.dim() == 2, fingerprints={"val": val}),
        "validation": figures, "test": logits, "figures": figures,
        "samples": measure(logits, labels, bootstrap_weights(split.groups, 300)),
    }


def tables(records, columns=evaluate.COLUMNS):
    """Return the lines that evaluate.py prints of these runs."""
    multilabel, groups = records[0]["data"].multilabel, variants(records)
    score = "auc" if multilabel else "accuracy"
    rows, gains = rows_and_gains(groups, score)
    text = evaluate.table(groups, rows, gains, columns, score)
    text += evaluate.findings(groups, rows) if multilabel else []
    return [*text, "", *notes(records)]


def notes(records):
    return list(evaluate.notes(records))


def students_and_baselines(n, **changes):
    """Return n students and n baselines, of a seed each. changes: of the baselines."""
    labels, runs = torch.arange(40) % 2, []
    for role in ("student", "baseline"):
        for i in range(n):
            logits = torch.stack([torch.zeros(40), (labels - 0.5) * i * (1 + (role == "student")) + torch.randn(40)], 1)
            runs.append(judged(f"{role[0]}-seed{i}", logits, labels, seed=i, role=role,
                               **changes if role == "baseline" else {"T": 8.0}))
    return runs[:n], runs[n:]


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


def test_a_rare_finding_is_left_out_of_the_mean():
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


def test_a_rare_finding_is_left_out_of_every_seed():
    labels = torch.randint(2, (60, 2)).float()
    labels[:, 1] = (torch.arange(60) == 3).float()
    runs = [judged(f"a-seed{i}", torch.randn(60, 2) + labels * i, labels, ["OFTEN", "RARE"], i) for i in range(2)]
    wanted = cell(summary([run["samples"]["auc"][:, 0] for run in runs]))
    told, below, names = column(tables(runs), "auc")
    assert f"{told['a']}\n{below['a']}" == wanted and names["a"] == "resnet18, 2 seeds"


def test_rows_tell_unfinished_and_defective_runs():
    logits, labels = torch.randn(40, 2), torch.arange(40) % 2

    def told(*runs):
        return column(tables([judged(*run[:1], logits, labels, ["a", "b"], epochs=6, **run[1]) for run in runs]),
                      "accuracy")[2]

    names = told(("part", {"done": 2, "last": {}}), ("whole", {"lr": 0.5}), ("stopped", {"done": 2, "stop_at": 0.7}))
    assert names["whole"] == "resnet18" and names["stopped"] == "resnet18, stopped at 0.7"
    assert names["part"].startswith("resnet18, ") and "2 of 6" in names["part"]
    seeds = told(("x-seed0", {}), ("x-seed1", {"seed": 1, "done": 5, "last": {}}), ("x-seed2", {"seed": 2}))
    assert seeds["x"] == "resnet18, 2 seeds" and "5 of 6" in seeds["x-seed1"]  # which has a row of its own


def test_a_gain_tells_how_many_seeds_it_rests_on():
    students, baselines = students_and_baselines(3)
    for n, told in ((3, "  minus b "), (2, "  minus b, 2 of 3 ")):
        assert any(line.startswith(told) for line in tables([*students, *baselines[:n]])), told


@pytest.mark.parametrize("unfinished", ["student", "baseline"])
def test_unfinished_runs_give_no_gain(unfinished):
    runs = {role: judged(role, torch.randn(40, 2), torch.arange(40) % 2, role=role, teachers=[],
                         **{"done": 2, "last": {}} if role == unfinished else {}) for role in ("student", "baseline")}
    rows, gains = rows_and_gains(variants([*runs.values()]), "accuracy")
    state = f", unfinished (2 of {runs['student']['config']['epochs']} epochs)"
    assert {row["title"]: row["state"] for row in rows} == {"student": "", "baseline": "", unfinished: state}
    assert gains == [] and not any("minus" in line for line in tables([*runs.values()]))
    assert [line for line in notes([*runs.values()]) if "unfinished" in line and line.startswith(unfinished)]


def test_runs_of_several_commits_get_a_note():
    def told(*commits):
        runs = [judged(f"r{i}", torch.randn(40, 2), torch.arange(40) % 2, seed=i, commit=each)
                for i, each in enumerate(commits)]
        return [line for line in notes(runs) if "commit" in line]

    assert told("one", "one") == []
    [line] = told("one", "other-dirty", "one")
    assert line.count("one") == 1 and "other-dirty" in line


@pytest.mark.parametrize("flag, value, kept", [("epoch_length", 640, 20), ("label_smoothing", 0.1, 0.0), ("lr", 0.5, 0.1)])
def test_a_missing_gain_has_a_reason(flag, value, kept):
    [student], [baseline] = students_and_baselines(1, **{flag: value})
    students, baselines = students_and_baselines(1)
    assert student["config"][flag] == kept
    [line] = [line for line in notes([student, baseline]) if "is left out" in line]
    assert line == f"s-seed0 minus b-seed0 is left out, because they differ in {flag} {kept} and {value}"  # T and alpha are no reasons
    assert not [line for line in notes([*students, *baselines, baseline]) if "is left out" in line]
    [line] = [line for line in notes([student, judged("far", torch.randn(40, 2), torch.arange(40) % 2, **{
        flag: value, "clip": 0.7, "weight_decay": 0.2}), baseline]) if "is left out" in line]
    assert "b-seed0" in line and "far" not in line  # the most similar baseline


def test_samples_of_one_class_are_left_out():
    labels = torch.tensor([1] * 3 + [0] * 8)  # a few samples are without a positive
    run = judged("a", torch.randn(11, 2), labels, ["a", "b"])
    assert run["samples"]["auc"].isnan().any()
    low, high = (100 * interval(run["samples"]["auc"][1:])).tolist()
    assert cell(summary([run["samples"]["auc"]])).endswith(f"[{low:.1f} {high:.1f}]")


def test_without_positives_there_is_no_precision():
    m = metrics(torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 0]))
    assert math.isnan(m["precision"]) and math.isnan(m["sensitivity"]) and math.isnan(m["f1"])


def test_the_table_of_many_seeds_fits_a_screen():
    classes = ["ELBOW", "FINGER", "FOREARM", "HAND", "HUMERUS", "SHOULDER", "WRIST"]
    runs = [judged(f"student-T10-seed{i}", torch.randn(70, 7), torch.arange(70) % 7, classes, i, arch="inception_v3")
            for i in range(5)]
    assert max(map(len, tables(runs))) <= 106


def test_kept_rows_are_those_that_are_printed():
    students, baselines = students_and_baselines(3)
    rows, gains = rows_and_gains(variants([*students, *baselines]), "accuracy")
    assert [(row["title"], row["arch"], row["runs"]) for row in rows] == [
        (name, "resnet18", [f"{name}-seed{i}" for i in range(3)]) for name in "sb"]
    [gain] = gains
    assert (gain["title"], gain["minus"], gain["pairs"], gain["students"]) == ("s", "b", 3, 3)
    assert rows[0]["validation"]["mean"] == pytest.approx(sum(run["validation"]["accuracy"] for run in students) / 3)
    json.dumps([rows, gains])  # plain values
    text = tables([*students, *baselines], NAMES)
    start = next(i for i, line in enumerate(text) if line.startswith("  minus b")) - 1
    gain_text = [*text[:3], *text[start : start + 2], ""]
    for k in NAMES:
        s, b = ([run["figures"][k] for run in runs] for runs in (students, baselines))
        assert statistics.stdev(s) != pytest.approx(statistics.stdev(b), rel=0.05), k  # told apart below
        differences = [x - y for x, y in zip(s, b, strict=True)]
        unit, digits = (1, 3) if k == "loss" else (100, 1)
        for lines, name, kept, values, sign in ((text[:start], "s", rows[0], s, ""), (text[:start], "b", rows[1], b, ""),
                                                (gain_text, "s", gain, differences, "+")):
            figure, (told, below, _) = kept["figures"][k], column([*lines, ""], k)
            assert figure["mean"] == pytest.approx(statistics.mean(values))
            assert figure["sd"] == pytest.approx(statistics.stdev(values))
            mean, low, high = (f"{unit * figure[end]:{sign}.{digits}f}" for end in ("mean", "low", "high"))
            assert told[name] == f"{mean} ± {unit * statistics.stdev(values):.{digits}f}", k
            assert below[name] == f"[{low} {high}]"
    told, below, _ = column(text, "validation")
    assert told["b"].startswith(f"{100 * rows[1]['validation']['mean']:.1f} ± ") and below["b"] == "train 50.0 ± 0.0"


def test_notes_tell_what_a_table_leaves_open():
    labels = torch.tensor([0, 1, 1] * 20)
    dead = judged("dead", torch.tensor([[1.0, 0.0]]).expand(60, 2), labels)
    shifted = judged("shifted", torch.stack([torch.full((60,), 9.0), labels + torch.rand(60)], 1), labels, lr=0.5)
    fine = judged("fine", torch.randn(60, 2), labels, lr=0.6)
    told = notes([dead, shifted, fine])
    assert "always predicting PNEUMONIA has accuracy 66.7" in told and "positive: PNEUMONIA" in told
    assert [line for line in told if "every image" in line] == [
        "dead predicts NORMAL for every image", "shifted predicts NORMAL for every image"]
    assert not any("validation images" in line or "left out" in line for line in told)
    three = notes([judged("a", torch.randn(60, 3), labels, ["NORMAL", "BACTERIAL", "VIRAL"])])
    assert not any("positive" in line for line in three)
    moved = judged("moved", torch.randn(60, 2), labels, lr=0.7, val="others")
    assert any("different validation images" in line for line in notes([fine, moved]))


def test_notes_of_findings_without_labels():
    logits, labels = torch.randn(40, 3), torch.randint(2, (40, 3)).float()
    labels[:, 1], labels[:30, 2] = math.nan, math.nan  # none, and some, are known
    text = tables([judged("a", logits, labels, ["OFTEN", "NEVER", "SOME"])])
    assert any(re.match(r"NEVER .* 0 of 0 ", line) for line in text) and "ece: lower is better" in text
    assert not any("every image" in line for line in text)


# ---- runs, without their training


ARCH = "shufflenet_v2_x0_5"  # small, and its last layer is the linear fc


def save_run(folder, source="phantoms", role="baseline", network=0, size=32, bias=None, **flags):
    """Save a run as train.py leaves it, of random weights; runs of one `network` share them. bias: all its logits."""
    args = train.get_args(["--role", role, "--arch", ARCH, "--epochs", "1"])
    vars(args).update({"data": str(source), "size": size, "out": folder, **flags})
    loaded = data.load_as(vars(args), size, ("train", "val"), "cache")
    torch.manual_seed(network)
    model, images = models.build(ARCH, len(loaded.classes), size), data.prepare(loaded.train.images, CPU)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.momentum = None  # plain averages, without which all logits would be alike
        model(images)
        logits = models.forward(model.eval(), images)[0]  # it calls about half of all images either class
        model.fc.bias.sub_(logits.median(0).values)
        if bias is not None:
            model.fc.weight.zero_()
            model.fc.bias.copy_(torch.tensor(bias))
    val_inputs = models.from_images(loaded.val.images, CPU)
    validation = metrics(evaluate.predict(model, val_inputs, len(loaded.val.ids), CPU), loaded.val.labels)
    models.save_checkpoint(
        Path(folder) / "best.pt", model, **train.run_facts(args, loaded, model, []), history=[{"epoch": 1}],
        last=None, epoch=1, train_accuracy=0.5, validation=validation)
    return folder


@pytest.mark.parametrize("source", ["phantoms", "findings"])
def test_predictions_are_not_rounded_to_1(few_phantoms, source):
    bias = [0.0, 20.0] if source == "phantoms" else [20.0] * 3
    save_run("run", source, bias=bias, wrong_labels=0.0, labels_per_class=None)
    evaluate.main(["run"])
    sure = "PNEUMONIA" if source == "phantoms" else "FLUID"
    p = {float(row[sure]) for row in data.read_csv("run/predictions.csv")}
    assert torch.tensor(20.0).sigmoid() == 1 and p == {torch.tensor(20.0).double().sigmoid().item()}


def test_changed_pixels_of_equal_length_are_told(kermany, capsys):
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


def test_an_interval_draws_patients_not_images(tmp_path):
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
    for row in [row for row in data.read_csv("run/predictions.csv") if row["split"] == "test"]:
        called = float(row["PNEUMONIA"]) > float(row["NORMAL"])
        right.setdefault(row["patient"], []).append(called == (row["label"] == "1"))
    shares = [sum(calls) / len(calls) for calls in right.values()]
    assert len(shares) == 20 and set(shares) == {0.0, 1.0}  # a patient's images are called alike
    low, high = stored("run")["test"]["interval"]["accuracy"]
    wanted = brute_interval(torch.tensor([shares]))
    assert low == pytest.approx(wanted[0], abs=0.051) and high == pytest.approx(wanted[1], abs=0.051)
    assert high - low > 0.3  # of 160 images: at most 0.16


def test_a_table_has_one_set_of_samples(few_phantoms):
    """A student that is its baseline gains nothing, in no sample: with samples of its own it would seem to."""
    save_run("baseline")
    save_run("student", role="student", alpha=0.0)
    evaluate.main(["baseline", "student", "--json", "all.json"])
    [gain] = json.loads(open("all.json").read())["gains"]
    assert stored("student")["test"]["interval"]["accuracy"][0] < stored("student")["test"]["interval"]["accuracy"][1]
    assert {k: gain["figures"][k] for k in NAMES} == {k: {"mean": 0, "sd": None, "low": 0, "high": 0} for k in NAMES}


def test_runs_keep_their_own_validation_images(kermany, capsys):
    runs = {save_run(f"run{fraction}", kermany, val_fraction=fraction): fraction for fraction in (0.1, 0.4)}
    evaluate.main(list(runs))
    assert "different validation images" in capsys.readouterr().out
    for folder, fraction in runs.items():
        labels = data.load(kermany, 32, ("val",), val_fraction=fraction).val.labels
        rows = [sum(row) for row in stored(folder)["validation"]["confusion"]]
        assert rows == labels.bincount().tolist(), fraction
        assert stored(folder)["validation"]["confusion"] == models.load_checkpoint(folder)[1]["validation"]["confusion"]


def test_a_folder_stands_for_all_runs_below_it(few_phantoms, capsys):
    for name, lr in (("a", 0.1), ("b", 0.2), ("begun", 0.3)):
        save_run(f"runs/demo/{name}", lr=lr)
    Path("runs/demo/begun/best.pt").unlink()
    evaluate.main(["runs/demo", "--json", "all.json"])
    assert set(json.loads(open("all.json").read())["runs"]) == {"runs/demo/a", "runs/demo/b"}
    for folder in ("runs", "."):  # at any depth
        assert set(evaluate.find_runs([folder])) == {Path(f"runs/demo/{name}/best.pt") for name in "ab"}
    evaluate.main(["runs/demo/a", "runs/demo/begun"])
    assert "runs/demo/begun: left out" in capsys.readouterr().out
    Path("empty").mkdir()
    for paths in (["runs/demo/begun"], ["empty", "nowhere"]):
        with pytest.raises(data.UserError, match=f"no best.pt in {', '.join(paths)}") as error:
            evaluate.main(paths)
        assert "\n" not in str(error.value) and capsys.readouterr().out == ""


def test_runs_of_other_test_labels_share_no_table(kermany):
    shutil.copytree(kermany, "other/chest_xray")
    first = Path("other/chest_xray/test/NORMAL/IM-0100-0001-0002.jpeg")
    first.rename(first.parent.with_name("PNEUMONIA") / first.name)  # the same image with another label
    runs = [save_run("a", kermany), save_run("b", "other/chest_xray", seed=1)]
    with pytest.raises(data.UserError, match="different test images or classes"):
        evaluate.main(runs)
    evaluate.main([runs[0]])


def test_a_moved_folder_is_the_same(kermany, capsys):
    runs = [save_run("a", "chest_xray"), save_run("b", "./chest_xray", seed=1)]
    evaluate.main(runs)
    assert ", 2 seeds " in capsys.readouterr().out
    kermany.rename("moved")
    evaluate.main([*runs, "--data", "moved"])
    told = capsys.readouterr().out
    assert ", 2 seeds " in told and "have changed since" not in told
    assert stored("a")["data"] == "moved"  # where they were read


def test_other_test_images_replace_no_figures(kermany, capsys):
    """Images of another folder are written apart, those of the run's own folder replace its figures."""
    save_run("run", kermany)
    evaluate.main(["run"])
    before = {path.name: path.read_bytes() for path in Path("run").iterdir()}
    shutil.copytree(kermany, "elsewhere/hospital")
    first = Path("elsewhere/hospital/test/NORMAL/IM-0100-0001-0002.jpeg")
    first.unlink()
    capsys.readouterr()
    evaluate.main(["run", "--data", "elsewhere/hospital"])
    assert "run: evaluated on elsewhere/hospital" in capsys.readouterr().out
    after = {path.name: path.read_bytes() for path in Path("run").iterdir()}
    assert json.loads(after.pop("metrics-hospital.json"))["images"] == 11
    assert len(data.read_csv("run/predictions-hospital.csv")) == len(data.read_csv("run/predictions.csv")) - 1
    del after["predictions-hospital.csv"]
    assert after == before
    (kermany / "test/NORMAL" / first.name).unlink()  # the run's own folder changes
    evaluate.main(["run"])
    assert stored("run")["images"] == 11


# ---- a threshold, new images


def rows_of(path, split):
    """Return the log-odds and labels of a split, from the probabilities in predictions.csv."""
    rows = [row for row in data.read_csv(path) if row["split"] == split]
    return ([math.log(float(row["PNEUMONIA"]) / float(row["NORMAL"])) for row in rows],
            [int(row["label"]) for row in rows])


@pytest.mark.parametrize("rate, share", [("sensitivity", 0.95), ("specificity", 0.6), ("sensitivity", 0.5)])
def test_a_threshold_is_chosen_on_validation(monkeypatch, capsys, rate, share):
    monkeypatch.setattr(data, "PHANTOMS", {"train": (24, 11), "val": (40, 12), "test": (60, 13)})
    save_run("run")
    evaluate.main(["run"])
    plain = stored("run")
    evaluate.main(["run", "--threshold", f"{rate}={share}"])
    chosen, (scores, labels) = stored("run"), rows_of("run/predictions.csv", "validation")
    other = {"sensitivity": "specificity", "specificity": "sensitivity"}[rate]
    assert chosen["validation"][rate] >= share - 1e-12
    assert chosen["validation"][other] == pytest.approx(best_other_rate(scores, labels, rate, share))
    scores, labels = rows_of("run/predictions.csv", "test")
    confusion = [[sum((y, z > chosen["threshold"]) == (i, j) for z, y in zip(scores, labels, strict=True))
                  for j in (0, 1)] for i in (0, 1)]
    (tn, fp), (fn, tp) = at = chosen["test"]["confusion"]
    assert at == confusion != plain["test"]["confusion"]
    assert chosen["test"]["sensitivity"] == pytest.approx(tp / (tp + fn))
    assert chosen["test"]["specificity"] == pytest.approx(tn / (tn + fp))
    for split, k in itertools.product(("test", "validation"), ("auc", "ece", "loss")):
        assert chosen[split][k] == plain[split][k]
    p = 1 / (1 + math.exp(-chosen["threshold"]))
    assert plain["threshold"] == 0 and f"run predicts PNEUMONIA above a probability of {p:.3g}\n" in capsys.readouterr().out


def test_a_threshold_needs_two_classes(few_phantoms, kermany):
    save_run("findings-run", "findings", wrong_labels=0.0, labels_per_class=None)
    save_run("three", kermany, classes=3)
    for run in ("findings-run", "three"):
        with pytest.raises(data.UserError, match="--threshold needs two classes") as error:
            evaluate.main([run, "--threshold", "sensitivity=0.9"])
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["sensitivity", "sensitivity=", "sensitivity=x", "sensitivity=nan", "specificity=0",
                                  "specificity=1.1", "specificity=-1", "accuracy=0.9", "0.9"])
def test_other_thresholds_are_refused(text, capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["run", "--threshold", text])
    assert "argument --threshold" in capsys.readouterr().err


def test_runs_with_other_images_per_class_keep_their_own(kermany):
    """--per-class also decides which images are validated, so such runs share no data set when they are judged."""
    flags = {"val_fraction": 0.3, "wrong_labels": 0.0, "labels_per_class": None}
    runs = [save_run("all", kermany, **flags), save_run("four", kermany, per_class=4, **flags)]
    evaluate.main(runs)
    counts = [sum(row["split"] == "validation" for row in data.read_csv(f"{run}/predictions.csv")) for run in runs]
    assert counts[1] < counts[0]


@pytest.mark.parametrize("name", ["kermany", "nih"])
def test_new_images_are_scored_like_test_images(name, request):
    """--predict gives the probabilities of predictions.csv, for one run, and for several with their mean."""
    root, flags = request.getfixturevalue(name), {"val_fraction": 0.3, "wrong_labels": 0.0, "labels_per_class": None}
    folder = str(root / "test" if name == "kermany" else root)
    runs = [save_run("runs/a", root, **flags), save_run("runs/b", root, network=1, size=40, seed=1, **flags)]
    evaluate.main(runs)
    classes = stored(runs[0])["classes"]
    judged = [{Path(row["image"]).name: [float(row[c]) for c in classes]
               for row in data.read_csv(f"{run}/predictions.csv") if row["split"] == "test"} for run in runs]
    evaluate.main([runs[0], "--predict", folder, "--out", "one.csv"])
    evaluate.main(["runs", "--predict", folder, "--out", "two.csv"])
    one, two = ({Path(row["file"]).name: row for row in data.read_csv(path)} for path in ("one.csv", "two.csv"))
    assert judged[0].keys() <= one.keys() == two.keys()
    for image, p in judged[0].items():
        assert [float(one[image][c]) for c in classes] == pytest.approx(p, abs=1e-5)
        for run, wanted in (("runs/a", p), ("runs/b", judged[1][image]),
                            ("mean", [(x + y) / 2 for x, y in zip(p, judged[1][image], strict=True)])):
            assert [float(two[image][f"{run} {c}"]) for c in classes] == pytest.approx(wanted, abs=1e-5)
        if name == "kermany":
            assert one[image]["patient"] == data.PATIENT.search(image)[0] and one[image]["problem"] == ""


def test_files_that_are_no_images_are_told(kermany, capsys):
    """The other files are scored all the same. A single file may be given too."""
    save_run("run", kermany)
    folder, text = kermany / "test", kermany / "test/report.txt"
    text.write_text("no image")
    whole = folder / "NORMAL/IM-0100-0001-0002.jpeg"
    (folder / "cut.jpeg").write_bytes(whole.read_bytes()[:200])
    evaluate.main(["run", "--predict", str(folder)])
    rows = {row["file"]: row for row in data.read_csv("predictions.csv")}
    assert "12 images scored, 2 could not be read" in capsys.readouterr().out
    assert {Path(file).name for file, row in rows.items() if row["problem"]} == {"report.txt", "cut.jpeg"}
    for file, row in rows.items():
        assert (file in row["problem"]) == (not row["NORMAL"])
    evaluate.main(["run", "--predict", str(whole), "--out", "deep/one.csv"])
    assert data.read_csv("deep/one.csv") == [rows[str(whole)]]


def test_runs_of_other_classes_score_no_images(few_phantoms, kermany):
    runs = [save_run("a", kermany), save_run("b", kermany, classes=3)]
    with pytest.raises(data.UserError, match="b has other classes than NORMAL, PNEUMONIA") as error:
        evaluate.main([*runs, "--predict", str(kermany)])
    assert "\n" not in str(error.value) and not Path("predictions.csv").exists()


def test_tables_are_shown_if_no_file_is_written(few_phantoms, capsys):
    save_run("run")
    evaluate.main(["run", "--json", "all.json"])
    before = capsys.readouterr().out
    assert before.splitlines()[-1] == "written: metrics and predictions in each run folder, all.json"
    evaluate.main(["run"])
    assert capsys.readouterr().out.splitlines()[-1].endswith("folder; --json FILE keeps the tables")
    table = before[: before.index("\nwritten")]
    assert not any(name in table for name in evaluate.MORE)  # without --report
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


def test_one_table_holds_runs_and_gains(three_runs, capsys):
    capsys.readouterr()
    evaluate.main([*three_runs, "--json", "all.json", "--report"])
    text, kept = capsys.readouterr().out, json.loads(open("all.json").read())
    assert kept["runs"] == {run: stored(run) for run in three_runs}
    assert text.startswith("\n".join(kept["tables"]) + "\n")
    assert [(row["title"], row["runs"], row["state"]) for row in kept["rows"]] == [
        (Path(run).name, [run], "") for run in three_runs]
    assert [(gain["title"], gain["minus"]) for gain in kept["gains"]] == [("student", "baseline")]
    for wanted in ("teacher ", "  squeezenet1_1 ", "baseline ", "student ", "16 test images", "  minus baseline "):
        assert f"\n{wanted}" in text, wanted
    for folder in three_runs:
        run, name = stored(folder), Path(folder).name
        at, asked = run["test"], models.load_checkpoint(folder)[1]
        (tn, fp), (fn, tp) = at["confusion"]
        assert tn + fp == fn + tp == 8 and at["accuracy"] == pytest.approx((tp + tn) / 16)
        assert {*NAMES, "confusion", "interval"} == set(at) and set(NAMES) == set(at["interval"])
        for k in NAMES if name != "student" else []:  # its name has two rows, itself and its gain
            unit, digits = (1, 3) if k == "loss" else (100, 1)
            mean, low, high = (f"{unit * value:.{digits}f}" for value in (at[k], *at["interval"][k]))
            told, below, _ = column(kept["tables"], k)
            assert (told[name], below[name]) == (mean, f"[{low} {high}]")
        assert run["trained_by"]["commit"] and run["judged_by"]["torch"] and run["config"]["seed"] == 0
        assert run["images"] == run["patients"] == 16 and run["classes"] == NORMAL
        assert run["epoch"] == asked["epoch"] and run["cost"]["parameters"] > 7e5
        assert run["validation"]["accuracy"] == pytest.approx(asked["validation"]["accuracy"])


def test_a_copied_run_is_not_a_second_seed(few_phantoms):
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


def test_seeds_share_a_row_of_mean_and_deviation(few_phantoms, capsys):
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


def test_evaluating_writes_two_files_only(few_phantoms):
    args = fit()
    before = {p.name: p.read_bytes() for p in Path(args.out).iterdir()}
    evaluate.main([args.out])
    after = {p.name: p.read_bytes() for p in Path(args.out).iterdir()}
    assert after.pop("metrics.json") and after.pop("predictions.csv") and after == before


def test_predictions_rebuild_the_figures(kermany, few_phantoms):
    args = fit("--data", str(kermany), "--weights", "none", "--finetune", "all")
    findings = fit("--data", "findings", "--recipe", "findings")
    for out, classes in ((args.out, NORMAL), (findings.out, ["OPACITY", "LARGE_HEART", "FLUID"])):
        evaluate.main([out])
        for split in ("validation", "test"):
            rows = [row for row in data.read_csv(Path(out) / "predictions.csv") if row["split"] == split]
            p = torch.tensor([[float(row[name]) for name in classes] for row in rows]).double()
            if out == args.out:
                for row in rows:
                    assert classes[int(row["label"])] in row["image"] and row["patient"] == data.PATIENT.search(row["image"])[0]
                assert torch.allclose(p.sum(1), torch.ones(len(p)).double(), atol=1e-6)
                again = metrics(p.log(), torch.tensor([int(row["label"]) for row in rows]))
            else:
                labels = torch.tensor([[float(row[f"label {name}"]) for name in classes] for row in rows])
                again = metrics(p.logit(), labels)
            for name in ("accuracy", "auc", "loss"):
                assert stored(out)[split][name] == pytest.approx(again[name], abs=1e-4), name


def test_evaluate_has_its_own_cache(few_phantoms):
    args = fit("--cache", "of-the-training")
    assert models.load_checkpoint(args.out)[1]["config"]["cache"] == "of-the-training"
    for flags, folder in (([], "cache"), (["--cache", "mine"], "mine")):
        shutil.rmtree("of-the-training", ignore_errors=True)
        shutil.rmtree("cache", ignore_errors=True)
        evaluate.main([args.out, *flags])
        assert any(Path(folder).glob("*-test-*.npy"))
        assert not Path("of-the-training").exists() and Path("cache").exists() == (folder == "cache")


def test_runs_of_other_classes_share_no_table(few_phantoms, kermany):
    phantoms = fit()
    images = fit("--data", str(kermany), "--weights", "none", "--finetune", "all")
    three = fit("--data", str(kermany), "--weights", "none", "--finetune", "all", "--classes", "3", "--out", "three")
    for pair in ([phantoms.out, images.out], [images.out, three.out]):
        with pytest.raises(data.UserError, match="different test images or classes"):
            evaluate.main(pair)


def test_training_patients_do_not_judge_a_run(kermany):
    args = fit("--data", str(kermany), "--weights", "none", "--finetune", "all")
    for image in (kermany / "train/NORMAL").glob("IM-*.jpeg"):
        (kermany / "test/NORMAL" / image.name).write_bytes(image.read_bytes())
    with pytest.raises(data.UserError, match="was trained on IM-.*, a validation or test patient"):
        evaluate.main([args.out])


def test_a_teachers_patients_judge_no_student(few_phantoms):
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


def test_classes_of_no_training_are_refused(kermany, few_phantoms):
    args = fit()
    for split in ("train", "test", "val"):
        (kermany / split / "PNEUMONIA").rename(kermany / split / "COVID")
    with pytest.raises(data.UserError, match="'PNEUMONIA'.*'COVID'"):
        evaluate.main([args.out, "--data", str(kermany)])


@pytest.mark.parametrize("name", ["meta", "mps", "cuda:2", "cuda:-1", "cuda:x", "cuda:", "gpu", ""])
def test_a_device_that_is_absent_is_refused(name, monkeypatch):
    with pytest.raises(argparse.ArgumentTypeError, match="is not among cpu$"):
        evaluate.usable_device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert all(evaluate.usable_device(there) == there for there in ("cpu", "cuda", "cuda:0", "cuda:1"))
    with pytest.raises(argparse.ArgumentTypeError, match=f"^{name} is not among cpu, cuda, cuda:0, cuda:1$"):
        evaluate.usable_device(name)
