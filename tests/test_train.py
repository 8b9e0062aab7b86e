"""What training must do, and what must never be true of it: the loop, distillation, freezing, resuming."""

import csv
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SMALL, fit

import data
import evaluate
import models
import profile_gpu
import train

CPU = torch.device("cpu")


def tiny(classes=2):
    """A network with BatchNorm and dropout, small enough for a test."""
    first = torch.nn.Linear(16, 8, bias=False)  # in front of BatchNorm a bias has no gradient
    layers = [torch.nn.Flatten(), first, torch.nn.BatchNorm1d(8), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, torch.nn.Dropout(0.1), torch.nn.Linear(8, classes))


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr)


X, Y = torch.randn(32, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 2
TABLE = torch.randn(32, 2, generator=torch.Generator().manual_seed(1))


def view(index):
    return X[index]


def weights_after(model=None, teacher=None, seed=0, labels=Y, **options):
    """Train a tiny network for one epoch; returns its weights as one vector."""
    torch.manual_seed(seed)
    model = model or tiny()
    parts = train.batches(32, 8, torch.Generator().manual_seed(seed))
    train.train_one_epoch(model, view, labels, parts, sgd(model), teacher, **options)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# ---- the loop


def test_every_film_is_seen_once_an_epoch_in_another_order_each_epoch():
    g = torch.Generator().manual_seed(0)
    first, second = (torch.cat(train.batches(50, 8, g)) for _ in range(2))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(50))
    assert not torch.equal(first, second)


def test_a_last_batch_of_one_joins_the_one_before_it():
    assert [len(b) for b in train.batches(9, 4, torch.Generator())] == [4, 5]
    assert [len(b) for b in train.batches(10, 4, torch.Generator())] == [4, 4, 2]


def test_one_step_of_the_loop_is_the_update_written_out_by_hand():
    torch.manual_seed(0)
    w = torch.nn.Linear(16, 2, bias=False)
    start, x = w.weight.detach().clone(), X[:8].flatten(1)
    T, alpha, lr = 3.0, 0.7, 0.1
    train.train_one_epoch(
        w, lambda i: x[i], Y[:8], [torch.arange(8)], sgd(w, lr), lambda i: TABLE[i], T=T, alpha=alpha
    )
    z = x @ start.T
    hard = z.softmax(1) - torch.nn.functional.one_hot(Y[:8], 2)
    soft = T * ((z / T).softmax(1) - (TABLE[:8] / T).softmax(1))
    gradient = ((1 - alpha) * hard + alpha * soft).T @ x / 8
    assert torch.allclose(w.weight, start - lr * gradient, atol=1e-6)


def test_training_moves_the_student_and_leaves_the_teacher_alone():
    student, teacher = tiny(), tiny().eval()
    frozen = {k: v.clone() for k, v in teacher.state_dict().items()}  # BatchNorm's averages too
    before = [p.detach().clone() for p in student.parameters()]
    train.train_one_epoch(student, view, Y, [torch.arange(32)] * 3, sgd(student), lambda i: teacher(X[i]))
    assert not any(torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))
    assert all(p.grad is None for p in teacher.parameters()) and not teacher.training
    assert all(torch.equal(v, frozen[k]) for k, v in teacher.state_dict().items())


def test_the_model_trains_in_training_mode_also_after_it_was_evaluated():
    model = tiny().eval()
    average = model[2].running_mean.clone()
    train.train_one_epoch(model, view, Y, [torch.arange(32)], sgd(model))
    assert model.training and not torch.equal(average, model[2].running_mean)


def test_without_a_teacher_or_with_alpha_zero_the_weights_are_those_of_the_baseline_to_the_bit():
    alone = weights_after()
    assert torch.equal(alone, weights_after(teacher=lambda i: TABLE[i], alpha=0.0))
    assert not torch.equal(alone, weights_after(teacher=lambda i: TABLE[i], alpha=0.5))


def test_alpha_one_heeds_no_label_not_even_through_an_auxiliary_head():
    class WithAux(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.aux = torch.nn.Linear(16, 2), torch.nn.Linear(16, 2)

        def forward(self, x):
            return self.main(x.flatten(1)), self.aux(x.flatten(1))

    def trained(labels, alpha):
        torch.manual_seed(0)
        return weights_after(WithAux(), lambda i: TABLE[i], labels=labels, alpha=alpha, aux_weight=0.4)

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
        train.train_one_epoch(model, view, Y, [torch.arange(32)], sgd(model), aux_weight=weight)
        moved.append(model.weight.detach() - before)
    assert not moved[0].any() and torch.allclose(2 * moved[1], moved[2], atol=1e-6)


def test_permuting_the_rows_of_the_teachers_table_changes_what_is_learned():
    shuffled = TABLE[torch.randperm(32)]
    assert not torch.equal(
        weights_after(teacher=lambda i: TABLE[i]), weights_after(teacher=lambda i: shuffled[i])
    )


def test_reported_losses_are_means_over_films_also_with_a_short_last_batch():
    model = torch.nn.Linear(16, 2)
    parts = [torch.arange(0, 24), torch.arange(24, 32)]
    row = train.train_one_epoch(
        model, lambda i: X[i].flatten(1), Y, parts, sgd(model, 0.0), lambda i: TABLE[i], 2.0, 0.3
    )
    total, hard, soft = train.distillation_loss(model(X.flatten(1)), TABLE, Y, 2.0, 0.3)
    for name, value in (("loss", total), ("hard", hard), ("soft", soft)):
        assert row[name] == pytest.approx(value.item(), rel=1e-5)
    right = (model(X.flatten(1)).argmax(1) == Y).float().mean().item()
    assert row["train_accuracy"] == pytest.approx(right)


def test_the_gradient_is_clipped_to_its_norm():
    model = torch.nn.Linear(16, 2, bias=False)
    before = model.weight.detach().clone()
    train.train_one_epoch(
        model, lambda i: 100 * X[i].flatten(1), Y, [torch.arange(32)], sgd(model, 1.0), clip=0.5
    )
    assert (model.weight - before).norm().item() == pytest.approx(0.5, rel=1e-3)


# ---- runs


def history(out):
    return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(open(f"{out}/history.csv"))]


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
    logits = train.predict(model, train.view_of(val.images, CPU), 12)
    assert train.label_loss(logits, val.labels).item() == pytest.approx(best["val_loss"], rel=1e-4)


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(few_phantoms):
    def weights(*flags):
        args = fit("--epochs", "1", *flags)
        return torch.cat(
            [v.flatten().double() for v in models.load_checkpoint(args.out)[0].state_dict().values()]
        )

    a, b, c = weights("--out", "a"), weights("--out", "b"), weights("--seed", "1")
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("save_seconds", [0, 1e9])
@pytest.mark.parametrize("flags", [(), ("--augment",)])
def test_a_run_that_was_cut_short_ends_with_the_bits_of_one_that_was_not(
    few_phantoms, flags, save_seconds, monkeypatch
):
    monkeypatch.setattr(train, "SAVE_SECONDS", save_seconds)
    fit("--out", "teacher")
    flags = ("--epochs", "3", "--teacher", "teacher", *flags)
    fit("--out", "whole", *flags, role="student")
    real, calls = train.train_one_epoch, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(train, "train_one_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit("--out", "cut", *flags, role="student")
    assert len(history("cut")) == 2 and Path("cut/last.pt").exists() == (save_seconds == 0)
    monkeypatch.setattr(train, "train_one_epoch", real)
    fit("--out", "cut", *flags, role="student")
    for file in ("best.pt", "last.pt"):
        a, b = (torch.load(f"{out}/{file}", weights_only=True)["model"] for out in ("whole", "cut"))
        assert all(torch.equal(a[k], b[k]) for k in a), file
    assert [{**row, "seconds": 0} for row in history("whole")] == [
        {**row, "seconds": 0} for row in history("cut")
    ]


def test_a_finished_run_started_again_says_so_and_touches_nothing(few_phantoms, capsys):
    args = fit()
    before = {p.name: p.stat().st_mtime_ns for p in Path(args.out).iterdir()}
    capsys.readouterr()
    fit()
    assert "is finished, 2 epochs" in capsys.readouterr().out
    assert before == {p.name: p.stat().st_mtime_ns for p in Path(args.out).iterdir()}


def test_a_run_does_not_go_on_with_another_teacher_than_it_was_begun_with(few_phantoms):
    fit("--out", "teacher")
    fit("--teacher", "teacher", "--out", "student", role="student")
    for file in Path("teacher").iterdir():
        file.unlink()
    fit("--out", "teacher", "--seed", "1")
    with pytest.raises(data.UserError, match="begun with other teachers"):
        fit("--teacher", "teacher", "--out", "student", role="student")


def test_best_is_never_of_an_epoch_that_a_resumed_run_has_yet_to_repeat(few_phantoms, monkeypatch):
    def stopped(args, row):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "describe", stopped)  # after the first epoch, the best so far, unsaved
    with pytest.raises(KeyboardInterrupt):
        fit("--out", "run")
    assert {path.name for path in Path("run").iterdir()} == {"history.csv"}


def test_changed_flags_against_an_existing_run_are_named(few_phantoms):
    fit("--out", "run")
    with pytest.raises(data.UserError, match=r"--lr 0.01 \(now 0.02\)"):
        fit("--out", "run", "--lr", "0.02")


# ---- teachers


def teacher_of(args, films):
    teachers = [train.load_teacher(path, args, films, CPU) for path in args.teacher]
    return lambda theta: train.make_teacher(teachers, args.T, False, theta)


def test_six_temperatures_ask_the_teacher_once(few_phantoms, monkeypatch):
    fit("--out", "teacher")
    asked = []
    real = train.forward
    monkeypatch.setattr(train, "forward", lambda model, x: (asked.append(model.training), real(model, x))[1])
    for T in ("1", "10", "20", "30", "40", "50"):
        fit("--teacher", "teacher", "--T", T, "--epochs", "1", role="student")
    shape_and_table = 2  # one film to learn the table's shape, then all 24 in one batch
    assert sum(not training for training in asked) == 5 * 1 + shape_and_table


def test_the_teachers_table_holds_what_the_teacher_says_of_each_film_at_its_own_size(few_phantoms):
    fit("--out", "teacher", "--size", "48", "--arch", "shufflenet_v2_x0_5")
    args = fit("--teacher", "teacher", role="student")
    films = data.load("phantoms", 32)
    teacher = teacher_of(args, films)(None)
    model, _ = models.load_checkpoint("teacher")
    large = data.load("phantoms", 48).train
    assert large.ids == films.train.ids
    index = torch.tensor([5, 0, 17])
    with torch.no_grad():
        live = model(data.prepare(large.images[index], CPU))
    assert torch.allclose(teacher(index), live, atol=1e-5)


def test_under_augmentation_the_teacher_is_asked_about_the_very_view_the_student_sees(
    few_phantoms, monkeypatch
):
    fit("--out", "teacher")
    args = train.get_args(["--role", "student", "--teacher", "teacher", "--augment", *SMALL])
    films = data.load("phantoms", 32)
    theta = data.poses(24, torch.Generator().manual_seed(3))
    index = torch.tensor([3, 11])
    seen = []
    real = train.forward
    monkeypatch.setattr(train, "forward", lambda model, x: (seen.append(x), real(model, x))[1])
    teacher_of(args, films)(theta)(index)
    assert torch.equal(seen[0], train.view_of(films.train.images, CPU)(index, theta))
    assert not torch.equal(seen[0], train.view_of(films.train.images, CPU)(index))


def test_a_student_learns_what_its_teacher_says_even_where_the_labels_say_otherwise(
    few_phantoms, monkeypatch
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
    student, _ = models.load_checkpoint("student/last.pt")
    films = data.load("phantoms", 32).val
    says = train.predict(student, train.view_of(films.images, CPU), 16).softmax(1)[:, 1]
    assert says.mean() < 0.3


def test_several_teachers_teach_their_mean(few_phantoms):
    fit("--out", "a")
    fit("--out", "b", "--seed", "1")
    args = fit("--teacher", "a", "b", "--T", "2", role="student")
    films = data.load("phantoms", 32)
    both = teacher_of(args, films)(None)(torch.arange(24))
    alone = []
    for name in ("a", "b"):
        args.teacher = [name]
        alone.append((teacher_of(args, films)(None)(torch.arange(24)) / 2).softmax(1))
    assert torch.allclose((both / 2).softmax(1), (alone[0] + alone[1]) / 2, atol=1e-6)


def test_a_teacher_trained_on_the_students_validation_patients_is_refused(few_phantoms):
    fit("--out", "teacher")
    _, facts = models.load_checkpoint("teacher")
    model, _ = models.load_checkpoint("teacher")
    models.save_checkpoint("teacher/best.pt", model, **{**facts, "train_groups": ["phantom-val-3"]})
    with pytest.raises(data.UserError, match="trained on 1 of the patients that it or its student"):
        fit("--teacher", "teacher", role="student")


def test_a_teacher_of_other_classes_or_the_student_itself_is_refused(few_phantoms, kermany, capsys):
    fit("--out", "teacher")
    with pytest.raises(data.UserError, match="same classes"):
        fit(
            "--teacher",
            "teacher",
            "--data",
            str(kermany),
            "--classes",
            "3",
            "--recipe",
            "scratch",
            role="student",
        )
    with pytest.raises(SystemExit):
        fit("--teacher", "teacher", "--out", "./teacher", role="student")
    assert "its own teacher" in capsys.readouterr().err


# ---- freezing


@pytest.fixture
def pretrained(few_phantoms):
    fit("--arch", "shufflenet_v2_x0_5", "--out", "pretrained")
    return ("--arch", "shufflenet_v2_x0_5", "--weights", "pretrained/best.pt")


@pytest.mark.parametrize("augment", [(), ("--augment",)])
def test_a_fixed_extractor_learns_its_head_and_moves_nothing_else(pretrained, augment):
    args = fit(*pretrained, "--finetune", "head", *augment)
    before, after = (models.load_checkpoint(p)[0].state_dict() for p in ("pretrained", args.out))
    for name in before:  # BatchNorm's averages and counters included
        assert torch.equal(before[name], after[name]) == (not name.startswith("fc.")), name


def test_a_frozen_network_is_run_once_over_the_films_and_then_its_features_are_read(pretrained, monkeypatch):
    runs = []
    real = models.features
    monkeypatch.setattr(models, "features", lambda *a: (runs.append(1), real(*a))[1])
    fit(*pretrained, "--finetune", "head", "--epochs", "6")
    assert len(runs) == 4  # a shape and a table each for training and validation films
    fit(*pretrained, "--finetune", "head", "--epochs", "6", "--seed", "1")
    assert len(runs) == 6  # the second run reads the tables, but for their shapes


def test_a_table_that_float16_cannot_hold_is_refused(tmp_path):
    films = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(data.UserError, match="finite features needed.*float16"):
        huge = lambda x: torch.full((len(x), 3), 1e5)  # noqa: E731
        train.view_through(huge, films, CPU, False, tmp_path, "features", [], "float16")


def test_document_as_way_starts_all_fully_connected_layers_anew(few_phantoms):
    torch.manual_seed(1)
    models.save_checkpoint("w.pt", models.build("alexnet", 2, 64))
    model = models.build("alexnet", 2, 64, "w.pt")
    old = {k: v.clone() for k, v in model.state_dict().items()}
    models.split(model, "fc")
    changed = {k.split(".")[0] for k, v in model.state_dict().items() if not torch.equal(v, old[k])}
    same = {k.split(".")[0] for k, v in model.state_dict().items() if torch.equal(v, old[k])}
    assert (changed, same) == ({"classifier"}, {"features"})


def test_training_on_features_is_training_on_films_with_the_rest_frozen(pretrained):
    by_table = fit(*pretrained, "--finetune", "head", "--out", "table")
    films = data.load("phantoms", 32)
    torch.manual_seed(0)
    model = models.build("shufflenet_v2_x0_5", 2, 32, "pretrained/best.pt")
    tail = models.split(model, "head")
    optimizer = torch.optim.SGD(tail.parameters(), 0.01, 0.9)
    for epoch in (1, 2):
        g = torch.Generator().manual_seed(epoch)
        parts = train.batches(24, 8, g)
        reached = models.features(model, tail, data.prepare(films.train.images, CPU)).detach()
        train.train_one_epoch(tail, reached.__getitem__, films.train.labels, parts, optimizer, clip=1.0)
    saved = torch.load(f"{by_table.out}/last.pt", weights_only=True)["model"]
    assert torch.allclose(saved["fc.weight"], model.fc.weight, atol=1e-4)  # the table is float16


# ---- the command line


def say(*argv):
    """Type it in a shell: (exit code, stdout, stderr)."""
    root = Path(train.__file__).parent
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(root / argv[0]), *argv[1:]], capture_output=True, text=True, env=env
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("flags, says", [
    (["--role", "pupil"], "invalid choice"),
    (["--role", "student", "--alpha", "1.5"], "--alpha mixes labels (0) and teacher (1)"),
    (["--role", "student", "--T", "0"], "--T must be a number above 0"),
    (["--role", "student", "--T", "nan"], "--T must be a number above 0"),
    (["--role", "teacher", "--batch-size", "1"], "--batch-size must be a number above 1"),
    (["--role", "teacher", "--stop-at", "0"], "a share between 0 and 1"),
    (["--role", "student", "--teacher", "x/best.pt", "--out", "x"], "its own teacher"),
    (["--role", "student", "--teacher", "y", "x", "--out", "x"], "its own teacher"),
    (["--role", "teacher", "--teacher", "x"], "--teacher belongs to --role student"),
    (["--role", "teacher", "--finetune", "head"], "would freeze random ones"),
    (["--role", "student", "--label-smoothing", "0.1"], "--role baseline"),
    (["--role", "teacher", "--epochs", "0"], "--epochs must be a number above 0"),
    (["--role", "teacher", "--no-such-flag"], "unrecognized"),
    (["--role", "teacher", "--arch", "alexnett"], "seresnet50"),
    (["--role", "teacher", "--device", "cuda"], "cuda cannot be used here"),
    (["--role", "teacher", "--per-class", "1"], "--per-class must be a number above 1"),
    (["--role", "teacher", "--clip", "-1"], "--clip must be"),
    (["--role", "student", "--T", "inf"], "--T must be"),
])  # fmt: skip
def test_a_wrong_command_line_is_explained_with_exit_code_2(flags, says, capsys):
    with pytest.raises(SystemExit) as end:
        train.get_args(flags)
    assert end.value.code == 2 and says in capsys.readouterr().err


def test_a_users_mistake_is_one_line_without_a_traceback_and_exit_code_1():
    code, _, err = say("train.py", "--role", "student")
    assert code == 1 and err.count("\n") == 1 and "runs/demo/teacher" in err and "Traceback" not in err
    for script, argv, says in (
        (train, ["--role", "teacher", "--data", "nowhere"], "no such folder"),
        (evaluate, ["nowhere"], "no such file"),
        (data, ["nowhere"], "no such folder"),
    ):
        with pytest.raises(SystemExit, match=f"^error: .*{says}[^\n]*$"):  # printed, with exit code 1
            data.run(lambda script=script, argv=argv: script.main(argv))
    assert not os.listdir()


def test_a_loss_that_is_not_finite_ends_the_run_with_the_numbers(few_phantoms, monkeypatch):
    row = {"loss": math.nan, "hard": 1.0, "soft": 0.0, "train_accuracy": 0.5}
    monkeypatch.setattr(train, "train_one_epoch", lambda *a, **k: row)
    with pytest.raises(data.UserError, match="the loss is nan in epoch 1 at learning rate 0.01.*--lr"):
        fit("--out", "run")
    assert not Path("run/best.pt").exists()


def test_help_shows_the_defaults_of_the_recipe_and_role_it_is_asked_for(capsys):
    for argv, wanted in (
        (["--help"], "inception_v3"),
        (["--role", "student", "--data", "x", "--help"], "0.0002"),
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
    assert len(headings) >= 3 and {h.split()[0].strip(",") for h in headings} <= {"options", *QUESTIONS}
    assert "None" not in page and max(map(len, page.splitlines())) <= 110
    if script is train:
        for default in ("inception_v3)", "0.02)", "0.9)", "0)", "cache)"):
            assert f"(default: {default}" in page


QUESTIONS = ("what", "which", "who", "how", "where", "on")


def test_a_log_file_gets_one_line_an_epoch_and_no_progress_bar(few_phantoms, capsys):
    fit("--per-class", "8")
    out = capsys.readouterr().out
    assert out.count("epoch ") == 2 and "\r" not in out and "\033" not in out


def test_a_terminal_gets_a_bar_that_wipes_itself(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert list(data.progress([1, 2, 3], "epoch 1")) == [1, 2, 3]
    out = capsys.readouterr().out
    assert "epoch 1  [" in out and "2/3" in out and out.endswith("\r\033[K")
