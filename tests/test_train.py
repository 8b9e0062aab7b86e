"""Training: batches, the loop, distillation, frozen networks, resuming and the command line."""

import csv
import importlib
import inspect
import math
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import fit, image_file, run, SMALL, TINY

import data
import evaluate
import models
import train

CPU = torch.device("cpu")


def perceptron(classes=2):
    """A network with BatchNorm and dropout for the features X."""
    first = torch.nn.Linear(16, 8, bias=False)  # in front of BatchNorm a bias has no gradient
    layers = [torch.nn.Flatten(), first, torch.nn.BatchNorm1d(8), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, torch.nn.Dropout(0.1), torch.nn.Linear(8, classes))


class WithAux(torch.nn.Module):
    """A network with an auxiliary head."""

    def __init__(self):
        super().__init__()
        self.main, self.aux = torch.nn.Linear(16, 2, bias=False), torch.nn.Linear(16, 2, bias=False)

    def forward(self, x):
        return self.main(x.flatten(1)), self.aux(x.flatten(1))


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr)


X, Y = torch.randn(32, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 2
LOGITS = torch.randn(32, 2, generator=torch.Generator().manual_seed(1))  # a teacher's, row i for image i
FINDINGS = (torch.randn(32, 2, generator=torch.Generator().manual_seed(2)) > 0).float()
BOTH = pytest.mark.parametrize("labels", [Y, FINDINGS], ids=["classes", "findings"])


def some(rows, labels=Y, logits=None, x=X):
    """A batch as the loop takes it."""
    return x[rows], labels[rows], None if logits is None else logits[rows]


def paired(inputs=X, labels=Y, teacher=None, seed=0, batch_size=8, **options):
    """Return the batches of `paired_batches`. inputs, teacher: sources, tensors or uint8 images."""
    def source(x):
        if x is None or callable(x):
            return x
        return (models.from_images if x.dtype == torch.uint8 else models.from_tensor)(x, CPU)

    generator = torch.Generator().manual_seed(seed)
    return list(train.paired_batches(source(inputs), labels, source(teacher), batch_size, generator, **options))


def vector(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def weights_after(model=None, logits=None, seed=0, labels=Y, **options):
    """Train a small network for one epoch and return its weights as one vector."""
    torch.manual_seed(seed)
    model = model or perceptron()
    batches = paired(labels=labels, teacher=logits, seed=seed)
    train.train_one_epoch(model, batches, sgd(model), **options)
    return vector(model)


def watch_epochs(monkeypatch):
    """Return a list that grows by one entry per epoch: the arguments of train_one_epoch, with the batches as a list,
    the learning rate, and the weights after the epoch."""
    epochs, real = [], train.train_one_epoch

    def watched(*args, **options):
        call = inspect.signature(real).bind(*args, **options)
        call.apply_defaults()
        call.arguments["batches"] = list(call.arguments["batches"])
        epochs.append(types.SimpleNamespace(**call.arguments))
        epochs[-1].lr = [group["lr"] for group in epochs[-1].optimizer.param_groups]
        row = real(*call.args, **call.kwargs)
        epochs[-1].state = {name: value.clone() for name, value in epochs[-1].model.state_dict().items()}
        return row

    monkeypatch.setattr(train, "train_one_epoch", watched)
    return epochs


def images_of(epoch):
    return [tuple(image.flatten().tolist()) for x, _, _ in epoch.batches for image in x]


# ---- batches


def test_a_batch_holds_the_same_rows_of_all_three():
    images = torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1)  # one pixel, the number of the row
    logits = torch.stack([torch.arange(50.0), -torch.arange(50.0)], 1)
    for x, y, teacher_logits in paired(images, torch.arange(50), logits):
        assert torch.equal(x, data.prepare(images[y], CPU)) and torch.equal(teacher_logits, logits[y])
    assert paired()[0][2] is None  # without a teacher


def test_a_source_with_a_network_returns_its_outputs():
    images = torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1)
    source, rows = models.from_images(images, CPU, lambda x: 2 * x.flatten(1)), torch.tensor([7, 3])
    assert torch.equal(source(rows), 2 * data.prepare(images[rows], CPU).flatten(1))


def test_a_pass_holds_every_image_once():
    """The seed decides the order."""
    first, again, second = (torch.cat([y for _, y, _ in paired(labels=torch.arange(32), seed=seed)])
                            for seed in (0, 0, 1))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(32))
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_every_epoch_has_another_order(few_phantoms, monkeypatch):
    """Every epoch holds every image."""
    epochs = watch_epochs(monkeypatch)
    run("--epochs", "3")
    orders = [tuple(images_of(epoch)) for epoch in epochs]
    assert len({*orders[0]}) == 24 and len({*orders}) == 3
    assert {tuple(sorted(order)) for order in orders} == {tuple(sorted(orders[0]))}


def test_a_last_batch_of_one_joins_the_one_before_it():
    assert [len(y) for _, y, _ in paired(labels=Y[:9], batch_size=4)] == [4, 5]
    assert [len(y) for _, y, _ in paired(labels=Y[:10], batch_size=4)] == [4, 4, 2]


def test_steps_may_be_less_or_more_than_one_pass():
    """Several passes have different orders."""
    assert [len(y) for _, y, _ in paired(steps=3)] == [8, 8, 8]
    assert [len(y) for _, y, _ in paired(X[:1], Y[:1], steps=3)] == [1, 1, 1]
    rows = torch.cat([y for _, y, _ in paired(labels=torch.arange(32), steps=10)])
    first, second, half = rows.split(32)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(32)) and len(half) == 16
    assert not torch.equal(first, second) and not torch.equal(first[:16], half)


def test_processes_take_equal_and_disjoint_shares_of_a_batch(monkeypatch):
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(train, "processes", lambda rank=rank: (rank, 2))
        shares.append([set(y.tolist()) for _, y, _ in paired(labels=torch.arange(32), batch_size=9)])
    for mine, others in zip(*shares, strict=True):
        assert len(mine) == len(others) >= 2 and not mine & others
    assert len(set().union(*shares[0], *shares[1])) == 32 - 4  # of batches of 9, 9, 9 and 5 one image each


def transforms(rows, affines):
    """A source that returns the transforms instead of images."""
    return affines


def test_every_batch_moves_each_image_anew(monkeypatch):
    """20 images, batches of at most 32, so that an epoch of 5 steps is 5 passes. Two processes take their shares
    of the same transforms."""
    def batches(rank=0, world=1):
        monkeypatch.setattr(train, "processes", lambda: (rank, world))
        return paired(transforms, torch.arange(20), transforms, batch_size=32, steps=5, augment=True)

    whole, *shares = batches(), batches(0, 2), batches(1, 2)
    assert len({tuple(affine.flatten().tolist()) for x, _, _ in whole for affine in x}) == 5 * 20
    for (x, y, seen_by_teacher), *parts in zip(whole, *shares, strict=True):
        assert torch.equal(x, seen_by_teacher) and sorted(y.tolist()) == list(range(20))
        for rank, (share, rows, _) in enumerate(parts):
            assert torch.equal(share, x[rank::2]) and torch.equal(rows, y[rank::2])


def test_augmented_runs_move_each_image_anew_in_every_batch(few_phantoms, monkeypatch):
    epochs = watch_epochs(monkeypatch)
    run("--augment", "--batch-size", "32", "--steps-per-epoch", "3")
    images = sum(map(images_of, epochs), [])
    assert len(images) == len({*images}) == 2 * 3 * 24  # epochs, batches, images


def slopes(side, directions):
    """Images as bright as a slope that climbs in a direction: the same at every size, and still slopes
    when they are moved."""
    across = (torch.arange(side) + 0.5) / side * 2 - 1
    climb = directions[:, :1, None] * across + directions[:, 1:, None] * across[:, None]
    return (128 + 90 * climb).round().to(torch.uint8)[:, None]


def test_an_image_is_moved_alike_at_twice_the_size():
    angles = torch.arange(24) * 0.26
    directions = torch.stack([angles.cos(), angles.sin()], 1)
    small, large = slopes(32, directions), slopes(64, directions)
    batches = paired(small, torch.arange(24), large, augment=True)
    moved = []
    for x, y, seen_by_teacher in batches:
        halved = F.avg_pool2d(seen_by_teacher, 2)
        inside = (..., slice(4, -4), slice(4, -4))  # at the border a shift brings in black
        assert (x - halved)[inside].abs().max() < 0.04  # two times rounded to a grey level
        moved.append((x - data.prepare(small[y], CPU))[inside].abs().amax((1, 2, 3)))
    assert torch.cat(moved).median() > 0.1  # and the movement is larger than that
    other = paired(small, torch.arange(24), augment=True, seed=1)
    assert not torch.equal(torch.cat([x for x, _, _ in other]), torch.cat([x for x, _, _ in batches]))


# ---- the loop


def by_hand(z, labels, logits, T, alpha, smoothing=0.0):
    """The gradient of the loss in the logits z, times the number of images, written out. A label of -1 or NaN
    has no part in it."""
    if labels.dim() == 1:
        target = F.one_hot(labels.clamp(min=0), 2) * (1 - smoothing) + smoothing / 2
        hard, soft = z.softmax(1) - target, (z / T).softmax(1) - (logits / T).softmax(1)
        return (1 - alpha) * hard * (labels >= 0)[:, None] + alpha * T * soft
    target = labels.nan_to_num() * (1 - smoothing) + smoothing / 2
    hard, soft = z.sigmoid() - target, (z / T).sigmoid() - (logits / T).sigmoid()
    return ((1 - alpha) * hard * ~labels.isnan() + alpha * T * soft) / labels.shape[1]


@BOTH
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_one_step_is_the_update_written_out_by_hand(labels, smoothing):
    """Temperature and label smoothing reach the auxiliary heads too."""
    model, T, alpha, lr = WithAux(), 3.0, 0.7, 0.1
    main, aux, x = model.main.weight.detach().clone(), model.aux.weight.detach().clone(), X.flatten(1)
    train.train_one_epoch(model, [(X, labels, LOGITS)], sgd(model, lr), T, alpha, smoothing, aux_weight=0.4)
    for before, after, weight in ((main, model.main.weight, 1.0), (aux, model.aux.weight, 0.4)):
        gradient = weight * by_hand(x @ before.T, labels, LOGITS, T, alpha, smoothing).T @ x / 32
        assert torch.allclose(after, before - lr * gradient, atol=1e-6)


def test_a_step_with_weight_decay_has_its_closed_form():
    x, lr, decay = X.flatten(1), 0.1, 0.5
    for name in ("sgd", "adam"):
        args = train.get_args(["--role", "teacher", "--optimizer", name, "--lr", str(lr), "--weight-decay", str(decay)])
        w = torch.nn.Linear(16, 2, bias=False)
        start = w.weight.detach().clone()
        train.train_one_epoch(w, [(x, Y, None)], train.make_optimizer(args, w.parameters()))
        gradient = by_hand(x @ start.T, Y, LOGITS, 1.0, 0.0).T @ x / 32 + decay * start
        step = gradient if name == "sgd" else gradient.sign()  # the first step of Adam
        assert torch.allclose(w.weight, start - lr * step, atol=1e-4)


def test_training_does_not_change_the_teacher():
    """It changes the student."""
    student, teacher = perceptron(), perceptron().eval()
    frozen = {k: v.clone() for k, v in teacher.state_dict().items()}  # BatchNorm's averages too
    before = [p.detach().clone() for p in student.parameters()]
    train.train_one_epoch(student, [(X, Y, teacher(X)) for _ in range(3)], sgd(student))
    assert not any(torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))
    assert all(p.grad is None for p in teacher.parameters()) and not teacher.training
    assert all(torch.equal(v, frozen[k]) for k, v in teacher.state_dict().items())


def test_a_model_in_eval_mode_is_trained_in_training_mode():
    model = perceptron().eval()
    average = model[2].running_mean.clone()
    train.train_one_epoch(model, [(X, Y, None)], sgd(model))
    assert model.training and not torch.equal(average, model[2].running_mean)


def test_alpha_zero_equals_training_without_a_teacher():
    """The weights are equal to the bit."""
    alone = weights_after()
    assert torch.equal(alone, weights_after(logits=LOGITS, alpha=0.0))
    assert not torch.equal(alone, weights_after(logits=LOGITS, alpha=0.5))


def test_alpha_one_uses_no_label():
    def trained(labels, alpha):
        torch.manual_seed(0)
        return weights_after(WithAux(), LOGITS, labels=labels, alpha=alpha, aux_weight=0.4)

    assert torch.equal(trained(Y, 1.0), trained(1 - Y, 1.0))
    assert not torch.equal(trained(Y, 0.9), trained(1 - Y, 0.9))


def test_permuted_teacher_logits_change_the_weights():
    shuffled = LOGITS[torch.randperm(32)]
    assert not torch.equal(weights_after(logits=LOGITS), weights_after(logits=shuffled))


def test_losses_are_means_over_images():
    """The size of the batches does not matter."""
    model, T, alpha = WithAux(), 2.0, 0.3
    batches = [some(slice(0, 24), Y, LOGITS), some(slice(24, 32), Y, LOGITS)]
    row = train.train_one_epoch(model, batches, sgd(model, 0.0), T, alpha, aux_weight=0.4)
    logits = model.main(X.flatten(1)).detach()
    hard = F.cross_entropy(logits, Y).item()
    log_q = (logits / T).log_softmax(1)
    soft = T**2 * F.kl_div(log_q, (LOGITS / T).softmax(1), reduction="batchmean").item()
    assert (row["hard"], row["soft"]) == pytest.approx((hard, soft), rel=1e-5)
    assert row["loss"] == pytest.approx((1 - alpha) * hard + alpha * soft, rel=1e-5)  # of the main head alone
    assert row["train_accuracy"] == pytest.approx((logits.argmax(1) == Y).float().mean().item())


def test_progress_gets_its_title_and_steps(monkeypatch):
    monkeypatch.setattr(train, "progress", lambda *args: (calls.append(args[1:]), args[0])[1])
    calls, model, batches = [], torch.nn.Linear(16, 2), [some(slice(0, 24), x=X.flatten(1))]
    train.train_one_epoch(model, batches, sgd(model), title="epoch 1/2", n_steps=1)
    train.train_one_epoch(model, batches, sgd(model))  # profile_gpu.py shows none
    assert calls == [("epoch 1/2", 1)]


def test_the_gradient_is_clipped_to_its_norm():
    model = torch.nn.Linear(16, 2, bias=False)
    before = model.weight.detach().clone()
    train.train_one_epoch(model, [(100 * X.flatten(1), Y, None)], sgd(model, 1.0), clip=0.5)
    assert (model.weight - before).norm().item() == pytest.approx(0.5, rel=1e-3)


# ---- images without a label


def without(labels, rows):
    """The labels, those of some rows unknown."""
    labels = labels.clone()
    labels[rows] = -1 if labels.dim() == 1 else math.nan
    return labels


@BOTH
def test_an_unlabelled_image_adds_no_label_loss(labels):
    """8 labelled and 24 unlabelled images: a quarter of the step and of the loss of the 8."""
    models_, rows = (WithAux(), WithAux()), []
    models_[1].load_state_dict(models_[0].state_dict())
    for model, batch, lr in ((models_[0], some(slice(0, 32), without(labels, slice(8, 32))), 0.4),
                             (models_[1], some(slice(0, 8), labels), 0.1)):
        rows.append(train.train_one_epoch(model, [batch], sgd(model, lr), aux_weight=0.4))
    assert torch.allclose(*map(vector, models_), atol=1e-6)
    for name in ("loss", "hard"):
        assert 4 * rows[0][name] == pytest.approx(rows[1][name], rel=1e-5)


@BOTH
def test_unlabelled_images_train_through_the_teacher(labels):
    """All weights get a gradient."""
    w = torch.nn.Linear(16, 2, bias=False)
    start, x, T, alpha, lr = w.weight.detach().clone(), X.flatten(1), 3.0, 0.7, 0.1
    labels = without(labels, slice(8, 32))
    row = train.train_one_epoch(w, [(x, labels, LOGITS)], sgd(w, lr), T=T, alpha=alpha)
    z = x @ start.T
    gradient = by_hand(z, labels, LOGITS, T, alpha).T @ x / 32
    assert torch.allclose(w.weight, start - lr * gradient, atol=1e-6)
    loss = F.cross_entropy if labels.dim() == 1 else F.binary_cross_entropy_with_logits
    assert row["hard"] == pytest.approx(loss(z[:8], labels[:8]).item() * 8 / 32, rel=1e-5)


@BOTH
def test_an_unlabelled_batch_has_no_label_loss(labels):
    """The student is trained only through the teacher."""
    for logits in (None, LOGITS):
        model = WithAux()
        before = vector(model)
        batch = some(slice(0, 8), without(labels, slice(0, 8)), logits)
        row = train.train_one_epoch(model, [batch], sgd(model), aux_weight=0.4)
        assert row["hard"] == 0 and all(math.isfinite(row[name]) for name in ("loss", "soft"))
        assert torch.equal(vector(model), before) == (logits is None)
        assert vector(model).isfinite().all() and (row["loss"] > 0) == (logits is not None)


def test_training_accuracy_needs_half_of_the_labels():
    """It is that of the labelled images, and is left out if they are fewer than half."""
    identity = torch.nn.Linear(2, 2, bias=False)
    identity.weight.data = torch.eye(2)
    says_1 = torch.tensor([[0.0, 1.0]]).repeat(8, 1)
    for y, accuracy in (([1, 1, 0, -1, -1, -1, -1, -1], math.nan), ([1, 1, 0, -1, -1, 1, -1, -1], 3 / 4)):
        batches = [(says_1[:6], torch.tensor(y[:6]), None), (says_1[6:], torch.tensor(y[6:]), None)]
        row = train.train_one_epoch(identity, batches, sgd(identity, 0.0))
        assert row["train_accuracy"] == pytest.approx(accuracy, nan_ok=True)
    findings = torch.tensor([[0.0, 1.0]] * 5 + [[1.0, 1.0]] * 2 + [[math.nan, 0.0]])  # all say no, and yes
    logits = torch.tensor([[-1.0, 1.0]]).repeat(8, 1)
    batches = [(logits[:6], findings[:6], None), (logits[6:], findings[6:], None)]
    row = train.train_one_epoch(identity, batches, sgd(identity, 0.0))
    assert row["train_accuracy"] == pytest.approx((5 + 7) / (7 + 8))
    findings[:, 0], findings[0, 1] = math.nan, math.nan  # 7 of 16 are left
    row = train.train_one_epoch(identity, [(logits, findings, None)], sgd(identity, 0.0))
    assert math.isnan(row["train_accuracy"])


def test_hidden_labels_change_no_bit_of_the_weights(few_phantoms, monkeypatch):
    run("--out", "teacher")
    flags = ["--teacher", "teacher", "--labels-per-class", "3", "--alpha", "0.5", "--epochs", "1"]
    run(*flags, "--out", "right", role="student")
    split = data.load("phantoms", 32, labels_per_class=3).train
    kept = {id for id, label in zip(split.ids, split.labels, strict=True) if label >= 0}
    assert len(kept) == 6
    run(*flags, "--wrong-labels", "1", "--out", "all wrong", role="student")
    real = data.list_images

    def all_but_those_kept(*args):
        records, names = real(*args)
        return [{**r, "chance": 2 if r["id"] in kept else 0} for r in records], names

    monkeypatch.setattr(data, "list_images", all_but_those_kept)
    run(*flags, "--wrong-labels", "1", "--out", "hidden ones wrong", role="student")
    assert alike("right", "hidden ones wrong") and not alike("right", "all wrong")


def test_a_student_at_alpha_zero_is_the_baseline_to_the_bit(
    few_phantoms, last_is_best, monkeypatch
):
    """Labels are hidden and wrong, as in the demo. Unlabelled images, from which nothing would be learned then, are
    in no batch."""
    run("--out", "teacher", "--size", "48")
    epochs = watch_epochs(monkeypatch)
    flags = ["--labels-per-class", "4", "--wrong-labels", "0.2"]
    run(*flags, "--out", "baseline", role="baseline")
    for alpha in ("0", "0.5"):
        run(*flags, "--teacher", "teacher", "--alpha", alpha, "--out", alpha, role="student")
    assert alike("baseline", "0") and not alike("baseline", "0.5")
    for baseline, student in zip(history("baseline"), history("0"), strict=True):
        different = {name for name in baseline if baseline[name] != student[name]}
        assert different <= {"seconds", "soft"}  # soft is watched, and moves nothing
    labels = [torch.cat([y for _, y, _ in epoch.batches]) for epoch in epochs]
    assert all(len(y) == 3 * 8 and (y >= 0).all() for y in labels[:4])  # 8 images in each of 3 passes
    assert all((y < 0).sum() == 24 - 8 for y in labels[4:])


# ---- runs


def history(out):
    return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(open(f"{out}/history.csv"))]


def without_seconds(out):
    return [{**row, "seconds": 0} for row in history(out)]


def weights_of(out):
    return models.load_checkpoint(out)[0].state_dict()


def facts_of(out):
    return models.load_run(out)[1]


def state_of(out):
    return models.state_of(facts_of(out))


def alike(*outs):
    """Whether two runs' best weights are the same to the bit."""
    a, b = (weights_of(out) if isinstance(out, str) else out for out in outs)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def last_is_best(monkeypatch):
    """best.pt then holds the last epoch's weights, whose bits depend on all epochs before."""
    monkeypatch.setattr(train, "is_best", lambda *_: True)


@pytest.fixture
def always_saved(monkeypatch):
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)


def dies_in_epoch(n, monkeypatch, *flags, **options):
    """A run that is interrupted in its n-th epoch, before it has learned anything in it."""
    real, calls = train.train_one_epoch, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == n:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "train_one_epoch", interrupted)
        run(*flags, **options)


def validates(figures, monkeypatch):
    """Validation gives these (accuracy, AUC, loss) epoch by epoch, whatever the network has learned."""
    real, figures = train.validate, iter(figures)

    def validate(*args):
        judged, kept = real(*args)
        return judged, kept | dict(zip(("val_accuracy", "val_auc", "val_loss"), next(figures), strict=True))

    monkeypatch.setattr(train, "validate", validate)


def test_the_first_three_commands_leave_three_runs(few_phantoms, monkeypatch):
    for role in ("teacher", "baseline", "student"):
        small = {**train.RECIPES["demo"][role], "arch": "tiny", "size": 32, "epochs": 1}
        monkeypatch.setitem(train.RECIPES["demo"], role, small)
    train.main(["--role", "teacher"])
    train.main(["--role", "baseline"])
    train.main(["--role", "student", "--T", "1"])
    for name in ("teacher", "baseline", "student-T1"):
        assert {p.name for p in Path("runs/demo", name).iterdir()} == {"best.pt", "history.csv"}
    facts = facts_of("runs/demo/student-T1")
    assert facts["config"]["teacher"] == ["runs/demo/teacher"] and facts["classes"] == ["NORMAL", "PNEUMONIA"]


def test_the_name_of_a_run():
    """It has the role, the network, the temperature and the seed."""
    def name(*argv):
        return train.get_args(["--role", *argv]).out

    assert name("teacher") == "runs/demo/teacher"
    assert name("student", "--T", "10", "--seed", "2", "--data", "x") == "runs/pneumonia/student-T10-seed2"
    assert name("baseline", "--arch", "resnet18", "--augment") == "runs/demo/baseline-resnet18"


def test_flags_override_the_recipe():
    """The data choose the recipe."""
    for argv, wanted in ((["--role", "student"], ("demo", 20, 0.2, "none")),
                         (["--role", "student", "--epochs", "3", "--weights", "x"], ("demo", 3, 0.2, "x")),
                         (["--role", "baseline", "--data", "x"], ("pneumonia", 20, 0.0, "imagenet")),
                         (["--role", "teacher", "--recipe", "findings"], ("findings", 10, 0.0, "none")),
                         (["--role", "teacher", "--data", "findings"], ("findings", 10, 0.0, "none"))):
        args = train.get_args(argv)
        assert args.recipe not in ("demo", "findings") or args.data == {"demo": "phantoms"}.get(args.recipe, "findings")
        assert (args.recipe, args.epochs, args.wrong_labels, args.weights) == wanted


def test_a_network_of_your_own_is_trained(
    few_phantoms, monkeypatch
):
    """--arch takes its name in NETWORKS."""
    monkeypatch.setitem(models.NETWORKS, "mine", lambda: torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 1000)))
    run("--arch", "mine", "--out", "run")
    model, facts = models.load_run("run")
    assert facts["arch"] == "mine" and model(torch.zeros(1, 3, 32, 32)).shape == (1, 2)
    with pytest.raises(SystemExit, match="^error: no network is called myne: see torchvision[^\n]*$"):
        data.cli(lambda: run("--arch", "myne", "--out", "other"))


def test_the_best_epoch_is_kept(few_phantoms):
    run("--epochs", "4", "--lr-step", "2", "--lr-gamma", "0.1", "--out", "run")
    rows = history("run")
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert [row["lr"] for row in rows] == pytest.approx([0.01, 0.01, 0.001, 0.001])
    best = max(rows, key=lambda row: (row["val_accuracy"], -row["val_loss"]))
    model, facts = models.load_run("run")
    assert facts["epoch"] == best["epoch"] and facts["validation"]["accuracy"] == best["val_accuracy"]
    assert facts["train_accuracy"] == best["train_accuracy"]
    val = data.load("phantoms", 32, ("val",)).val
    loss = F.cross_entropy(model(data.prepare(val.images, CPU)), val.labels)
    assert loss.item() == pytest.approx(best["val_loss"], rel=1e-4)


def test_every_epoch_has_the_learning_rate_of_its_history(few_phantoms, monkeypatch):
    epochs = watch_epochs(monkeypatch)
    run("--epochs", "4", "--lr-step", "2", "--lr-gamma", "0.1", "--out", "run")
    assert [epoch.lr for epoch in epochs] == [[row["lr"]] for row in history("run")]
    assert len({row["lr"] for row in history("run")}) == 2


def test_each_flag_of_the_loss_reaches_the_loop(few_phantoms, monkeypatch):
    """Each value differs from every default."""
    epochs = watch_epochs(monkeypatch)
    monkeypatch.setitem(models.AUX_WEIGHT, "tiny", 0.3)
    run("--out", "teacher", "--epochs", "1")
    run("--T", "3", "--alpha", "0.25", "--label-smoothing", "0.125", "--clip", "0.5", "--precision", "bfloat16",
        "--epochs", "1", "--teacher", "teacher", role="student")
    teacher, student = epochs
    names = ("T", "alpha", "label_smoothing", "clip", "aux_weight", "amp", "n_steps")
    assert [getattr(student, name) for name in names] == [3, 0.25, 0.125, 0.5, 0.3, True, 3]
    assert teacher.amp is False


def test_label_smoothing_changes_the_training_loss_alone(few_phantoms):
    """At learning rate 0 both runs have the same weights in every epoch."""
    for smoothing in ("0", "0.5"):
        run("--lr", "0", "--label-smoothing", smoothing, "--out", smoothing, role="baseline")
    for plain, smoothed in zip(history("0"), history("0.5"), strict=True):
        assert plain["val_loss"] == smoothed["val_loss"] and plain["loss"] != smoothed["loss"]


def test_the_epoch_line_tells_the_figures_of_the_history(few_phantoms, capsys):
    run("--epochs", "4", "--lr", "0.1", "--out", "run")
    found = re.findall(r"epoch +(\d)/4 .*acc (\S+) spec (\S+) sens (\S+) ", capsys.readouterr().out)
    rows = history("run")
    names = ("val_accuracy", "val_specificity", "val_sensitivity")
    assert found == [(f"{row['epoch']:.0f}", *(f"{100 * row[name]:.1f}" for name in names)) for row in rows]
    assert any(row["val_specificity"] != row["val_sensitivity"] for row in rows)


@pytest.mark.parametrize("wrong", ["0", "0.5"])
def test_the_first_lines_count_wrong_labels(few_phantoms, capsys, wrong):
    run("--out", "teacher", "--epochs", "1")
    capsys.readouterr()
    run("--labels-per-class", "10", "--wrong-labels", wrong, "--teacher", "teacher", "--epochs", "1", role="student")
    found = re.search(r"24 training images, (\d+) labelled(?: \((\d+) of them wrong\))?; 12 val", capsys.readouterr().out)
    shown = data.load("phantoms", 32, ["train"]).train.labels
    given, hidden = (data.load("phantoms", 32, ["train"], labels_per_class=n, wrong_labels=float(wrong)).train.labels
                     for n in (None, 10))
    n_wrong = int(((hidden != shown) & (hidden >= 0)).sum())
    assert found.groups() == ("20", str(n_wrong) if n_wrong else None)
    assert wrong == "0" or 0 < n_wrong < (given != shown).sum()  # some of the hidden labels are wrong too


def test_one_known_finding_makes_an_image_labelled():
    nan, model = math.nan, perceptron()
    split = types.SimpleNamespace(labels=torch.tensor([[nan, 0.0], [nan, nan], [1.0, 0.0]]), ids=["a", "b", "c"])
    images = types.SimpleNamespace(train=split, val=split, n_wrong=0)
    assert "3 training images, 2 labelled; 3 val" in train.describe_run(student(), model, model, images, 0)


@pytest.mark.parametrize("source, figures, best", [
    ("phantoms", [(0.5, 0.9, 0.70), (0.6, 0.5, 0.80), (0.6, 0.5, 0.75), (0.6, 0.9, 0.78)], 3),  # a tie: the loss
    ("phantoms", [(0.6, 0.5, 0.70), (0.6, 0.5, 0.70), (0.5, 0.9, 0.10), (0.6, 0.5, 0.70)], 1),  # all the same: the first
    ("findings", [(0.5, 0.6, 0.70), (0.5, 0.7, 0.80), (0.9, 0.7, 0.75), (0.9, 0.5, 0.10)], 3),  # by AUC, not accuracy
    ("findings", [(0.5, math.nan, 0.70), (0.5, math.nan, 0.50), (0.9, math.nan, 0.60)], 2),  # no AUC: the loss
    ("findings", [(0.5, math.nan, 0.10), (0.5, 0.40, 0.50), (0.5, math.nan, 0.10)], 2),  # a bad AUC before none
])
def test_how_the_best_epoch_is_chosen(
    few_phantoms, monkeypatch, source, figures, best
):
    """best.pt, which is written at the end, holds the weights after that epoch, not those after the last."""
    epochs = watch_epochs(monkeypatch)
    validates(figures, monkeypatch)
    run("--data", source, "--epochs", str(len(figures)), "--steps-per-epoch", "1", "--out", "run")
    assert facts_of("run")["epoch"] == best
    assert [alike("run", epoch.state) for epoch in epochs] == [n + 1 == best for n in range(len(epochs))]


def test_a_kill_between_two_files_costs_no_bit(few_phantoms, last_is_best, always_saved, monkeypatch):
    """Each epoch writes best.pt and history.csv, in this order."""
    run("--out", "whole")
    real_checkpoint, real_csv = models.save_checkpoint, train.write_csv
    for n in range(1, 5):
        writes = []

        def killed(real, path, *args, n=n, writes=writes, **facts):
            writes.append(Path(path).name)
            if len(writes) == n:
                raise KeyboardInterrupt
            return real(path, *args, **facts)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(models, "save_checkpoint", lambda *a, real=real_checkpoint, f=killed, **k: f(real, *a, **k))
            patch.setattr(train, "write_csv", lambda *a, real=real_csv, f=killed, **k: f(real, *a, **k))
            run("--out", f"cut{n}")
        assert writes == (["best.pt", "history.csv"] * 2)[:n]
        assert n == 1 or bool(state_of(f"cut{n}")) == (n < 4)  # the fourth kill falls after the last best.pt
        run("--out", f"cut{n}")
        assert state_of(f"cut{n}") == "" and alike("whole", f"cut{n}")
        assert without_seconds(f"cut{n}") == without_seconds("whole")


def test_a_checkpoint_alone_knows_whether_its_run_has_ended(few_phantoms, always_saved, monkeypatch, capsys):
    """history.csv may be missing, or copied from another run."""
    run("--out", "whole")
    dies_in_epoch(2, monkeypatch, "--out", "cut")
    for out, ends in (("whole", True), ("cut", False)):
        ours, path = history(out), Path(out, "history.csv")
        for change in (path.unlink, lambda path=path: path.write_text("epoch\n1\n2\n3\n"), lambda: None):
            change()
            assert (state_of(out) == "") == ends
        capsys.readouterr()
        run("--out", out)
        assert history(out)[:len(ours)] == ours and state_of(out) == ""
        assert ("resuming after epoch 1" in capsys.readouterr().out) != ends
    assert without_seconds("cut") == without_seconds("whole")


def test_resuming_under_another_commit_prints_a_line(few_phantoms, always_saved, monkeypatch, capsys):
    def commit(name):
        monkeypatch.setattr(train, "origin", lambda device: {**evaluate.origin(device), "commit": name})

    commit("old-commit")
    dies_in_epoch(2, monkeypatch, "--out", "run", "--epochs", "3")
    dies_in_epoch(2, monkeypatch, "--out", "run", "--epochs", "3")  # resumed, by the same commit
    assert "commit" not in capsys.readouterr().out
    for name, lines in (("new-commit", 1), ("newer-commit", 0)):  # a finished run is not resumed
        commit(name)
        run("--out", "run", "--epochs", "3")
        told = [line for line in capsys.readouterr().out.splitlines() if "commit" in line]
        assert len(told) == lines and all("old-commit" in line and name in line for line in told)


def test_an_old_checkpoint_is_refused_with_what_to_do(few_phantoms):
    run("--out", "run")
    content = torch.load("run/best.pt", weights_only=True)
    facts = content["facts"]
    facts["args"], facts["made"] = facts.pop("config"), {}  # as format 4 had them
    torch.save({**content, "format": 4, "facts": facts}, "run/best.pt")
    before = Path("run/best.pt").read_bytes()
    with pytest.raises(SystemExit, match="^error: run/best.pt has format 4, [^\n]*Delete it and train it again[^\n]*$"):
        data.cli(lambda: run("--out", "run"))
    assert Path("run/best.pt").read_bytes() == before


def test_a_resumed_run_keeps_its_earlier_best_epoch(few_phantoms, always_saved, monkeypatch):
    validates([(0.9, 0.9, 0.1), (0.5, 0.5, 0.7), (0.5, 0.5, 0.7)], monkeypatch)
    flags = ("--epochs", "3", "--out", "run")
    dies_in_epoch(3, monkeypatch, *flags)
    first = weights_of("run")
    run(*flags)
    assert facts_of("run")["epoch"] == 1 and alike("run", first)


def test_a_better_epoch_removes_the_figures_of_an_earlier_one(
    few_phantoms, always_saved, monkeypatch
):
    validates([(0.5, 0.5, 0.7), (0.9, 0.9, 0.1), (0.5, 0.5, 0.7)], monkeypatch)
    judged = [Path("run", name) for name in ("metrics.json", "predictions.csv", "metrics-other.json")]
    flags = ("--epochs", "3", "--out", "run")
    dies_in_epoch(2, monkeypatch, *flags)
    [path.write_text("of the first epoch") for path in judged]
    dies_in_epoch(2, monkeypatch, *flags)  # epoch 2 of the run is made and saved, and then it dies
    assert not any(path.exists() for path in judged)
    [path.write_text("of the second epoch") for path in judged]
    run(*flags)
    assert len(history("run")) == 3 and all(path.exists() for path in judged)


def test_the_same_seed_gives_the_same_bits(few_phantoms):
    """Another seed gives others."""
    run("--epochs", "1", "--out", "a")
    run("--epochs", "1", "--out", "b")
    run("--epochs", "1", "--out", "c", "--seed", "1")
    assert alike("a", "b") and not alike("a", "c")


def test_weights_order_and_dropout_never_share_a_random_stream(few_phantoms, monkeypatch):
    seeds, batches, epoch = [], train.paired_batches, train.train_one_epoch

    def orders(*args):
        seeds.append(next(a for a in args if isinstance(a, torch.Generator)).initial_seed())
        return batches(*args)

    def drops(*args, **options):
        seeds.append(torch.initial_seed())  # what dropout draws from
        return epoch(*args, **options)

    monkeypatch.setattr(train, "paired_batches", orders)
    monkeypatch.setattr(train, "train_one_epoch", drops)
    for seed in ("0", "1"):
        run("--seed", seed, "--out", f"run{seed}", "--epochs", "3")
    assert len(seeds) == len({*seeds, 0, 1}) - 2 == 2 * 3 * 2  # runs, epochs, uses; weights begin with 0 and 1
    assert len({torch.rand(1, generator=torch.Generator().manual_seed(seed)).item() for seed in seeds}) == 12
    uses = [(seed, epoch, use, *rank) for seed in (0, 1) for epoch in (1, 2, 11)
            for use, *rank in (("order",), ("dropout", 0), ("dropout", 1))]
    assert len({train.seed_for(*use) for use in uses}) == len(uses)
    assert train.seed_for(*uses[0]) == train.seed_for(*uses[0])  # and the same in every process


@pytest.mark.parametrize("save_seconds", [0, 1e9])
@pytest.mark.parametrize("flags", [(), ("--augment", "--optimizer", "adam")])
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(
    few_phantoms, last_is_best, flags, save_seconds, monkeypatch
):
    monkeypatch.setattr(train, "SAVE_SECONDS", save_seconds)
    run("--out", "teacher")
    flags = ("--epochs", "3", "--teacher", "teacher", *flags)
    run("--out", "whole", *flags, role="student")
    dies_in_epoch(3, monkeypatch, "--out", "cut", *flags, role="student")
    assert Path("cut/history.csv").exists() == Path("cut/best.pt").exists() == (save_seconds == 0)
    run("--out", "cut", *flags, role="student")
    assert alike("whole", "cut") and facts_of("cut")["epoch"] == 3
    assert without_seconds("whole") == without_seconds("cut")


def test_a_finished_run_is_not_trained_again(few_phantoms, capsys):
    """The command prints a line and changes nothing."""
    run("--out", "run")
    before = {p.name: p.read_bytes() for p in Path("run").iterdir()}
    capsys.readouterr()
    run("--out", "run")
    out = capsys.readouterr().out
    assert "run is finished after epoch 2. Next: python evaluate.py run" in out and not re.search("epoch +./2", out)
    assert before == {p.name: p.read_bytes() for p in Path("run").iterdir()}


def test_a_finished_run_holds_its_weights_once(few_phantoms, last_is_best, always_saved, monkeypatch):
    """Before its end it also holds the last weights and the momentum, to resume from."""
    flags = ("--arch", "squeezenet1_1", "--out", "run")  # large enough for the rest not to count
    dies_in_epoch(2, monkeypatch, *flags)
    bytes_of_weights = sum(v.nbytes for v in weights_of("run").values())
    assert Path("run/best.pt").stat().st_size > 3 * bytes_of_weights
    run(*flags)
    kept = sum(path.stat().st_size for path in Path("run").iterdir())
    assert bytes_of_weights < kept < 1.1 * bytes_of_weights and len(facts_of("run")["history"]) == 2


def test_a_run_resumes_only_with_the_config_it_was_begun_with(few_phantoms, monkeypatch):
    for seed in ("0", "1"):
        run("--out", f"first{seed}", "--seed", seed)
    Path("first0/best.pt").rename("weights.pt")
    flags = ("--teacher", "first1", "--weights", "weights.pt", "--out", "run")

    def refused(sentence, *more):
        with pytest.raises(data.UserError, match=f"^run was begun with {sentence}. Repeat that command, choose another --out, or delete"):
            run(*flags, *more, role="student")

    run(*flags, role="student")
    refused(r"lr 0.01 \(now 0.02\)", "--lr", "0.02")
    refused(r"T 1.0 \(now 2.0\), seed 0 \(now 3\)", "--T", "2", "--seed", "3")
    refused("(another )?first_weights[^,]*", "--weights", "first1")
    refused(r"precision float32 \(now bfloat16\)", "--precision", "bfloat16")
    with monkeypatch.context() as patch:
        patch.setattr(train, "processes", lambda: (0, 2))
        patch.setattr(train.dist, "new_group", lambda **_: None)
        patch.setattr(train.dist, "barrier", lambda _: None)
        refused(r"processes 1 \(now 2\)")
    with monkeypatch.context() as patch:
        real = data.list_phantoms
        patch.setattr(data, "list_phantoms", lambda source: [
            {**r, "label": 1 - r["label"], "kind": 1 - r["kind"]} for r in real(source)])
        patch.setattr(models, "refuse_foreign", lambda *_: None)
        refused("another train, another val, another test")
    with monkeypatch.context() as patch:
        real_draw = data.draw_blocks
        patch.setattr(data, "draw_blocks", lambda *args: (255 - block for block in real_draw(*args)))
        refused("another train_pixels, another val_pixels", "--cache", "new")
    args = student(*flags)
    args.device, args.cache = "cpu:0", "elsewhere"  # neither changes what is trained
    train.train(args)
    Path("first1/best.pt").write_bytes(Path("weights.pt").read_bytes())
    refused("(another )?teacher_weights[^,]*")


def test_resuming_accepts_other_paths_of_the_same_files(
    few_phantoms, last_is_best, always_saved, monkeypatch
):
    """The teacher has not ended: its state is part of what is compared."""
    run("--out", "first", "--seed", "1")
    dies_in_epoch(2, monkeypatch, "--out", "teacher")
    flags = ("--weights", "first", "--teacher", "teacher")
    run(*flags, "--out", "whole", role="student")
    dies_in_epoch(2, monkeypatch, *flags, "--out", "cut", role="student")
    Path("first/best.pt").rename("weights.pt")
    Path("teacher").rename("moved")
    run("--weights", "weights.pt", "--teacher", "moved/best.pt", "--out", "cut", role="student")
    assert alike("whole", "cut") and without_seconds("whole") == without_seconds("cut")
    assert facts_of("cut")["config"]["taught_by"] != ["tiny"]


def test_unlabelled_images_make_an_epoch_longer(few_phantoms):
    """--steps-per-epoch fixes its length."""
    run("--out", "teacher", role="teacher")
    lengths = []
    for steps in ((), ("--steps-per-epoch", "2")):
        for role, who in (("baseline", ()), ("student", ("--teacher", "teacher"))):
            out = f"{role}{len(steps)}"
            run("--labels-per-class", "3", "--out", out, *who, *(steps or ("--steps-per-epoch", "3")), role=role)
            lengths.append(facts_of(out)["config"]["epoch_length"])
    assert lengths == [3, 3, 2, 2]
    args = train.get_args(["--role", "student", *TINY, "--labels-per-class", "3", "--teacher", "teacher"])
    args.steps_per_epoch = None
    for alpha, images in ((0.0, 6), (0.5, 24)):  # of 24 images 6 have a label
        args.alpha = alpha
        split = data.load_as(vars(args), 32, ["train", "val"], "cache")
        model = types.SimpleNamespace(facts={"first_weights": None, "seen_groups": []})
        assert train.run_facts(args, split, model, [])["config"]["epoch_length"] == images


def test_the_same_folder_may_be_written_in_several_ways(tmp_path):
    hospital(tmp_path / "xr", range(4), range(50, 52))
    flags = ("--weights", "none", "--finetune", "all", "--epochs", "1", "--out", "run")
    run("--data", "xr", *flags)
    for same in ("./xr", str(tmp_path / "xr")):
        run("--data", same, *flags)
    assert len(history("run")) == 1


def test_an_epoch_that_was_not_saved_leaves_no_checkpoint(few_phantoms, monkeypatch):
    dies_in_epoch(2, monkeypatch, "--out", "run")  # after the first epoch, the best so far, unsaved
    assert not Path("run/best.pt").exists()


def test_the_next_start_removes_half_written_files(few_phantoms):
    Path("run").mkdir()
    Path("run/.best.pt.01234567.part").write_bytes(b"half of it")
    run("--out", "run")
    assert {p.name for p in Path("run").iterdir()} == {"best.pt", "history.csv"}


@pytest.mark.parametrize("rank", [0, 1])
def test_only_process_0_removes_half_written_files(rank, monkeypatch, tmp_path):
    """The file may be one that process 0 is writing."""
    part = tmp_path / ".history.csv.01234567.part"
    part.write_text("half of it")
    monkeypatch.setattr(train, "processes", lambda: (rank, 2))
    assert train.resume(types.SimpleNamespace(out=tmp_path), {}, None, None) == ([], None)
    assert part.exists() == (rank == 1)


def test_a_mistake_leaves_no_folder_behind(few_phantoms):
    with pytest.raises(data.UserError, match="No such file: nobody"):
        run("--teacher", "nobody", "--out", "student", role="student")
    assert os.listdir() == []


# ---- teachers


def teacher_source(args, images):
    return train.load_teachers(args, images, CPU)[0]


def logits_of(args, images):
    """Return the logits of the teachers of a run for all of its training images."""
    return teacher_source(args, images)(torch.arange(len(images.train.labels)))


def student(*flags):
    return train.get_args(["--role", "student", *TINY, *flags])


def test_six_temperatures_run_the_teacher_once(few_phantoms, monkeypatch):
    run("--out", "teacher")
    images_read, real = [], train.forward

    def watched(model, x):
        images_read.append(0 if model.training else len(x))
        return real(model, x)

    monkeypatch.setattr(train, "forward", watched)
    for T in ("1", "10", "20", "30", "40", "50"):
        run("--teacher", "teacher", "--T", T, "--epochs", "1", role="student")
    assert sum(images_read) == 24 + 6 * 2  # and each time two images, which name the file


def test_a_teacher_reads_each_image_at_its_own_size(few_phantoms):
    run("--out", "teacher", "--size", "48")
    images, large = data.load("phantoms", 32), data.load("phantoms", 48).train
    assert large.ids == images.train.ids
    logits = models.load_checkpoint("teacher")[0](data.prepare(large.images, CPU))
    assert torch.allclose(logits_of(student("--teacher", "teacher"), images), logits, atol=1e-5)


@pytest.mark.parametrize("augment", [(), ("--augment",)])
def test_a_teacher_smaller_than_its_student_reads_small_images(few_phantoms, monkeypatch, augment):
    run("--out", "teacher")
    sides, real = {True: set(), False: set()}, train.forward

    def watched(model, x):
        sides[model.training].add(tuple(x.shape[1:]))
        return real(model, x)

    monkeypatch.setattr(train, "forward", watched)
    run("--size", "48", "--teacher", "teacher", "--epochs", "1", *augment, role="student")
    assert sides == {True: {(3, 48, 48)}, False: {(3, 32, 32)}}


def test_a_teacher_with_other_images_is_refused(few_phantoms, monkeypatch):
    """This happens where files change between two readings. The order of the images is compared, too."""
    run("--out", "teacher", "--size", "48")
    real = train.load_as

    def turned(config, size, *args):
        images = real(config, size, *args)
        if size == 48:
            images.train.ids = images.train.ids[::-1]
        return images

    monkeypatch.setattr(train, "load_as", turned)
    for augment in ((), ("--augment",)):
        with pytest.raises(data.UserError, match="the images of phantoms changed while they were read"):
            run("--teacher", "teacher", *augment, "--out", "student", role="student")


def test_changed_inputs_recompute_teacher_logits(few_phantoms, monkeypatch):
    """Two teachers of one network and as many images: only what is in them differs."""
    run("--out", "teacher")
    run("--out", "other", "--seed", "1")
    args = student("--teacher", "teacher")

    def check(turn=lambda logits: logits):
        images = data.load("phantoms", 32)
        logits = models.load_checkpoint("teacher")[0](data.prepare(images.train.images, CPU))
        assert torch.allclose(logits_of(args, images), turn(logits), atol=1e-5)
        return len(list(Path("cache").glob("teacher-tiny-*.npy")))

    assert check() == check() == 1
    [first] = Path("cache").glob("teacher-tiny-*.npy")
    written, real = first.stat().st_mtime_ns, train.teacher_logits
    with monkeypatch.context() as patch:
        patch.setattr(train, "teacher_logits", lambda teacher, images: real(teacher, images).softmax(1))
        assert check(lambda logits: logits.softmax(1)) == 2
    assert check() == 2 and first.stat().st_mtime_ns == written  # the old code finds its own file
    Path("teacher/best.pt").write_bytes(Path("other/best.pt").read_bytes())
    assert check() == check() == 3
    monkeypatch.setattr(data, "MEAN", data.MEAN + 0.1)
    assert check() == check() == 4
    monkeypatch.setattr(data, "PHANTOMS", {**data.PHANTOMS, "train": (24, 99)})
    assert check() == check() == 5


def test_augmented_images_are_the_same_for_the_teacher(few_phantoms):
    """Teacher and student read the same augmented images."""
    run("--out", "teacher")
    images = data.load("phantoms", 32)
    teacher = teacher_source(student("--teacher", "teacher", "--augment"), images)
    model, _ = models.load_checkpoint("teacher")
    for x, y, teacher_logits in paired(images.train.images, torch.arange(24), teacher, augment=True):
        with torch.no_grad():
            assert torch.allclose(teacher_logits, model(x), atol=1e-6)
            assert not torch.allclose(teacher_logits, model(data.prepare(images.train.images[y], CPU)), atol=1e-6)


def test_a_student_follows_its_teacher_against_the_labels(few_phantoms, last_is_best):
    """The check, end to end, that distillation happens: this teacher calls everything NORMAL."""
    run("--out", "teacher", "--epochs", "1")
    model, facts = models.load_checkpoint("teacher")
    with torch.no_grad():
        model.classifier[3].weight.zero_()
        model.classifier[3].bias.copy_(torch.tensor([6.0, 0.0]))
    models.save_checkpoint("teacher/best.pt", model, **facts)
    run("--teacher", "teacher", "--alpha", "1", "--out", "student", "--epochs", "6", "--lr", "0.05", role="student")
    images = data.load("phantoms", 32).val.images
    logits = models.load_checkpoint("student")[0](data.prepare(images, CPU))
    assert logits.softmax(1)[:, 1].mean() < 0.3


def test_several_teachers_are_averaged(few_phantoms):
    run("--out", "a")
    run("--out", "b", "--seed", "1")
    images = data.load("phantoms", 32)
    both, a, b = (logits_of(student("--teacher", *names, "--T", "2"), images) for names in (["a", "b"], ["a"], ["b"]))
    alone = [(logits / 2).softmax(1) for logits in (a, b)]
    assert not torch.allclose(*alone, atol=1e-4)
    assert torch.allclose((both / 2).softmax(1), (alone[0] + alone[1]) / 2, atol=1e-6)


def test_a_teacher_of_other_classes_is_refused(few_phantoms, kermany):
    run("--out", "teacher")
    with pytest.raises(data.UserError, match=r"teacher was trained on the classes \['NORMAL', 'PNEUMONIA'\]"):
        run("--teacher", "teacher", "--data", str(kermany), "--classes", "3", "--weights", "none", "--finetune", "all", role="student")


def test_a_teacher_with_infinite_logits_is_refused(few_phantoms):
    """No file is left behind."""
    run("--out", "teacher", "--epochs", "1")
    model, facts = models.load_checkpoint("teacher")
    model.classifier[3].bias.data.fill_(math.inf)
    models.save_checkpoint("teacher/best.pt", model, **facts)
    with pytest.raises(data.UserError, match="not finite in torch.float32"):
        run("--teacher", "teacher", role="student")
    assert not list(Path("cache").glob("*teacher*"))


@pytest.mark.parametrize("flags, state", [
    (("--epochs", "6"), ", unfinished (2 of 6 epochs)"),
    (("--epochs", "2"), ""),
    (("--epochs", "6", "--stop-at", "0.01"), ", stopped at 0.01"),
])
def test_the_state_of_a_teacher_is_printed_and_kept(
    few_phantoms, always_saved, monkeypatch, capsys, flags, state
):
    if flags == ("--epochs", "6"):
        dies_in_epoch(3, monkeypatch, "--out", "teacher", *flags)
    else:
        run("--out", "teacher", *flags)
    capsys.readouterr()
    run("--teacher", "teacher", "--epochs", "1", "--out", "student", role="student")
    assert f"teacher teacher: tiny{state}, epoch " in capsys.readouterr().out
    config, teacher = facts_of("student")["config"], facts_of("teacher")["config"]
    assert config["taught_by"] == [f"tiny{state}"]
    assert config["teacher_weights"] == [models.weights_hash(weights_of("teacher"))]
    assert teacher["teacher_weights"] == teacher["taught_by"] == [] and teacher["first_weights"] is None


def test_the_config_holds_all_flags_and_fingerprints(few_phantoms):
    args, config = run("--out", "run", "--lr", "0.02"), facts_of("run")["config"]
    fingerprints = data.load("phantoms", 32).fingerprints
    assert {*fingerprints} == {"train", "val", "test", "train_pixels", "val_pixels"}
    assert config == {**vars(args), **fingerprints, "first_weights": None, "epoch_length": 3, "processes": 1,
                      "taught_by": [], "teacher_weights": [], "teacher_configs": []}
    assert (config["lr"], config["precision"]) == (0.02, "float32")


# ---- whom a teacher has learned from


def hospital(root, train, test):
    """Images of patients, two a number: the public set's folders and names."""
    for part, numbers in (("train", train), ("test", test)):
        for i in numbers:
            image_file(root / part / f"NORMAL/IM-{i:04d}-0001.png", side=32)
            image_file(root / part / f"PNEUMONIA/person{i}_virus_1.png", side=32)
    return str(root)


HOSPITAL = ["--weights", "none", "--finetune", "all", "--epochs", "1", "--val-fraction", "0.25"]


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A network trained on hospital A; its student, and a network that began with its weights, on hospital B."""
    root = tmp_path_factory.mktemp("family")
    (root / "moved").mkdir()
    small = [*TINY, *HOSPITAL, "--cache", str(root / "cache")]
    a, b = hospital(root / "a", range(8), range(50, 52)), hospital(root / "b", range(10, 18), range(60, 62))
    d = hospital(root / "d", range(30, 38), range(80, 82))
    fit("--data", a, "--out", f"{root}/of_a", small=small)
    fit("--data", b, "--out", f"{root}/taught", "--teacher", f"{root}/of_a", role="student", small=small)
    fit("--data", b, "--out", f"{root}/begun", "--weights", f"{root}/of_a", small=small)
    fit("--data", d, "--out", f"{root}/clean", small=small)
    (root / "of_a").rename(root / "moved/x")
    a, b = (names(data.load(s, 32, val_fraction=0.25, cache=root / "cache").train) for s in (a, b))
    return types.SimpleNamespace(root=root, small=small, a=a, b=b)


def names(split):
    """The names by which a run remembers whom it has learned from: patients and images."""
    return {*split.groups, *split.ids}


WAYS = {  # how a student of another hospital can come by what was learned from A
    "a teacher that was moved and renamed": ["--teacher", "moved/x"],
    "the last of several teachers": ["--teacher", "clean", "moved/x"],
    "a teacher's teacher": ["--teacher", "taught"],
    "a teacher's first weights": ["--teacher", "begun"],
    "its first weights": ["--teacher", "clean", "--weights", "moved/x"],
    "its first weights' teacher": ["--teacher", "clean", "--weights", "taught/best.pt"],
}


@pytest.mark.parametrize("part", ["validation", "test"])
@pytest.mark.parametrize("way", WAYS)
def test_no_patient_both_trains_and_judges(family, tmp_path, way, part):
    """Teachers and first weights behind a student count as well."""
    others, share = range(20, 28), 0.75
    if part == "test":
        c = hospital(tmp_path / "c", others, range(8))
        judges = {*data.load(c, 32, ("test",)).test.groups}
    else:
        c = hospital(tmp_path / "c", [*range(8), *others], range(70, 72))
        judges = {*data.load(c, 32, ("val",), val_fraction=share).val.groups}
    assert judges & family.a and not judges & family.b
    flags = [f"{family.root}/{word}" if not word.startswith("-") else word for word in WAYS[way]]
    small = [*family.small, "--data", c, "--val-fraction", str(share)]
    if part == "validation" or "--weights" in flags:  # a network of hospital D teaches hospital C without objection
        fit("--teacher", f"{family.root}/clean", "--out", "allowed", role="student", small=small)
    who = re.escape(flags[-1])
    with pytest.raises(data.UserError, match=f"{who} was trained on .*, a validation or test patient of"):
        fit(*flags, "--out", "refused", role="student", small=small)


def test_a_run_records_the_patients_it_was_trained_on(family, tmp_path):
    """These include the patients of its teachers and first weights."""
    e = hospital(tmp_path / "e", range(40, 48), range(90, 92))
    own = names(data.load(e, 32, val_fraction=0.25).train)
    for name, flags, role in (("by teacher", ("--teacher", f"{family.root}/taught"), "student"),
                              ("by weights", ("--weights", f"{family.root}/begun"), "baseline")):
        fit("--data", e, *flags, "--out", name, role=role, small=family.small)
        assert set(facts_of(name)["seen_groups"]) == own | family.a | family.b


def test_renamed_patients_are_recognised(tmp_path, monkeypatch):
    flags = [*HOSPITAL, "--data", hospital(tmp_path / "a", range(8), range(50, 52))]
    run(*flags, "--out", "teacher")
    monkeypatch.setattr(data, "PATIENT", re.compile("other names"))
    with pytest.raises(data.UserError, match="teacher was trained on train/"):
        run(*flags, "--teacher", "teacher", "--out", "student", role="student")


def test_the_hash_of_a_teacher_is_of_the_weights_that_were_loaded(few_phantoms, monkeypatch):
    run("--out", "other", "--seed", "1")
    run("--out", "teacher")
    weights, images, real = weights_of("teacher"), data.load("phantoms", 32), torch.load

    def replaced(*args, **kwargs):
        loaded = real(*args, **kwargs)
        Path("teacher/best.pt").write_bytes(Path("other/best.pt").read_bytes())
        return loaded

    monkeypatch.setattr(torch, "load", replaced)
    _, [facts] = train.load_teachers(student("--teacher", "teacher"), images, CPU)
    assert facts["weights_hash"] == models.weights_hash(weights) != models.weights_hash(weights_of("teacher"))


# ---- freezing


@pytest.fixture
def pretrained(few_phantoms):
    run("--out", "pretrained")
    return "--weights", "pretrained/best.pt"


@pytest.mark.parametrize("augment", [(), ("--augment",)])
def test_a_fixed_extractor_trains_only_its_head(pretrained, augment):
    run(*pretrained, "--finetune", "head", *augment, "--out", "run")
    before, after = weights_of("pretrained"), weights_of("run")
    for name in before:  # BatchNorm's averages and counters included
        assert torch.equal(before[name], after[name]) == (not name.startswith("classifier.3.")), name


def test_a_frozen_network_is_run_once_over_the_images(pretrained, monkeypatch):
    runs = []
    real = models.features
    monkeypatch.setattr(models, "features", lambda *a: (runs.append(1), real(*a))[1])
    run(*pretrained, "--finetune", "head", "--epochs", "6")
    assert len(runs) == 2 * 2  # training and validation images, and each time two images name the file
    run(*pretrained, "--finetune", "head", "--epochs", "6", "--seed", "1")
    assert len(runs) == 3 * 2  # the second run reads the files


def test_changed_inputs_recompute_features(pretrained, monkeypatch):
    run("--out", "other", "--seed", "1")

    def check(weights="pretrained", finetune="fc"):
        images = data.load("phantoms", 32)
        args = train.get_args(["--role", "teacher", *TINY, "--weights", weights, "--finetune", finetune])
        model, trainable = train.make_network(args, images, CPU)
        layers = model.features if finetune == "fc" else torch.nn.Sequential(model.features, *model.classifier[:3])
        wanted = layers(data.prepare(images.train.images, CPU))
        features = train.input_source(args, model, trainable, images.train, CPU)(torch.arange(24))
        assert torch.allclose(features, wanted, atol=2e-3, rtol=2e-3)
        return len(list(Path("cache").glob("features-tiny-*.npy")))

    assert check() == check() == 1
    assert check("other") == check("other") == 2
    assert check(finetune="head") == check(finetune="head") == 3
    monkeypatch.setattr(data, "MEAN", data.MEAN + 0.1)
    assert check() == check() == 4
    monkeypatch.setattr(data, "PHANTOMS", {**data.PHANTOMS, "train": (24, 99)})
    assert check() == check() == 5


def test_features_too_large_for_float16_are_refused(pretrained):
    """No file is left behind."""
    model, facts = models.load_checkpoint("pretrained")
    model.features[1].weight.fill_(1e9)  # BatchNorm
    models.save_checkpoint("pretrained/best.pt", model, **facts)
    with pytest.raises(data.UserError, match="not finite in torch.float16"):
        run(*pretrained, "--finetune", "fc")
    assert not list(Path("cache").glob("features-*"))


def test_which_fully_connected_layers_are_kept(pretrained):
    """With --finetune fc, as the paper has it for ImageNet's weights."""
    own = weights_of("pretrained")
    torch.save(own, "plain.pt")
    images = data.load("phantoms", 32)
    for weights, kept in (("pretrained", True), ("plain.pt", False)):
        args = train.get_args(["--role", "teacher", *TINY, "--weights", weights, "--finetune", "fc"])
        model, trainable = train.make_network(args, images, CPU)
        assert trainable is model.classifier and not model.features[0].weight.requires_grad
        for name, value in model.state_dict().items():
            assert torch.equal(value, own[name]) == (kept or name.startswith("features.")), name


def test_random_weights_are_not_frozen(few_phantoms):
    with pytest.raises(data.UserError, match="--finetune head would freeze random weights; give --weights"):
        run("--finetune", "head")


def test_a_body_that_reads_residuals_is_not_given_images(few_phantoms):
    run("--out", "first", "--input", "residual")
    flags = ("--weights", "first", "--finetune", "head", "--out", "second")
    with pytest.raises(data.UserError, match="first needs --input residual. Add that flag"):
        run(*flags)
    run(*flags, "--input", "residual")
    assert facts_of("second")["input"] == "residual"


def test_training_on_features_equals_training_frozen(pretrained, last_is_best):
    run(*pretrained, "--finetune", "head", "--out", "table")
    images = data.load("phantoms", 32)
    model = models.build("tiny", 2, 32, "pretrained/best.pt")
    trainable = models.freeze(model, "head")
    optimizer = torch.optim.SGD(trainable.parameters(), 0.01, 0.9)
    for epoch in (1, 2):
        order = torch.cat([y for _, y, _ in paired(labels=torch.arange(24),
                                                   seed=train.seed_for(0, epoch, "order, augmentation"))])
        batches = [some(rows, images.train.labels, x=images.train.images) for rows in order.split(8)]
        batches = [(models.features(model, trainable, data.prepare(x, CPU)), y, None) for x, y, _ in batches]
        train.train_one_epoch(trainable, batches, optimizer, clip=1.0)
    assert torch.allclose(weights_of("table")["classifier.3.weight"], model.classifier[3].weight, atol=1e-4)  # float16


# ---- the command line


def refusal(argv, capsys):
    """The one line with which argparse ends, exit code 2; its usage stands above."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        train.get_args(argv)
    printed = capsys.readouterr()
    *usage, line = printed.err.splitlines()
    assert end.value.code == 2 and not printed.out
    assert "error: " in line and not any("error" in other for other in usage)
    return line


STUDENT, TEACHER = ["--role", "student"], ["--role", "teacher"]
WRONG_FLAGS = [
    (["--role", "pupil"], "argument --role: invalid choice: 'pupil'"),
    ([], "required: --role"),
    ([*STUDENT, "--alpha", "1.5"], "alpha must lie between 0 (labels) and 1 (teacher), got 1.5"),
    ([*STUDENT, "--alpha", "-0.1"], "alpha must lie between 0 (labels) and 1 (teacher), got -0.1"),
    ([*STUDENT, "--alpha", "nan"], "alpha must lie between 0 (labels) and 1 (teacher), got nan"),
    ([*STUDENT, "--alpha", "half"], "argument --alpha: invalid float value: 'half'"),
    ([*STUDENT, "--T", "0"], "T, the temperature, must lie between 0.001 and 1000, got 0.0"),
    ([*STUDENT, "--T", "1001"], "T, the temperature, must lie between 0.001 and 1000, got 1001.0"),
    ([*STUDENT, "--T", "nan"], "T, the temperature, must lie between 0.001 and 1000, got nan"),
    ([*TEACHER, "--clip", "-1"], "--clip is -1.0, expected 0 to 1e+09"),
    ([*TEACHER, "--lr", "-1"], "--lr is -1.0, expected 0 to 1e+09"),
    ([*TEACHER, "--wrong-labels", "20"], "--wrong-labels is 20.0, expected 0 to 1"),
    ([*TEACHER, "--val-fraction", "-0.1"], "--val-fraction is -0.1, expected 0 to 1"),
    ([*TEACHER, "--label-smoothing", "2"], "--label-smoothing is 2.0, expected 0 to 1"),
    ([*TEACHER, "--stop-at", "90"], "--stop-at is 90.0, expected 0 to 1"),
    ([*TEACHER, "--batch-size", "1"], "--batch-size is 1, expected 2 or more"),
    ([*TEACHER, "--epochs", "0"], "--epochs is 0, expected 1 to 1e+09"),
    ([*TEACHER, "--steps-per-epoch", "0"], "--steps-per-epoch is 0, expected 1 to 1e+09"),
    ([*TEACHER, "--size", "0"], "--size is 0, expected 1 to 9999"),
    ([*TEACHER, "--per-class", "1"], "--per-class is 1, expected 2 to 1e+09"),
    ([*STUDENT, "--labels-per-class", "-1"], "--labels-per-class is -1, expected 0 to 1e+09"),
    ([*TEACHER, "--epochs", "1.5"], "argument --epochs: invalid int value: '1.5'"),
    ([*TEACHER, "--classes", "4"], "argument --classes: invalid choice: 4"),
    ([*TEACHER, "--no-such-flag"], "unrecognized arguments: --no-such-flag"),
    ([*TEACHER, "--epoch", "3"], "unrecognized arguments: --epoch 3"),
    ([*TEACHER, "--device", "cuda"], "argument --device: "),
    ([*TEACHER, "--precision", "float16"], "argument --precision: invalid choice: 'float16'"),
    ([*STUDENT, "--teacher", "x", "--out", "./x"], "a student cannot be its own teacher: --out is ./x"),
    ([*STUDENT, "--teacher", "y", "x", "--out", "x"], "a student cannot be its own teacher: --out is x"),
    ([*TEACHER, "--teacher", "x"], "--teacher belongs to --role student; a teacher is trained on labels only"),
    (["--role", "baseline", "--teacher", "x"], "--teacher belongs to --role student; a baseline"),
]


@pytest.mark.parametrize("flags, line", WRONG_FLAGS, ids=[" ".join(flags) for flags, _ in WRONG_FLAGS])
def test_a_wrong_command_line_is_one_line_and_exit_code_2(flags, line, capsys):
    assert line in refusal(flags, capsys)


def test_the_ends_of_what_a_flag_may_be_are_taken():
    args = train.get_args([*STUDENT, "--labels-per-class", "0", "--T", "1000", "--alpha", "1", "--clip", "0"])
    assert (args.labels_per_class, args.T, args.alpha, args.clip) == (0, 1000, 1, 0)
    assert train.get_args([*STUDENT, "--alpha", "0", "--wrong-labels", "1"]).wrong_labels == 1


def test_a_mistake_of_a_user_is_one_line_and_exit_code_1(kermany):
    script = Path(train.__file__).parent / "train.py"
    flags = ["--data", str(kermany), "--weights", "none", "--finetune", "all", "--arch", "squeezenet1_1", "--size", "32"]
    done = subprocess.run([sys.executable, str(script), *STUDENT, *flags], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and "runs/pneumonia/teacher" in done.stderr
    flags = [*STUDENT, *SMALL, "--weights", "none", "--finetune", "all", "--data", str(kermany)]
    for script, argv in (
        (train, [*TEACHER, "--weights", "none", "--finetune", "all", "--data", "nowhere"]),
        (train, [*flags, "--teacher", "nowhere"]),
        (train, [*flags, "--weights", "nowhere"]),
        (evaluate, ["nowhere"]),
        (data, ["nowhere"]),
    ):
        with pytest.raises(SystemExit, match="^error: [^\n]*nowhere[^\n]*$"):  # printed, with exit code 1
            data.cli(lambda script=script, argv=argv: script.main(argv))


def fails(*_, **__):
    raise AssertionError("this must not be reached")


@pytest.mark.parametrize("role, flags, line", [
    ("teacher", ["--weights", "nothing.pt"], "No such file: nothing.pt"),
    ("student", ["--teacher", "nobody"], "No such file: nobody"),
    ("teacher", ["--data", "nowhere"], "No such folder: nowhere"),
])
def test_missing_files_are_found_before_decoding(monkeypatch, role, flags, line):
    """Images, weights and teachers are looked for."""
    monkeypatch.setattr(data, "draw_blocks", fails)
    monkeypatch.setattr(data, "decode_blocks", fails)
    with pytest.raises(SystemExit, match=f"^error: [^\n]*{re.escape(line)}[^\n]*$"):
        data.cli(lambda: fit(*flags, "--out", "run", role=role))
    assert not Path("cache").exists() and not Path("run").exists()


@pytest.mark.parametrize("out", ["taken", "taken/run"])
def test_an_out_that_cannot_be_created_is_one_line(few_phantoms, monkeypatch, out):
    Path("taken").write_text("a file")
    monkeypatch.setattr(train, "train_one_epoch", fails)
    with pytest.raises(SystemExit, match=f"^error: [^\n]*'{out}'$"):
        data.cli(lambda: run("--out", out))


def test_a_loss_that_is_not_finite_ends_the_run(few_phantoms, monkeypatch):
    """The message has the numbers."""
    real = train.distillation_loss
    monkeypatch.setattr(train, "distillation_loss", lambda *args: tuple(math.nan * part for part in real(*args)))
    with pytest.raises(data.UserError, match="the loss is nan in epoch +1/2 at learning rate 0.01.*--lr"):
        run("--out", "run")
    assert not Path("run").exists()


def test_help_shows_the_defaults_of_recipe_and_role(capsys):
    for argv, wanted in (
        (["--help"], "inception_v3"),
        ([*STUDENT, "--data", "x", "--help"], "(default: 128)"),
    ):
        with pytest.raises(SystemExit) as end:
            train.get_args(argv)
        assert end.value.code == 0 and wanted in capsys.readouterr().out


@pytest.mark.parametrize("script", ["data", "evaluate", "train", "profile_gpu"])
def test_help_begins_with_an_example_and_fits_a_terminal(script, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module(script).main(["--help"])
    page = capsys.readouterr().out
    assert page.index(f"python {script}.py ", page.index("\n\n")) < page.index("options:")
    assert max(map(len, page.splitlines())) <= 110
    if script == "train":
        for default in ("inception_v3)", "0.02)", "0.9)", "0)", "cache)"):
            assert f"(default: {default}" in " ".join(page.split())


def test_a_log_file_gets_one_line_per_epoch(few_phantoms, capsys):
    """It gets no progress bar."""
    run("--per-class", "8", "--out", "run")
    out = capsys.readouterr().out
    assert len(re.findall(r"^epoch +\d/2 .*loss .* lr .* s(?:  best)?$", out, re.MULTILINE)) == 2
    assert "\r" not in out and "\033" not in out
