"""The other systems to reproduce, each of which is a recipe, a network and a checkpoint for the same loop:
fine-tuning or fixed features; normal, reversed and defective teachers; several teachers."""

import csv
from pathlib import Path

import pytest
import torch
from conftest import fit, run

import data
import models
import train


# ---- SE-ResNets


def test_seresnet50_has_the_published_size():
    with torch.device("meta"):
        model = models.bare_network("seresnet50", aux=False)
    assert sum(p.numel() for p in model.parameters()) == 28_088_024


def test_an_se_resnet_starts_from_a_resnet():
    resnet = models.bare_network("resnet50", aux=False).state_dict()
    torch.save(resnet, "resnet50.pth")
    model = models.build("seresnet50", 2, 32, "resnet50.pth")
    own = model.state_dict()
    assert {name for name in own if name not in resnet} == {name for name in own if ".se." in name}
    assert all(torch.equal(own[name], value) for name, value in resnet.items() if "fc." not in name)
    assert not model.facts["body_loaded"]  # so that it is not frozen


def test_squeeze_and_excitation_against_its_formula():
    block = models.SEBottleneck(16, 4).eval()
    x = torch.randn(2, 16, 5, 5)
    y = block.bn3(block.conv3(block.relu(block.bn2(block.conv2(block.relu(block.bn1(block.conv1(x))))))))
    s = torch.relu(y.mean((2, 3)) @ block.se.fc1.weight[:, :, 0, 0].T + block.se.fc1.bias)
    s = torch.sigmoid(s @ block.se.fc2.weight[:, :, 0, 0].T + block.se.fc2.bias)
    assert torch.allclose(block(x), torch.relu(y * s[:, :, None, None] + x), atol=1e-6)


# ---- MURA


def test_mura_has_a_class_per_body_part(mura):
    loaded = data.load(mura, 16, ("train", "val", "test"), val_fraction=0.25)
    assert loaded.classes == ["ELBOW", "FINGER", "FOREARM", "HAND", "HUMERUS", "SHOULDER", "WRIST"]
    assert len(loaded.train.labels) + len(loaded.val.labels) == 56 and len(loaded.test.labels) == 7
    assert set(loaded.test.groups) == {"patient11185"}
    assert set(loaded.train.groups) | set(loaded.val.groups) == {f"patient0000{i}" for i in range(1, 5)}
    assert not set(loaded.train.groups) & set(loaded.val.groups)
    for id, label in zip(loaded.train.ids, loaded.train.labels, strict=True):
        assert f"XR_{loaded.classes[label]}/" in id


def test_normal_and_reversed_distillation(mura, capsys):
    flags = ["--recipe", "mura", "--weights", "none", "--size", "32", "--epochs", "1", "--data", str(mura),
             "--val-fraction", "0.25", "--batch-size", "8", "--steps-per-epoch", "1", "--per-class", "4"]
    pairs = ("resnet18", "seresnet50"), ("seresnet50", "resnet18")
    for arch, _ in pairs:
        fit("--arch", arch, "--out", f"teacher-{arch}", small=flags)
    for teacher, student in pairs:
        fit("--arch", student, "--teacher", f"teacher-{teacher}", "--out", student, role="student", small=flags)
        assert f"teacher teacher-{teacher}: {teacher}, epoch 1" in capsys.readouterr().out
        _, facts = models.load_run(student)
        assert facts["arch"] == student and facts["config"]["taught_by"] == [teacher]


# ---- teachers that were stopped


STOPPED = ["--stop-at", "0.57", "--epochs", "8", "--steps-per-epoch", "1", "--out", "stopped"]


def train_stopped(monkeypatch):
    """Train a run whose validation accuracy is 0.5 after the first epoch, and 0.02 more after each further one."""
    real, said = train.metrics, []

    def judged(*args):
        said.append(0.5 + 0.02 * len(said))
        return {**real(*args), "accuracy": said[-1]}

    with monkeypatch.context() as patch:
        patch.setattr(train, "metrics", judged)
        run(*STOPPED)


def test_a_defective_teacher_stops_in_time(few_phantoms, monkeypatch, capsys):
    train_stopped(monkeypatch)
    rows = list(csv.DictReader(open("stopped/history.csv")))
    assert [float(row["val_accuracy"]) for row in rows] == pytest.approx([0.5, 0.52, 0.54, 0.56, 0.58])
    _, facts = models.load_run("stopped")
    assert facts["epoch"] == 5 and facts["config"]["stop_at"] == 0.57
    run(*STOPPED)
    assert capsys.readouterr().out.endswith("stopped is finished after epoch 5. Next: python evaluate.py stopped\n")
    run("--teacher", "stopped", "--out", "student", role="student")
    assert "teacher stopped: tiny, stopped at 0.57, epoch 5, " in capsys.readouterr().out
    assert models.load_run("student")[1]["config"]["taught_by"] == ["tiny, stopped at 0.57"]


def test_a_run_below_its_threshold_is_not_defective(few_phantoms, capsys):
    run("--stop-at", "0.999", "--out", "whole", "--lr", "1e-9")
    run("--teacher", "whole/best.pt", "whole", "--out", "student", role="student")  # a file or its folder
    said = capsys.readouterr().out
    assert "teacher whole/best.pt: tiny, epoch" in said and "teacher whole: tiny, epoch" in said
    assert models.load_run("student")[1]["config"]["taught_by"] == ["tiny"] * 2


def test_a_threshold_of_zero_stops_after_one_epoch(few_phantoms):
    run("--stop-at", "0", "--out", "stopped", "--epochs", "3")
    assert len(Path("stopped/history.csv").read_text().splitlines()) == 1 + 1
    assert models.state_of(models.load_run("stopped")[1]) == ", stopped at 0"


# ---- fine-tuning or fixed features


def test_finetune_all_and_head_train_these_layers(kermany):
    torch.manual_seed(3)
    models.save_checkpoint("w.pt", models.build("googlenet", 2, 64))
    flags = ["--recipe", "course", "--arch", "googlenet", "--weights", "w.pt", "--data", str(kermany),
             "--size", "64", "--epochs", "1", "--per-class", "10"]
    fit("--out", "all", role="baseline", small=flags)
    fit("--finetune", "head", "--out", "head", role="baseline", small=flags)
    before, tuned, fixed = (models.load_checkpoint(path)[0].state_dict() for path in ("w.pt", "all", "head"))
    weights = [name for name in before if before[name].dim() > 1]
    assert not [name for name in weights if torch.equal(before[name], tuned[name])]
    assert [name for name in weights if not torch.equal(before[name], fixed[name])] == ["fc.weight"]


def test_recipes_follow_their_documents():
    course = train.get_args(["--role", "teacher", "--recipe", "course", "--data", "x"])
    assert (course.per_class * (1 - course.val_fraction), course.weights) == (800, "imagenet")
    mura = train.get_args(["--role", "student", "--recipe", "mura", "--data", "x"])
    n = mura.per_class * mura.val_fraction
    assert round(mura.per_class - n) == 2201 and round(n) == 250
    assert (mura.optimizer, mura.lr, mura.lr_gamma, mura.epochs, mura.batch_size) == ("adam", 1e-4, 1, 20, 16)
