"""What training must do, and what must never be true of it: the loop, distillation, freezing, resuming."""

import csv
import hashlib
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
from conftest import SMALL, fit, image_file

import data
import evaluate
import models
import profile_gpu
import train

CPU = torch.device("cpu")
SHUFFLENET = ("--arch", "shufflenet_v2_x0_5")  # after a few steps SqueezeNet says the same of every image


def tiny(classes=2):
    """A network with BatchNorm and dropout, small enough for a test."""
    first = torch.nn.Linear(16, 8, bias=False)  # in front of BatchNorm a bias has no gradient
    layers = [torch.nn.Flatten(), first, torch.nn.BatchNorm1d(8), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, torch.nn.Dropout(0.1), torch.nn.Linear(8, classes))


class WithAux(torch.nn.Module):
    """A network with an auxiliary head."""

    def __init__(self):
        super().__init__()
        self.main, self.aux = torch.nn.Linear(16, 2), torch.nn.Linear(16, 2)

    def forward(self, x):
        return self.main(x.flatten(1)), self.aux(x.flatten(1))


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr)


X, Y = torch.randn(32, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 2
TABLE = torch.randn(32, 2, generator=torch.Generator().manual_seed(1))
FINDINGS = (torch.randn(32, 2, generator=torch.Generator().manual_seed(2)) > 0).float()


def some(rows, labels=Y, teacher=None, x=X):
    """A batch as the loop takes it."""
    return x[rows], labels[rows], None if teacher is None else teacher[rows]


def paired(inputs=X, labels=Y, teachers=(), seed=0, **flags):
    """The batches that `paired_batches` makes of tables and of pairs (table, network)."""
    args = types.SimpleNamespace(**{"augment": False, "batch_size": 8, "steps_per_epoch": None, "T": 1.0,
                                    "device": "cpu", "no_amp": False, **flags})  # fmt: skip
    pairs = [table if isinstance(table, tuple) else (table, None) for table in (inputs, *teachers)]
    return list(train.paired_batches(pairs[0], labels, pairs[1:], args, torch.Generator().manual_seed(seed)))


def vector(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def weights_after(model=None, teacher=None, seed=0, labels=Y, **options):
    """Train a tiny network for one epoch; returns its weights as one vector."""
    torch.manual_seed(seed)
    model = model or tiny()
    batches = paired(labels=labels, teachers=[] if teacher is None else [teacher], seed=seed)
    train.train_one_epoch(model, batches, sgd(model), **options)
    return vector(model)


# ---- batches


def test_image_label_and_every_teacher_of_a_batch_are_of_the_same_rows():
    number = torch.arange(50.0)
    images = torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1)  # of one pixel, which tells its row
    first, second = torch.stack([number, -number], 1), torch.stack([number / 2, number], 1)
    for x, y, said in paired(number[:, None], torch.arange(50), [first]):
        assert torch.equal(x[:, 0], y.float()) and torch.equal(said, first[y])
    for x, y, said in paired(images, torch.arange(50), [first, second], T=20.0):
        assert torch.equal(x, data.prepare(images[y], CPU))
        mean = ((first[y] / 20).softmax(1) + (second[y] / 20).softmax(1)) / 2
        assert torch.allclose((said / 20).softmax(1), mean, atol=1e-6)
    assert paired()[0][2] is None  # without a teacher there is nothing to learn from one


def test_every_image_is_seen_once_an_epoch_in_another_order_each_epoch():
    first, again, second = (torch.cat([y for _, y, _ in paired(labels=torch.arange(32), seed=seed)])
                            for seed in (0, 0, 1))  # fmt: skip
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(32))
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_a_run_sees_every_image_in_every_epoch_and_in_another_order(few_phantoms, monkeypatch):
    epochs, real = [], train.train_one_epoch

    def watched(model, batches, *args):
        batches = list(batches)
        epochs.append([tuple(image.flatten().tolist()) for x, _, _ in batches for image in x])
        return real(model, batches, *args)

    monkeypatch.setattr(train, "train_one_epoch", watched)
    fit("--epochs", "3")
    assert len(set(epochs[0])) == 24 and {tuple(sorted(seen)) for seen in epochs} == {tuple(sorted(epochs[0]))}
    assert len(set(map(tuple, epochs))) == 3


def test_a_last_batch_of_one_joins_the_one_before_it():
    assert [len(y) for _, y, _ in paired(labels=Y[:9], batch_size=4)] == [4, 5]
    assert [len(y) for _, y, _ in paired(labels=Y[:10], batch_size=4)] == [4, 4, 2]


def test_steps_per_epoch_makes_an_epoch_so_many_batches_be_that_less_or_more_than_one_pass():
    assert [len(y) for _, y, _ in paired(steps_per_epoch=3)] == [8, 8, 8]
    rows = torch.cat([y for _, y, _ in paired(labels=torch.arange(32), steps_per_epoch=6)])
    assert len(rows) == 48 and rows.bincount(minlength=32).min() == 1  # once all, then half of them again
    assert sorted(rows[:32].tolist()) == list(range(32))


def test_each_of_several_processes_takes_an_equal_share_of_a_batch_and_none_takes_anothers(monkeypatch):
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(train, "processes", lambda rank=rank: (rank, 2))
        shares.append([set(y.tolist()) for _, y, _ in paired(labels=torch.arange(32), batch_size=9)])
    for mine, others in zip(*shares, strict=True):
        assert len(mine) == len(others) >= 2 and not mine & others
    assert len(set().union(*shares[0], *shares[1])) == 32 - 4  # of batches of 9, 9, 9 and 5 one image each


def slopes(side, directions):
    """Images as bright as a slope that climbs in a direction: the same at every size, and still slopes
    when they are moved."""
    across = (torch.arange(side) + 0.5) / side * 2 - 1
    climb = directions[:, :1, None] * across + directions[:, 1:, None] * across[:, None]
    return (128 + 90 * climb).round().to(torch.uint8)[:, None]


def test_a_moved_image_is_moved_for_the_teacher_as_for_the_student_also_at_twice_the_size():
    angles = torch.arange(24) * 0.26
    directions = torch.stack([angles.cos(), angles.sin()], 1)
    small, large = slopes(32, directions), slopes(64, directions)
    batches = paired(small, torch.arange(24), [(large, lambda x: x)], augment=True)
    moved = []
    for x, y, said in batches:
        halved = F.avg_pool2d(said, 2)
        inside = (..., slice(4, -4), slice(4, -4))  # at the border a shift brings in black
        assert (x - halved)[inside].abs().max() < 0.04  # two times rounded to a grey level
        moved.append((x - data.prepare(small[y], CPU))[inside].abs().amax((1, 2, 3)))
    assert torch.cat(moved).median() > 0.1  # and the movement is larger than that
    other = paired(small, torch.arange(24), augment=True, seed=1)
    assert not torch.equal(torch.cat([x for x, _, _ in other]), torch.cat([x for x, _, _ in batches]))


# ---- the loop


def test_one_step_of_the_loop_is_the_update_written_out_by_hand():
    torch.manual_seed(0)
    w = torch.nn.Linear(16, 2, bias=False)
    start, x = w.weight.detach().clone(), X[:8].flatten(1)
    T, alpha, lr = 3.0, 0.7, 0.1
    train.train_one_epoch(w, [(x, Y[:8], TABLE[:8])], sgd(w, lr), T=T, alpha=alpha)
    z = x @ start.T
    hard = z.softmax(1) - F.one_hot(Y[:8], 2)
    soft = T * ((z / T).softmax(1) - (TABLE[:8] / T).softmax(1))
    gradient = ((1 - alpha) * hard + alpha * soft).T @ x / 8
    assert torch.allclose(w.weight, start - lr * gradient, atol=1e-6)


def test_training_moves_the_student_and_leaves_the_teacher_alone():
    student, teacher = tiny(), tiny().eval()
    frozen = {k: v.clone() for k, v in teacher.state_dict().items()}  # BatchNorm's averages too
    before = [p.detach().clone() for p in student.parameters()]
    train.train_one_epoch(student, [(X, Y, teacher(X)) for _ in range(3)], sgd(student))
    assert not any(torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))
    assert all(p.grad is None for p in teacher.parameters()) and not teacher.training
    assert all(torch.equal(v, frozen[k]) for k, v in teacher.state_dict().items())


def test_the_model_trains_in_training_mode_also_after_it_was_evaluated():
    model = tiny().eval()
    average = model[2].running_mean.clone()
    train.train_one_epoch(model, [(X, Y, None)], sgd(model))
    assert model.training and not torch.equal(average, model[2].running_mean)


def test_without_a_teacher_or_with_alpha_zero_the_weights_are_those_of_the_baseline_to_the_bit():
    alone = weights_after()
    assert torch.equal(alone, weights_after(teacher=TABLE, alpha=0.0))
    assert not torch.equal(alone, weights_after(teacher=TABLE, alpha=0.5))


def test_alpha_one_heeds_no_label_not_even_through_an_auxiliary_head():
    def trained(labels, alpha):
        torch.manual_seed(0)
        return weights_after(WithAux(), TABLE, labels=labels, alpha=alpha, aux_weight=0.4)

    assert torch.equal(trained(Y, 1.0), trained(1 - Y, 1.0))
    assert not torch.equal(trained(Y, 0.9), trained(1 - Y, 0.9))


def test_auxiliary_heads_learn_by_their_weight():
    class Aux(torch.nn.Linear):
        def forward(self, x):
            return torch.zeros(len(x), 2, requires_grad=True), super().forward(x.flatten(1))

    moved = []
    for weight in (0.0, 0.3, 0.6):
        torch.manual_seed(0)
        model = Aux(16, 2)
        before = model.weight.detach().clone()
        train.train_one_epoch(model, [(X, Y, None)], sgd(model), aux_weight=weight)
        moved.append(model.weight.detach() - before)
    assert not moved[0].any() and torch.allclose(2 * moved[1], moved[2], atol=1e-6)


def test_permuting_the_rows_of_the_teachers_table_changes_what_is_learned():
    shuffled = TABLE[torch.randperm(32)]
    assert not torch.equal(weights_after(teacher=TABLE), weights_after(teacher=shuffled))


def test_reported_losses_are_means_over_images_also_with_a_short_last_batch():
    model, x = torch.nn.Linear(16, 2), X.flatten(1)
    batches = [some(slice(0, 24), Y, TABLE, x), some(slice(24, 32), Y, TABLE, x)]
    row = train.train_one_epoch(model, batches, sgd(model, 0.0), 2.0, 0.3)
    total, hard, soft = train.distillation_loss(model(x), TABLE, Y, 2.0, 0.3)
    for name, value in (("loss", total), ("hard", hard), ("soft", soft)):
        assert row[name] == pytest.approx(value.item(), rel=1e-5)
    right = (model(x).argmax(1) == Y).float().mean().item()
    assert row["train_accuracy"] == pytest.approx(right)


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


@pytest.mark.parametrize("labels", [Y, FINDINGS], ids=["classes", "findings"])
def test_images_without_a_label_move_nothing_through_the_label_loss(labels):
    trained, rows = [], []
    for batch in (some(slice(0, 32), without(labels, slice(8, 32))), some(slice(0, 8), labels)):
        torch.manual_seed(0)
        model = WithAux()
        rows.append(train.train_one_epoch(model, [batch], sgd(model), aux_weight=0.4))
        trained.append(vector(model))
    assert torch.allclose(*trained, atol=1e-7)
    assert rows[0] == pytest.approx(rows[1], rel=1e-5)  # losses and accuracy are those of the labelled alone


@pytest.mark.parametrize("labels", [Y, FINDINGS], ids=["classes", "findings"])
def test_images_without_a_label_move_everything_through_the_teacher(labels):
    """8 labelled and 24 unlabelled images: the step, written out by hand."""
    torch.manual_seed(0)
    w = torch.nn.Linear(16, 2, bias=False)
    start, x, T, alpha, lr = w.weight.detach().clone(), X.flatten(1), 3.0, 0.7, 0.1
    train.train_one_epoch(w, [(x, without(labels, slice(8, 32)), TABLE)], sgd(w, lr), T=T, alpha=alpha)
    z = x @ start.T
    if labels is Y:
        hard, soft = (z.softmax(1) - F.one_hot(Y, 2)) / 8, ((z / T).softmax(1) - (TABLE / T).softmax(1)) / 32
    else:
        hard, soft = (z.sigmoid() - labels) / 16, ((z / T).sigmoid() - (TABLE / T).sigmoid()) / 64
    hard[8:] = 0
    gradient = ((1 - alpha) * hard + alpha * T * soft).T @ x
    assert torch.allclose(w.weight, start - lr * gradient, atol=1e-6)


@pytest.mark.parametrize("labels", [Y, FINDINGS], ids=["classes", "findings"])
def test_a_batch_without_any_label_has_a_label_loss_of_zero_and_moves_only_through_the_teacher(labels):
    for teacher in (None, TABLE):
        torch.manual_seed(0)
        model = WithAux()
        before = vector(model)
        batch = some(slice(0, 8), without(labels, slice(0, 8)), teacher)
        row = train.train_one_epoch(model, [batch], sgd(model), aux_weight=0.4)
        assert row["hard"] == 0 and all(map(math.isfinite, row.values()))
        assert torch.equal(vector(model), before) == (teacher is None)
        assert vector(model).isfinite().all() and (row["loss"] > 0) == (teacher is not None)


def test_several_passes_over_very_few_images_come_to_an_end(monkeypatch):
    calls, real = [], torch.randperm

    def few_calls(*args, **options):
        calls.append(1)
        assert len(calls) <= 3  # a batch of one that joined the pass before it would never end
        return real(*args, **options)

    monkeypatch.setattr(torch, "randperm", few_calls)
    args = train.get_args(["--role", "baseline", *SMALL])
    batches = train.paired_batches((X[:1], None), Y[:1], [], args, torch.Generator())
    assert [len(y) for _, y, _ in batches] == [1, 1, 1]


def test_the_hard_loss_that_is_told_is_a_mean_over_the_labelled_images_of_all_batches():
    model, x = torch.nn.Linear(4, 2), torch.randn(12, 4)
    y = torch.tensor([0, -1, -1, -1, 1, 0, 1, -1, -1, -1, -1, -1])  # one, three and no label a batch of four
    batches = [(x[rows], y[rows], torch.zeros(4, 2)) for rows in torch.arange(12).split(4)]
    row = train.train_one_epoch(model, batches, torch.optim.SGD(model.parameters(), 0.0))
    wanted = F.cross_entropy(model(x)[y >= 0], y[y >= 0]).item()
    assert row["hard"] == pytest.approx(wanted, rel=1e-5)


def test_hidden_labels_may_be_right_or_wrong_without_a_bit_of_the_weights_changing(few_phantoms, monkeypatch):
    fit("--out", "teacher", *SHUFFLENET)
    flags = ["--teacher", "teacher", "--labels-per-class", "3", "--alpha", "0.5", "--epochs", "1"]
    fit(*flags, "--out", "right", role="student")
    split = data.load("phantoms", 32, labels_per_class=3).train
    kept = {id for id, label in zip(split.ids, split.labels, strict=True) if label >= 0}
    assert len(kept) == 6
    fit(*flags, "--wrong-labels", "1", "--out", "all wrong", role="student")
    real = data.list_images

    def all_but_those_kept(*args):
        records, names = real(*args)
        return [{**r, "chance": 2 if r["id"] in kept else 0} for r in records], names

    monkeypatch.setattr(data, "list_images", all_but_those_kept)
    fit(*flags, "--wrong-labels", "1", "--out", "hidden ones wrong", role="student")
    assert alike("right", "hidden ones wrong") and not alike("right", "all wrong")


# ---- runs


def history(out):
    return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(open(f"{out}/history.csv"))]


def without_seconds(out):
    return [{**row, "seconds": 0} for row in history(out)]


def weights_of(out):
    return models.load_checkpoint(out)[0].state_dict()


def alike(*outs):
    """Whether two runs' best weights are the same to the bit."""
    a, b = map(weights_of, outs)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def last_is_best(monkeypatch):
    """best.pt then holds the last epoch's weights, whose bits depend on all epochs before."""
    monkeypatch.setattr(train, "is_best", lambda *_: True)


def dies_in_epoch(n, monkeypatch):
    """The next run is interrupted in this epoch, before it has learned anything in it."""
    real, calls = train.train_one_epoch, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == n:
            monkeypatch.setattr(train, "train_one_epoch", real)
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(train, "train_one_epoch", interrupted)


def test_the_first_three_commands_leave_three_runs_where_the_readme_says(few_phantoms, monkeypatch):
    for role in ("teacher", "baseline", "student"):
        small = {**train.RECIPES["demo"][role], "arch": "squeezenet1_1", "size": 32, "epochs": 1}
        monkeypatch.setitem(train.RECIPES["demo"], role, small)
    train.main(["--role", "teacher"])
    train.main(["--role", "baseline"])
    train.main(["--role", "student", "--T", "1"])
    for name in ("teacher", "baseline", "student-T1"):
        assert {p.name for p in Path("runs/demo", name).iterdir()} == {"best.pt", "last.pt", "history.csv"}
    _, facts = models.load_checkpoint("runs/demo/student-T1")
    assert facts["args"]["teacher"] == ["runs/demo/teacher"] and facts["classes"] == ["NORMAL", "PNEUMONIA"]


def test_a_run_is_named_by_its_role_and_by_what_differs_from_the_recipe():
    def name(*argv):
        return train.get_args(argv).out

    assert name("--role", "teacher") == "runs/demo/teacher"
    assert (
        name("--role", "student", "--T", "10", "--seed", "2", "--data", "x")
        == "runs/pneumonia/student-T10-seed2"
    )
    assert (
        name("--role", "baseline", "--arch", "resnet18", "--augment") == "runs/demo/baseline-resnet18-augment"
    )
    assert name("--role", "student", "--teacher", "runs/a", "runs/b") == "runs/demo/student-T1-of-a-of-b"


def test_the_best_epoch_on_validation_is_kept_and_history_tells_it(few_phantoms):
    args = fit("--epochs", "4", "--lr-step", "2", "--lr-gamma", "0.1")
    rows = history(args.out)
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert [row["lr"] for row in rows] == pytest.approx([0.01, 0.01, 0.001, 0.001])
    best = max(rows, key=lambda row: (row["val_accuracy"], -row["val_loss"]))
    model, facts = models.load_checkpoint(args.out)
    assert facts["epoch"] == best["epoch"] and facts["validation"]["accuracy"] == best["val_accuracy"]
    val = data.load("phantoms", 32, ("val",)).val
    logits = train.predict(model, val.images, CPU)
    assert train.label_loss(logits, val.labels).item() == pytest.approx(best["val_loss"], rel=1e-4)


def says(figures, monkeypatch):
    """Validation says these (accuracy, AUC, loss) epoch by epoch, whatever the network says."""
    real, figures = train.validate, iter(figures)

    def validate(*args):
        judged, kept = real(*args)
        return judged, kept | dict(zip(("val_accuracy", "val_auc", "val_loss"), next(figures), strict=True))

    monkeypatch.setattr(train, "validate", validate)


@pytest.mark.parametrize("source, figures, best", [
    ("phantoms", [(0.5, 0.9, 0.70), (0.6, 0.5, 0.80), (0.6, 0.5, 0.75), (0.6, 0.9, 0.78)], 3),  # a tie: the loss
    ("phantoms", [(0.6, 0.5, 0.70), (0.6, 0.5, 0.70), (0.5, 0.9, 0.10), (0.6, 0.5, 0.70)], 1),  # all the same: the first
    ("findings", [(0.5, 0.6, 0.70), (0.5, 0.7, 0.80), (0.9, 0.7, 0.75), (0.9, 0.5, 0.10)], 3),  # by AUC, not accuracy
    ("findings", [(0.5, math.nan, 0.70), (0.5, math.nan, 0.50), (0.9, math.nan, 0.60)], 2),  # no AUC: the loss
    ("findings", [(0.5, math.nan, 0.10), (0.5, 0.40, 0.50), (0.5, math.nan, 0.10)], 2),  # a bad AUC before none
])  # fmt: skip
def test_accuracy_or_auc_chooses_the_best_epoch_and_the_loss_decides_ties_and_where_there_is_no_auc(
    few_phantoms, monkeypatch, source, figures, best
):
    says(figures, monkeypatch)
    fit("--data", source, "--epochs", str(len(figures)), "--steps-per-epoch", "1", "--out", "run")
    assert models.load_checkpoint("run")[1]["epoch"] == best


def test_a_run_that_dies_while_it_saves_its_end_is_not_taken_for_finished(few_phantoms, monkeypatch):
    real = train.save_run
    monkeypatch.setattr(train, "save_run", lambda args, *rest: dies() if train.finished(args, rest[3][-1])
                        else real(args, *rest))  # fmt: skip
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)

    def dies():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit("--out", "run")
    assert models.unfinished("run", models.load_checkpoint("run")[1]) == ", epoch 1 of 2"


def test_a_run_whose_best_weights_are_gone_does_not_go_on(few_phantoms):
    fit("--out", "run")
    Path("run/best.pt").unlink()
    with pytest.raises(data.UserError, match="run/last.pt is there and best.pt is not: delete it to train anew"):
        fit("--out", "run")


def test_a_run_does_not_go_on_with_other_labels_of_the_same_images(few_phantoms, monkeypatch):
    fit("--out", "run")
    real = data.list_phantoms

    def other_labels(source):
        return [{**r, "label": 1 - r["label"], "kind": 1 - r["kind"]} for r in real(source)]

    monkeypatch.setattr(data, "list_phantoms", other_labels)
    with pytest.raises(data.UserError, match="run was begun with other images"):
        fit("--out", "run")


def test_a_body_that_reads_residuals_is_not_given_images(few_phantoms):
    fit("--out", "first", "--input", "residual")
    with pytest.raises(data.UserError, match="first/best.pt reads the --input residual: add that flag"):
        fit("--weights", "first", "--finetune", "head")
    args = fit("--weights", "first", "--finetune", "head", "--input", "residual")
    assert models.load_checkpoint(args.out)[1]["input"] == "residual"


def test_best_is_written_before_last_so_that_a_kill_between_them_loses_no_epoch(few_phantoms, monkeypatch):
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    says([(0.5, 0.5, 0.7), (0.9, 0.9, 0.1), (0.5, 0.5, 0.7)], monkeypatch)
    real, saves = models.save_checkpoint, []

    def killed(path, *args, **kwargs):
        saves.append(Path(path).name)
        if len(saves) == 4:  # the second of the second epoch
            raise KeyboardInterrupt
        real(path, *args, **kwargs)

    monkeypatch.setattr(models, "save_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        fit("--out", "run", "--epochs", "3")
    assert saves == ["best.pt", "last.pt"] * 2
    assert models.load_checkpoint("run")[1]["epoch"] == 2  # the best, which is not yet in last.pt
    assert len(models.load_checkpoint("run/last.pt")[1]["history"]) == 1


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(few_phantoms):
    fit("--epochs", "1", "--out", "a")
    fit("--epochs", "1", "--out", "b")
    fit("--epochs", "1", "--out", "c", "--seed", "1")
    assert alike("a", "b") and not alike("a", "c")


def test_weights_order_and_dropout_never_share_a_random_stream(few_phantoms, monkeypatch):
    seeds, batches, epoch = [], train.paired_batches, train.train_one_epoch

    def orders(*args):
        seeds.append(next(a for a in args if isinstance(a, torch.Generator)).initial_seed())
        return batches(*args)

    def drops(*args):
        seeds.append(torch.initial_seed())  # what dropout draws from
        return epoch(*args)

    monkeypatch.setattr(train, "paired_batches", orders)
    monkeypatch.setattr(train, "train_one_epoch", drops)
    for seed in ("0", "1"):
        fit("--seed", seed, "--out", f"run{seed}", "--epochs", "3")
    assert len(seeds) == len({*seeds, 0, 1}) - 2 == 2 * 3 * 2  # runs, epochs, uses; weights begin with 0 and 1
    assert len({torch.rand(1, generator=torch.Generator().manual_seed(seed)).item() for seed in seeds}) == 12
    uses = [(seed, epoch, use, *rank) for seed in (0, 1) for epoch in (1, 2, 11)
            for use, *rank in (("order",), ("dropout", 0), ("dropout", 1))]  # fmt: skip
    assert len({train.seed_for(*use) for use in uses}) == len(uses)
    assert train.seed_for(*uses[0]) == train.seed_for(*uses[0])  # and the same in every process


@pytest.mark.parametrize("save_seconds", [0, 1e9])
@pytest.mark.parametrize("flags", [(), ("--augment",)])
def test_a_run_that_was_cut_short_ends_with_the_bits_of_one_that_was_not(
    few_phantoms, last_is_best, flags, save_seconds, monkeypatch
):
    monkeypatch.setattr(train, "SAVE_SECONDS", save_seconds)
    fit("--out", "teacher", *SHUFFLENET)
    flags = ("--epochs", "3", "--teacher", "teacher", *flags)
    fit("--out", "whole", *flags, role="student")
    dies_in_epoch(3, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        fit("--out", "cut", *flags, role="student")
    assert len(history("cut")) == 2 and Path("cut/last.pt").exists() == (save_seconds == 0)
    fit("--out", "cut", *flags, role="student")
    assert alike("whole", "cut") and models.load_checkpoint("cut")[1]["epoch"] == 3
    assert without_seconds("whole") == without_seconds("cut")


def test_a_finished_run_started_again_says_so_and_touches_nothing(few_phantoms, capsys):
    args = fit()
    before = {p.name: p.stat().st_mtime_ns for p in Path(args.out).iterdir()}
    capsys.readouterr()
    fit()
    assert "is finished, epoch 2" in capsys.readouterr().out
    assert before == {p.name: p.stat().st_mtime_ns for p in Path(args.out).iterdir()}


def test_a_run_keeps_its_weights_once_when_it_is_finished_and_before_that_what_it_goes_on_from(
    few_phantoms, last_is_best, monkeypatch
):
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    dies_in_epoch(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        fit("--out", "run")
    bytes_of_weights = sum(v.nbytes for v in weights_of("run").values())
    assert Path("run/last.pt").stat().st_size > 2 * bytes_of_weights  # weights, and SGD's momentum
    fit("--out", "run")
    kept = sum(path.stat().st_size for path in Path("run").iterdir())
    assert bytes_of_weights < kept < 1.1 * bytes_of_weights
    assert len(torch.load("run/last.pt", weights_only=True)["facts"]["history"]) == 2


def test_a_run_does_not_go_on_with_another_teacher_than_it_was_begun_with(few_phantoms):
    fit("--out", "teacher")
    fit("--teacher", "teacher", "--out", "student", role="student")
    for file in Path("teacher").iterdir():
        file.unlink()
    fit("--out", "teacher", "--seed", "1")
    with pytest.raises(data.UserError, match="begun with other teachers"):
        fit("--teacher", "teacher", "--out", "student", role="student")


def test_a_run_does_not_go_on_from_other_first_weights_than_it_was_begun_with(few_phantoms):
    flags = ("--weights", "first/best.pt", "--finetune", "head", "--out", "second")
    fit("--out", "first")
    fit(*flags)
    for file in Path("first").iterdir():
        file.unlink()
    fit("--out", "first", "--seed", "1")
    with pytest.raises(data.UserError, match="second was begun with other first_weights"):
        fit(*flags)


def test_best_is_never_of_an_epoch_that_a_resumed_run_has_yet_to_repeat(few_phantoms, monkeypatch):
    def stopped(args, row):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "describe_epoch", stopped)  # after the first epoch, the best so far, unsaved
    with pytest.raises(KeyboardInterrupt):
        fit("--out", "run")
    assert {path.name for path in Path("run").iterdir()} == {"history.csv"}


def test_changed_flags_against_an_existing_run_are_named(few_phantoms):
    fit("--out", "run")
    with pytest.raises(data.UserError, match=r"--lr 0.01 \(now 0.02\)"):
        fit("--out", "run", "--lr", "0.02")


# ---- teachers


def taught(args, images, seed=0):
    """What the teachers of a run say, by image, as the batches of its first epoch bring it."""
    teachers, _ = train.load_teachers(args, images, CPU)
    rows = torch.arange(len(images.train.labels))
    batches = paired(images.train.images, rows if not images.multilabel else images.train.labels, teachers,
                     T=args.T, augment=args.augment, seed=seed)  # fmt: skip
    said = torch.empty(len(rows), len(images.classes))
    for _, y, answers in batches:
        said[y] = answers
    return said


def test_six_temperatures_ask_the_teacher_once(few_phantoms, monkeypatch):
    fit("--out", "teacher", *SHUFFLENET)
    asked = []
    real = train.forward
    monkeypatch.setattr(train, "forward", lambda model, x: (asked.append(model.training), real(model, x))[1])
    for T in ("1", "10", "20", "30", "40", "50"):
        fit("--teacher", "teacher", "--T", T, "--epochs", "1", role="student")
    assert sum(not training for training in asked) == 1  # all 24 images in one batch


def test_the_teachers_table_holds_what_the_teacher_says_of_each_image_at_its_own_size(few_phantoms):
    fit("--out", "teacher", "--size", "48", *SHUFFLENET)
    args = fit("--teacher", "teacher", role="student")
    images = data.load("phantoms", 32)
    model, _ = models.load_checkpoint("teacher")
    large = data.load("phantoms", 48).train
    assert large.ids == images.train.ids
    with torch.no_grad():
        at_once = model(data.prepare(large.images, CPU))
    assert torch.allclose(taught(args, images), at_once, atol=1e-5)


def test_under_augmentation_the_teacher_is_asked_about_the_very_view_the_student_sees(few_phantoms):
    fit("--out", "teacher", *SHUFFLENET)
    args = train.get_args(["--role", "student", "--teacher", "teacher", "--augment", *SMALL])
    images = data.load("phantoms", 32)
    teachers, _ = train.load_teachers(args, images, CPU)
    model, _ = models.load_checkpoint("teacher")
    for x, y, said in paired(images.train.images, torch.arange(24), teachers, augment=True):
        with torch.no_grad():
            assert torch.allclose(said, model(x), atol=1e-6)
            assert not torch.allclose(said, model(data.prepare(images.train.images[y], CPU)), atol=1e-6)


def test_a_student_learns_what_its_teacher_says_even_where_the_labels_say_otherwise(
    few_phantoms, last_is_best, monkeypatch
):
    """The check, end to end, that distillation happens: this teacher calls everything NORMAL."""
    monkeypatch.setattr(data, "PHANTOMS", {"train": (64, 11), "val": (16, 12), "test": (16, 13)})
    fit("--out", "teacher", "--epochs", "1")
    model, facts = models.load_checkpoint("teacher")
    with torch.no_grad():  # whatever it sees, it says NORMAL, and is sure of it
        model.classifier[1].weight.zero_()
        model.classifier[1].bias.copy_(torch.tensor([6.0, 0.0]))
    models.save_checkpoint("teacher/best.pt", model, **facts)
    fit("--teacher", "teacher", "--alpha", "1", "--out", "student", "--epochs", "3", role="student")
    student, _ = models.load_checkpoint("student")
    images = data.load("phantoms", 32).val.images
    assert train.predict(student, images, CPU).softmax(1)[:, 1].mean() < 0.3


def test_several_teachers_teach_their_mean(few_phantoms):
    fit("--out", "a", *SHUFFLENET)
    fit("--out", "b", *SHUFFLENET, "--seed", "1")
    args = fit("--teacher", "a", "b", "--T", "2", role="student")
    images = data.load("phantoms", 32)
    both, alone = taught(args, images), []
    for args.teacher in (["a"], ["b"]):
        alone.append((taught(args, images) / 2).softmax(1))
    assert not torch.allclose(*alone, atol=1e-4)
    assert torch.allclose((both / 2).softmax(1), (alone[0] + alone[1]) / 2, atol=1e-6)


def test_a_teacher_of_other_classes_or_the_student_itself_is_refused(few_phantoms, kermany, capsys):
    fit("--out", "teacher")
    with pytest.raises(data.UserError, match=r"teacher was trained on the classes \['NORMAL', 'PNEUMONIA'\]"):
        fit("--teacher", "teacher", "--data", str(kermany), "--classes", "3", "--recipe", "scratch",
            role="student")  # fmt: skip
    with pytest.raises(SystemExit):
        fit("--teacher", "teacher", "--out", "./teacher", role="student")
    assert "its own teacher" in capsys.readouterr().err


@pytest.mark.parametrize("flags, says", [
    (("--epochs", "6"), ", epoch 2 of 6"),
    (("--epochs", "2"), ""),
    (("--epochs", "6", "--stop-at", "0.01"), ", stopped at 0.01"),
])  # fmt: skip
def test_a_student_is_told_of_a_teacher_that_has_not_finished(few_phantoms, monkeypatch, capsys, flags, says):
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    with monkeypatch.context() as patch:
        dies_in_epoch(3, patch)
        try:
            fit("--out", "teacher", *flags)
        except KeyboardInterrupt:
            assert flags == ("--epochs", "6")
    capsys.readouterr()
    fit("--teacher", "teacher", "--epochs", "1", role="student")
    assert f"taught by teacher: squeezenet1_1{says}, best in epoch" in capsys.readouterr().out


# ---- whom a teacher has learned from


def hospital(root, train, test):
    """Images of patients, two a number: the public set's folders and names."""
    for part, numbers in (("train", train), ("test", test)):
        for i in numbers:
            image_file(root / part / f"NORMAL/IM-{i:04d}-0001.png", side=32)
            image_file(root / part / f"PNEUMONIA/person{i}_virus_1.png", side=32)
    return str(root)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A network trained on hospital A; its student, and a network that began with its weights, on hospital B."""
    root = tmp_path_factory.mktemp("family")
    (root / "moved").mkdir()
    small = [*SMALL, "--recipe", "scratch", "--epochs", "1", "--val-fraction", "0.25"]
    small += ["--cache", str(root / "cache")]
    a, b = hospital(root / "a", range(8), range(50, 52)), hospital(root / "b", range(10, 18), range(60, 62))
    fit("--data", a, "--out", f"{root}/of_a", small=small)
    fit("--data", b, "--out", f"{root}/taught", "--teacher", f"{root}/of_a", role="student", small=small)
    fit("--data", b, "--out", f"{root}/begun", "--weights", f"{root}/of_a", small=small)
    (root / "of_a").rename(root / "moved/x")
    a, b = (known(data.load(s, 32, val_fraction=0.25, cache=root / "cache").train) for s in (a, b))
    return types.SimpleNamespace(root=root, small=small, a=a, b=b)


def known(split):
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
def test_a_student_is_not_judged_by_patients_that_anything_behind_it_has_learned_from(family, tmp_path, way, part):
    root, others, share = family.root, range(20, 28), 0.75
    if part == "test":
        c = hospital(tmp_path / "c", others, range(8))
        judges = {*data.load(c, 32, ("test",)).test.groups}
    else:
        c = hospital(tmp_path / "c", [*range(8), *others], range(70, 72))
        judges = {*data.load(c, 32, ("val",), val_fraction=share).val.groups}
    assert judges & family.a and not judges & family.b
    if not (root / "clean").exists():
        d = hospital(root / "d", range(30, 38), range(80, 82))
        fit("--data", d, "--out", f"{root}/clean", small=family.small)
    flags = [f"{root}/{word}" if not word.startswith("-") else word for word in WAYS[way]]
    small = [*family.small, "--data", c, "--val-fraction", str(share)]
    if part == "validation" or "--weights" in flags:  # a network of hospital D teaches hospital C without objection
        fit("--teacher", f"{root}/clean", "--out", "allowed", role="student", small=small)
    who = re.escape(flags[-1])
    with pytest.raises(data.UserError, match=f"{who} has learned from .*, by whom it or its student is to be judged"):
        fit(*flags, "--out", "refused", role="student", small=small)


def test_a_run_remembers_all_patients_behind_it_and_no_others(family, tmp_path):
    e = hospital(tmp_path / "e", range(40, 48), range(90, 92))
    own = known(data.load(e, 32, val_fraction=0.25).train)
    for name, flags, role in (("by teacher", ("--teacher", f"{family.root}/taught"), "student"),
                              ("by weights", ("--weights", f"{family.root}/begun"), "baseline")):  # fmt: skip
        fit("--data", e, *flags, "--out", name, role=role, small=family.small)
        assert set(models.load_checkpoint(name)[1]["seen_groups"]) == own | family.a | family.b


def test_a_student_is_not_judged_by_images_of_its_teacher_whatever_patients_are_called_since(tmp_path, monkeypatch):
    a = hospital(tmp_path / "a", range(8), range(50, 52))
    small = [*SMALL, "--recipe", "scratch", "--epochs", "1", "--val-fraction", "0.25", "--data", a]
    fit("--out", "teacher", small=small)
    monkeypatch.setattr(data, "PATIENT", re.compile("other names"))
    with pytest.raises(data.UserError, match="teacher has learned from train/"):
        fit("--teacher", "teacher", "--out", "student", role="student", small=small)


# ---- a teacher that is replaced


def test_another_teacher_under_the_same_name_is_asked_anew(few_phantoms):
    fit("--out", "other", *SHUFFLENET, "--seed", "1")
    fit("--out", "teacher", *SHUFFLENET)
    first = fit("--teacher", "teacher", "--out", "first", role="student")
    images = data.load("phantoms", 32)
    before = taught(first, images)
    Path("teacher/best.pt").write_bytes(Path("other/best.pt").read_bytes())
    second = fit("--teacher", "teacher", "--out", "second", role="student")
    with torch.no_grad():
        said = models.load_checkpoint("other")[0](data.prepare(images.train.images, CPU))
    assert torch.allclose(taught(second, images), said, atol=1e-6) and not torch.allclose(before, said, atol=1e-4)
    assert len(list(Path("cache").glob("teacher-*.npy"))) == 2
    hashes = [models.load_checkpoint(out)[1]["teachers"] for out in ("first", "second")]
    assert hashes[0] != hashes[1] == [hashlib.sha256(Path("other/best.pt").read_bytes()).hexdigest()]


def test_a_teacher_that_is_replaced_while_it_is_read_is_known_by_the_bytes_that_were_loaded(
    few_phantoms, monkeypatch
):
    fit("--out", "other", *SHUFFLENET, "--seed", "1")
    fit("--out", "teacher", *SHUFFLENET)
    path, real = Path("teacher/best.pt"), torch.load
    content, weights = path.read_bytes(), weights_of("teacher")

    def replaced(*args, **kwargs):
        loaded = real(*args, **kwargs)
        path.write_bytes(Path("other/best.pt").read_bytes())
        return loaded

    monkeypatch.setattr(torch, "load", replaced)
    model, facts = models.load_checkpoint("teacher")
    assert path.read_bytes() != content  # the file is another one by now
    assert all(torch.equal(v, weights[name]) for name, v in model.state_dict().items())
    assert facts["sha256"] == hashlib.sha256(content).hexdigest()


# ---- freezing


@pytest.fixture
def pretrained(few_phantoms):
    fit(*SHUFFLENET, "--out", "pretrained")
    return (*SHUFFLENET, "--weights", "pretrained/best.pt")


@pytest.mark.parametrize("augment", [(), ("--augment",)])
def test_a_fixed_extractor_learns_its_head_and_moves_nothing_else(pretrained, augment):
    args = fit(*pretrained, "--finetune", "head", *augment)
    before, after = weights_of("pretrained"), weights_of(args.out)
    for name in before:  # BatchNorm's averages and counters included
        assert torch.equal(before[name], after[name]) == (not name.startswith("fc.")), name


def test_a_frozen_network_is_run_once_over_the_images_and_then_its_features_are_read(pretrained, monkeypatch):
    runs = []
    real = models.features
    monkeypatch.setattr(models, "features", lambda *a: (runs.append(1), real(*a))[1])
    fit(*pretrained, "--finetune", "head", "--epochs", "6")
    assert len(runs) == 2  # a table each for training and validation images
    fit(*pretrained, "--finetune", "head", "--epochs", "6", "--seed", "1")
    assert len(runs) == 2  # the second run reads the tables


def test_a_table_that_float16_cannot_hold_is_refused_and_not_kept(tmp_path):
    images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(data.UserError, match="not finite numbers in torch.float16"):
        huge = lambda x: torch.full((len(x), 3), 1e5)  # noqa: E731
        train.ask_once(huge, images, tmp_path / "features.npy", CPU, torch.float16)
    assert not os.listdir(tmp_path)


def test_document_as_way_starts_all_fully_connected_layers_anew(few_phantoms):
    torch.manual_seed(1)
    models.save_checkpoint("w.pt", models.build("alexnet", 2, 64))
    model = models.build("alexnet", 2, 64, "w.pt")
    old = {k: v.clone() for k, v in model.state_dict().items()}
    models.freeze(model, "fc")
    changed = {k.split(".")[0] for k, v in model.state_dict().items() if not torch.equal(v, old[k])}
    same = {k.split(".")[0] for k, v in model.state_dict().items() if torch.equal(v, old[k])}
    assert (changed, same) == ({"classifier"}, {"features"})


def test_training_on_features_is_training_on_images_with_the_rest_frozen(pretrained, last_is_best):
    by_table = fit(*pretrained, "--finetune", "head", "--out", "table")
    images = data.load("phantoms", 32)
    torch.manual_seed(0)
    model = models.build("shufflenet_v2_x0_5", 2, 32, "pretrained/best.pt")
    learner = models.freeze(model, "head")
    optimizer = torch.optim.SGD(learner.parameters(), 0.01, 0.9)
    for epoch in (1, 2):
        rows = torch.cat([y for _, y, _ in paired(labels=torch.arange(24),
                                                seed=train.seed_for(0, epoch, "order, augmentation"))])
        batches = [some(part, images.train.labels, x=images.train.images) for part in rows.split(8)]
        batches = [(models.features(model, learner, data.prepare(x, CPU)), y, None) for x, y, _ in batches]
        train.train_one_epoch(learner, batches, optimizer, clip=1.0)
    assert torch.allclose(weights_of(by_table.out)["fc.weight"], model.fc.weight, atol=1e-4)  # float16


# ---- the command line


def say(*argv):
    """Type it in a shell: (exit code, stdout, stderr)."""
    root = Path(train.__file__).parent
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(root / argv[0]), *argv[1:]], capture_output=True, text=True, env=env
    )
    return done.returncode, done.stdout, done.stderr


def refusal(argv, capsys):
    """The one line with which argparse ends, exit code 2; its usage stands above."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        train.get_args(argv)
    said = capsys.readouterr()
    *usage, line = said.err.splitlines()
    assert end.value.code == 2 and not said.out
    assert "error: " in line and not any("error" in other for other in usage)
    return line


WRONG_FLAGS = [
    (["--role", "pupil"], "argument --role: invalid choice: 'pupil'"),
    ([], "required: --role"),
    (["--role", "student", "--alpha", "1.5"], "argument --alpha: 1.5"),
    (["--role", "student", "--alpha", "nan"], "argument --alpha: nan"),
    (["--role", "student", "--alpha", "half"], "argument --alpha: invalid float value: 'half'"),
    (["--role", "student", "--T", "0"], "argument --T: 0"),
    (["--role", "student", "--T", "nan"], "argument --T: nan"),
    (["--role", "student", "--T", "inf"], "argument --T: inf"),
    (["--role", "teacher", "--batch-size", "1"], "argument --batch-size: 1"),
    (["--role", "teacher", "--epochs", "0"], "argument --epochs: 0"),
    (["--role", "teacher", "--epochs", "1.5"], "argument --epochs: invalid int value: '1.5'"),
    (["--role", "teacher", "--steps-per-epoch", "0"], "argument --steps-per-epoch: 0"),
    (["--role", "teacher", "--size", "0"], "argument --size: 0"),
    (["--role", "teacher", "--lr", "-1"], "argument --lr: -1"),
    (["--role", "teacher", "--clip", "-1"], "argument --clip: -1"),
    (["--role", "teacher", "--per-class", "1"], "argument --per-class: 1"),
    (["--role", "student", "--labels-per-class", "-1"], "argument --labels-per-class: -1"),
    (["--role", "teacher", "--wrong-labels", "2"], "argument --wrong-labels: 2"),
    (["--role", "teacher", "--val-fraction", "-0.1"], "argument --val-fraction: -0.1"),
    (["--role", "teacher", "--stop-at", "1.5"], "argument --stop-at: 1.5"),
    (["--role", "teacher", "--classes", "4"], "argument --classes: invalid choice: 4"),
    (["--role", "teacher", "--no-such-flag"], "unrecognized arguments: --no-such-flag"),
    (["--role", "teacher", "--epoch", "3"], "unrecognized arguments: --epoch 3"),
    (["--role", "teacher", "--arch", "alexnett"], "argument --arch: no network is called alexnett; near are alexnet"),
    (["--role", "teacher", "--device", "cuda"], "argument --device: "),
    (["--role", "student", "--teacher", "x/best.pt", "--out", "x"], "its own teacher"),
    (["--role", "student", "--teacher", "x", "--out", "./x"], "its own teacher"),
    (["--role", "student", "--teacher", "y", "x", "--out", "x"], "its own teacher"),
    (["--role", "teacher", "--teacher", "x"], "--teacher belongs to --role student"),
    (["--role", "baseline", "--teacher", "x"], "--teacher belongs to --role student"),
    (["--role", "baseline", "--alpha", "0.5"], "--alpha belongs to --role student; a baseline learns from labels alone"),
    (["--role", "baseline", "--T", "4"], "--T belongs to --role student; a baseline learns from labels alone"),
    (["--role", "teacher", "--T", "4"], "--T belongs to --role student; a teacher learns from labels alone"),
    (["--role", "baseline", "--recipe", "mura", "--T", "1"], "--T belongs to --role student"),  # its own T is 4
    (["--role", "baseline", "--stop-at", "0.9"], "--stop-at makes a defective teacher"),
    (["--role", "student", "--stop-at", "0.9"], "--stop-at makes a defective teacher"),
    (["--role", "student", "--label-smoothing", "0.1"], "--label-smoothing is for a baseline or a teacher"),
    (["--role", "baseline", "--labels-per-class", "0"], "--labels-per-class 0 leaves nothing to learn from"),
    (["--role", "teacher", "--labels-per-class", "0"], "--labels-per-class 0 leaves nothing to learn from"),
    (["--role", "student", "--labels-per-class", "0", "--alpha", "0"], "--labels-per-class 0 leaves nothing"),
    (["--role", "teacher", "--finetune", "head"], "would freeze random weights"),
    (["--role", "teacher", "--finetune", "fc", "--arch", "seresnet50", "--weights", "imagenet"], "would freeze random"),
]  # fmt: skip


@pytest.mark.parametrize("flags, says", WRONG_FLAGS, ids=[" ".join(flags) for flags, _ in WRONG_FLAGS])
def test_a_wrong_command_line_is_explained_in_one_line_with_exit_code_2(flags, says, capsys):
    assert says in refusal(flags, capsys)


def test_flags_that_only_look_wrong_are_taken():
    args = train.get_args(["--role", "student", "--labels-per-class", "0"])
    assert args.labels_per_class == 0 and args.alpha > 0
    for role in ("baseline", "teacher"):  # what a recipe says of students alone does not stop the others
        train.get_args(["--role", role, "--recipe", "mura", "--data", "x"])
    assert train.get_args(["--role", "baseline", "--labels-per-class", "1"]).labels_per_class == 1


def test_a_users_mistake_is_one_line_without_a_traceback_and_exit_code_1(kermany):
    code, _, err = say("train.py", "--role", "student", "--data", str(kermany), "--recipe", "scratch",
                       "--arch", "squeezenet1_1", "--size", "32")  # fmt: skip
    assert code == 1 and err.count("\n") == 1 and err.startswith("error: ") and "runs/scratch/teacher" in err
    student = ["--role", "student", *SMALL, "--recipe", "scratch", "--data", str(kermany)]
    for script, argv in (
        (train, ["--role", "teacher", "--recipe", "scratch", "--data", "nowhere"]),
        (train, [*student, "--teacher", "nowhere"]),
        (train, [*student, "--weights", "nowhere"]),
        (evaluate, ["nowhere"]),
        (data, ["nowhere"]),
    ):
        with pytest.raises(SystemExit, match="^error: [^\n]*nowhere[^\n]*$"):  # printed, with exit code 1
            data.run(lambda script=script, argv=argv: script.main(argv))


def fails(*_, **__):
    raise AssertionError("this must not be reached")


@pytest.mark.parametrize("role, flags, says", [
    ("teacher", ["--weights", "imagenet"], "squeezenet1_1-b8a52dc0.pth could not be fetched"),
    ("teacher", ["--weights", "nothing.pt"], "No such file: nothing.pt"),
    ("student", ["--teacher", "nobody"], "No such file: nobody"),
])  # fmt: skip
def test_weights_and_teachers_that_are_not_there_are_told_before_an_image_is_decoded(
    tmp_path, monkeypatch, role, flags, says
):
    def no_network(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setattr(data, "draw_blocks", fails)
    monkeypatch.setattr(data, "decode_blocks", fails)
    with pytest.raises(SystemExit, match=f"^error: [^\n]*{re.escape(says)}[^\n]*$"):
        data.run(lambda: train.main(["--role", role, *SMALL, *flags]))
    assert not Path("cache").exists()


@pytest.mark.parametrize("out", ["taken", "taken/run"])
def test_an_out_that_cannot_be_created_is_one_line_before_the_first_epoch(few_phantoms, monkeypatch, out):
    Path("taken").write_text("a file")
    monkeypatch.setattr(train, "train_one_epoch", fails)
    with pytest.raises(SystemExit, match=f"^error: [^\n]*'{out}'$"):
        data.run(lambda: train.main(["--role", "teacher", *SMALL, "--out", out]))


def test_a_loss_that_is_not_finite_ends_the_run_with_the_numbers(few_phantoms, monkeypatch):
    row = {"loss": math.nan, "hard": 1.0, "soft": 0.0, "train_accuracy": 0.5}
    monkeypatch.setattr(train, "train_one_epoch", lambda *a, **k: row)
    with pytest.raises(data.UserError, match="the loss is nan in epoch 1 at learning rate 0.01.*--lr"):
        fit("--out", "run")
    assert not Path("run/best.pt").exists()


def test_help_shows_the_defaults_of_the_recipe_and_role_it_is_asked_for(capsys):
    for argv, wanted in (
        (["--help"], "inception_v3"),
        (["--role", "student", "--data", "x", "--help"], "(default: 128)"),
    ):
        with pytest.raises(SystemExit) as end:
            train.get_args(argv)
        assert end.value.code == 0 and wanted in capsys.readouterr().out


SCRIPTS = [data, evaluate, train, profile_gpu]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_help_begins_with_an_example_asks_questions_and_shows_every_default(script, capsys):
    with pytest.raises(SystemExit):
        script.get_args(["--help"])
    page = capsys.readouterr().out
    assert page.index(f"python {script.__name__}.py ", page.index("\n\n")) < page.index("options:")
    headings = re.findall(r"^(\w.*):$", page, re.MULTILINE)
    assert (len(headings) >= 3 or script is profile_gpu) and {h.split()[0].strip(",") for h in headings} <= {"options", "positional", *QUESTIONS}
    assert max(map(len, page.splitlines())) <= 110
    if script is train:
        for default in ("inception_v3)", "0.02)", "0.9)", "0)", "cache)"):
            assert f"(default: {default}" in " ".join(page.split())


QUESTIONS = ("what", "which", "who", "how", "where", "on")


def test_a_log_file_gets_one_line_an_epoch_and_no_progress_bar(few_phantoms, capsys):
    fit("--per-class", "8")
    out = capsys.readouterr().out
    assert out.count("epoch ") == 2 and "\r" not in out and "\033" not in out


def test_a_terminal_gets_a_bar_that_wipes_itself(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert list(data.progress([1, 2, 3], "epoch 1")) == [1, 2, 3]
    out = capsys.readouterr().out
    assert "epoch 1  0/3" in out and "epoch 1  2/3" in out and out.endswith("\r\033[K")
