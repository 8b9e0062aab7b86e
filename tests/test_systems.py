"""The other systems to reproduce, each only a recipe, a network and a checkpoint for the same loop:
fine-tuning or fixed features, normal, reversed and defective teachers, several teachers."""

import csv
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import fit

import data
import evaluate
import models
import train


def states(*folders):
    return [models.load_checkpoint(folder)[0].state_dict() for folder in folders]


# ---- SE-ResNets


def test_se_resnets_have_the_published_number_of_parameters():
    for arch, published in (("seresnet50", 28_088_024), ("seresnet101", 49_326_872)):
        model = models.bare_network(arch, aux=False)
        assert sum(p.numel() for p in model.parameters()) == published


def test_a_resnets_weights_load_into_an_se_resnet_and_only_its_new_parts_are_missing(tmp_path):
    resnet = models.bare_network("resnet50", aux=False).state_dict()
    torch.save(resnet, tmp_path / "resnet50.pth")
    model = models.build("seresnet50", 2, 32, str(tmp_path / "resnet50.pth")).state_dict()
    assert {name for name in model if name not in resnet} == {name for name in model if ".se." in name}
    assert all(torch.equal(model[name], value) for name, value in resnet.items() if "fc." not in name)


def test_squeeze_and_excitation_weighs_channels_by_a_number_between_0_and_1_made_from_their_means():
    block = models.SEBottleneck(16, 4).eval()
    x = torch.randn(2, 16, 5, 5)
    y = block.bn3(block.conv3(block.relu(block.bn2(block.conv2(block.relu(block.bn1(block.conv1(x))))))))
    s = torch.relu(y.mean((2, 3)) @ block.se.fc1.weight[:, :, 0, 0].T + block.se.fc1.bias)
    s = torch.sigmoid(s @ block.se.fc2.weight[:, :, 0, 0].T + block.se.fc2.bias)
    assert torch.allclose(block(x), torch.relu(y * s[:, :, None, None] + x), atol=1e-6)


# ---- MURA


def test_muras_body_parts_are_classes_and_its_patients_stay_whole(mura):
    loaded = data.load(mura, 16, ("train", "val", "test"), val_fraction=0.25)
    assert loaded.classes == ["ELBOW", "FINGER", "FOREARM", "HAND", "HUMERUS", "SHOULDER", "WRIST"]
    assert len(loaded.train.labels) + len(loaded.val.labels) == 56 and len(loaded.test.labels) == 7
    assert set(loaded.test.groups) == {"patient11185"}
    assert set(loaded.train.groups) | set(loaded.val.groups) == {f"patient0000{i}" for i in range(1, 5)}
    assert not set(loaded.train.groups) & set(loaded.val.groups)
    for id, label in zip(loaded.train.ids, loaded.train.labels, strict=True):
        assert f"XR_{loaded.classes[label]}/" in id


D = ["--recipe", "mura", "--weights", "none", "--size", "32", "--epochs", "1", "--val-fraction", "0.25",
     "--batch-size", "8", "--steps-per-epoch", "1"]  # fmt: skip


def test_every_network_of_the_dissertation_takes_a_step_in_every_role_and_in_both_directions(
    mura, monkeypatch, capsys
):
    real, trained = models.save_checkpoint, []

    def save(path, model, **facts):  # the teachers alone, and not to go on from: gigabytes otherwise
        trained.append((path.parent.name, path.name, facts["args"]["role"]))
        if trained[-1][1:] == ("best.pt", "teacher"):
            real(path, model, **facts)

    monkeypatch.setattr(models, "save_checkpoint", save)
    flags = [*D, "--data", str(mura), "--per-class", "4"]
    small, large = ("vgg11", "resnet18", "resnet34", "resnet50"), ("seresnet50", "seresnet101")
    for arch in ("resnet18", "seresnet50"):
        fit("--arch", arch, "--out", f"teacher-{arch}", small=flags)
    for arch in small:
        fit("--arch", arch, "--teacher", "teacher-seresnet50", "--out", arch, role="student", small=flags)
    for arch in large:  # reversed
        fit("--arch", arch, "--teacher", "teacher-resnet18", "--out", arch, role="student", small=flags)
    assert "taught by teacher-resnet18: resnet18, best in epoch 1, 32 px, validation" in capsys.readouterr().out
    assert {name for name, file, role in trained if role == "student"} == {*small, *large}


# ---- teachers that were stopped


def fit_stopped(monkeypatch):
    """Validation says .5 after the first epoch and .02 more after every other."""
    real, said = train.metrics, []

    def judged(*args):
        said.append(0.5 + 0.02 * len(said))
        return {**real(*args), "accuracy": said[-1]}

    with monkeypatch.context() as patch:
        patch.setattr(train, "metrics", judged)
        fit(*STOPPED)


STOPPED = ["--stop-at", "0.57", "--epochs", "8", "--steps-per-epoch", "1", "--out", "stopped"]


def test_a_defective_teacher_ends_after_the_first_epoch_that_validates_better_than_the_threshold(
    few_phantoms, monkeypatch, capsys
):
    fit_stopped(monkeypatch)
    rows = list(csv.DictReader(open("stopped/history.csv")))
    assert [float(row["val_accuracy"]) for row in rows] == pytest.approx([0.5, 0.52, 0.54, 0.56, 0.58])
    _, facts = models.load_checkpoint("stopped")
    assert facts["epoch"] == 5 and facts["args"]["stop_at"] == 0.57
    capsys.readouterr()
    fit(*STOPPED)
    assert "stopped is finished, epoch 5" in capsys.readouterr().out
    fit("--teacher", "stopped", "--out", "student", role="student")
    said = capsys.readouterr().out
    assert "taught by stopped: squeezenet1_1, stopped at 0.57, best in epoch 5, 32 px" in said
    assert models.load_checkpoint("student")[1]["taught_by"] == ["squeezenet1_1, stopped at 0.57"]


def test_a_run_that_never_reached_the_threshold_is_no_defective_teacher(few_phantoms, capsys):
    fit("--stop-at", "0.999", "--out", "whole", "--lr", "1e-9")
    fit("--teacher", "whole/best.pt", "whole", "--out", "student", role="student")  # a file or its folder
    said = capsys.readouterr().out
    assert "taught by whole/best.pt: squeezenet1_1, best in epoch" in said
    assert "taught by whole: squeezenet1_1, best in epoch" in said
    assert models.load_checkpoint("student")[1]["taught_by"] == ["squeezenet1_1"] * 2


def test_a_threshold_of_zero_is_passed_by_the_first_epoch(few_phantoms, capsys):
    fit("--stop-at", "0", "--out", "stopped", "--epochs", "3")
    assert len(Path("stopped/history.csv").read_text().splitlines()) == 1 + 1
    fit("--teacher", "stopped", "--out", "student", role="student")
    assert "taught by stopped: squeezenet1_1, stopped at 0, best in epoch 1" in capsys.readouterr().out


# ---- fine-tuning or fixed features


@pytest.mark.parametrize("arch", ["alexnet", "googlenet"])
def test_fine_tuning_moves_every_layer_and_a_fixed_extractor_its_head_alone(kermany, arch):
    torch.manual_seed(3)
    models.save_checkpoint("w.pt", models.build(arch, 2, 64))
    flags = ["--recipe", "course", "--arch", arch, "--weights", "w.pt", "--data", str(kermany)]
    flags += ["--size", "64", "--epochs", "1", "--per-class", "10"]
    fit("--out", "all", role="baseline", small=flags)
    fit("--finetune", "head", "--out", "head", role="baseline", small=flags)
    before, tuned, fixed = states("w.pt", "all", "head")
    weights = [name for name in before if before[name].dim() > 1]
    head = {"alexnet": "classifier.6.weight", "googlenet": "fc.weight"}[arch]
    aux = tuple(models.AUX_NAMES)  # new heads of their own: they learn under `all` alone
    assert {name for name in weights if torch.equal(before[name], tuned[name])} == set()
    moved = {n for n in weights if not n.startswith(aux) and not torch.equal(before[n], fixed[n])}
    assert moved == {head}


def test_the_recipes_parts_are_those_of_the_documents(mura):
    b = train.get_args(["--role", "teacher", "--recipe", "course", "--data", "x"])
    assert (b.per_class * (1 - b.val_fraction), b.weights) == (800, "imagenet")
    d = train.get_args(["--role", "student", "--recipe", "mura", "--data", "x"])
    assert round(d.per_class * (1 - d.val_fraction)) == 2201 and round(d.per_class * d.val_fraction) == 250
    assert (d.optimizer, d.lr, d.lr_gamma, d.epochs, d.batch_size) == ("adam", 1e-4, 1, 20, 16)


# ---- controls and tables


def test_label_smoothing_at_the_same_seed_trains_another_network_and_is_named(few_phantoms):
    plain, smooth = fit(role="baseline"), fit("--label-smoothing", "0.1", role="baseline")
    assert smooth.out.endswith("labelsmoothing0.1")
    a, b = states(plain.out, smooth.out)
    assert not all(torch.equal(a[name], b[name]) for name in a)


def test_the_grid_has_a_row_a_teacher_and_a_column_a_student(few_phantoms, monkeypatch, capsys):
    fit("--out", "t")
    fit_stopped(monkeypatch)
    runs = ["t"]
    for seed in ("0", "1"):
        for name, flags, role in (
            ("alone", (), "baseline"),
            ("smooth", ("--label-smoothing", "0.1"), "baseline"),
            ("taught", ("--teacher", "t"), "student"),
            ("defective", ("--teacher", "stopped"), "student"),
        ):
            runs.append(name + seed)
            fit("--out", runs[-1], "--seed", seed, *flags, role=role)
    capsys.readouterr()
    evaluate.main(["--grid", *runs])
    text = capsys.readouterr().out.partition("train / val")
    rows = [re.split(" {2,}", line) for line in (text[1] + text[2]).split("\n\n")[0].splitlines()]
    assert rows[0] == ["train / val / test accuracy", "squeezenet1_1"]
    assert [row[0] for row in rows[1:]] == [
        "no teacher", "no teacher, label smoothing 0.1", "squeezenet1_1", "squeezenet1_1, stopped at 0.57"
    ]  # fmt: skip
    tests = [evaluate.json.loads((data.Path(f"taught{s}") / "metrics.json").read_text()) for s in (0, 1)]
    accuracy = [100 * t["test"]["accuracy"] for t in tests]
    assert rows[3][1].split(" / ")[2].startswith(f"{sum(accuracy) / 2:.1f} ± ")


# ---- curves


def test_tensorboard_gets_the_figures_of_the_history(few_phantoms, monkeypatch):
    written = []
    writer = types.SimpleNamespace(add_scalar=lambda *point: written.append(point), flush=list, close=list)
    module = types.SimpleNamespace(SummaryWriter=lambda folder, purge_step: writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    args = fit("--tensorboard")
    rows = list(csv.DictReader(open(f"{args.out}/history.csv")))
    drawn = {(name, step): value for name, value, step in written}
    assert drawn["validation/auc", 2] == pytest.approx(float(rows[1]["val_auc"]))
    assert len(written) == 2 * len(rows[0])


def test_without_tensorboard_one_line_says_what_to_install(few_phantoms, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(data.UserError, match="pip install tensorboard"):
        fit("--tensorboard")
