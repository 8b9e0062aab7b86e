"""Several processes on one run, as torchrun starts them: what is theirs to share, and what they agree on."""

import contextlib
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import TINY, few_phantoms_of, fit

import data
import models
import train

WORLD = 2
X = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
LOGITS = torch.randn(24, 3, generator=torch.Generator().manual_seed(1))
CLASSES = (torch.arange(24) % 3).where(torch.arange(24) % 5 == 0, -1)  # 5 of 24 have a label
FINDINGS = torch.where(torch.rand(24, 3, generator=torch.Generator().manual_seed(2)) < 0.15,
                       (LOGITS > 0).float(), math.nan)  # fmt: skip
LABELS = {"classes": CLASSES, "findings": FINDINGS}
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))


# ---- what each process does


def trained(labels):
    """A network without BatchNorm or dropout after four epochs of batches of 8, 8 and 8: its weights, its rows
    of history, and how many labels each batch of this process held."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    parallel = torch.nn.parallel.DistributedDataParallel(model) if dist.is_initialized() else model
    args = types.SimpleNamespace(batch_size=8, T=2.0, augment=False, steps_per_epoch=None, device="cpu",
                                 no_amp=False)  # fmt: skip
    rows, labelled = [], []
    for epoch in range(4):
        order = torch.Generator().manual_seed(epoch)
        batches = list(train.paired_batches(train.Table(X), labels, [train.Table(LOGITS)], args, order))
        labelled += [int((y >= 0).sum()) for _, y, _ in batches]
        sums = torch.zeros(6)
        train.train_one_epoch(parallel, batches, optimizer, T=2.0, alpha=0.5, clip=1.0, sums=sums)
        if dist.is_initialized():
            dist.all_reduce(sums)
        rows.append(train.epoch_figures(sums))
    return torch.cat([p.detach().flatten() for p in model.parameters()]), rows, labelled


def residual_network():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4 * 14 * 14, 2))
    model.facts = {"input": "residual"}
    return model


def watched_run(patch, *flags):
    """A run with BatchNorm and dropout; what this process had of each epoch: what dropout draws, the images,
    the weights after it, its own logits of the validation images, and the rows of history."""
    seen = {"dropped": [], "images": [], "weights": [], "logits": [], "history": []}
    epoch, predict, is_best = train.train_one_epoch, train.predict, train.is_best

    def watched_epoch(model, batches, *args, **options):
        batches = list(batches)
        with torch.random.fork_rng():
            seen["dropped"].append(F.dropout(torch.ones(64)))
        row = epoch(model, batches, *args, **options)
        seen["images"].append([x.flatten(1) for x, _, _ in batches])
        seen["weights"].append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        return row

    def watched_predict(*args):
        logits = predict(*args)
        seen["logits"].append(logits.clone())  # a broadcast writes into them
        return logits

    def watched_history(history, *args):
        seen["history"] = [{**row, "seconds": 0} for row in history]
        return is_best(history, *args)

    with patch.context() as patched:
        patched.setattr(train, "train_one_epoch", watched_epoch)
        patched.setattr(train, "predict", watched_predict)
        patched.setattr(train, "is_best", watched_history)
        train.main(["--role", "teacher", *TINY, *flags])
    return seen


@contextlib.contextmanager
def meeting(place):
    """The processes meet at a file: torchrun's own place serves once, and would hang the second time."""
    where = {"init_method": f"file://{os.getcwd()}/{place}", "rank": int(os.environ["RANK"]), "world_size": WORLD}
    real = dist.init_process_group
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "init_process_group", lambda *args, **options: real(*args, **where, **options))
        yield
    if dist.is_initialized():
        dist.destroy_process_group()


def cut_run(patch):
    """A run whose processes end in its second epoch; its command is then repeated."""
    calls, real = [], train.predict

    def dies(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    command = ["--role", "teacher", *TINY, "--out", "cut"]
    with patch.context() as patched, meeting("first"), pytest.raises(KeyboardInterrupt):
        patched.setattr(train, "predict", dies)
        patched.setattr(train, "SAVE_SECONDS", 0)
        train.main(command)
    with patch.context() as patched, meeting("second"):
        patched.setattr(train, "is_best", lambda *_: True)  # best.pt is of the last epoch
        train.main(command)


def one_of_several():
    rank = os.environ["RANK"]
    with pytest.MonkeyPatch.context() as patch:
        few_phantoms_of(patch)
        patch.setattr(sys, "stdout", open(f"printed-{rank}", "w", buffering=1))
        results = {"run": watched_run(patch, "--out", "run")}
        assert not dist.is_initialized()
        cut_run(patch)
        with meeting("third"):
            dist.init_process_group("gloo")
            results |= {name: trained(labels) for name, labels in LABELS.items()}
            parallel = torch.nn.parallel.DistributedDataParallel(residual_network())
            results["residual"] = models.forward(parallel, IMAGES)[0].detach()
        torch.save(results, f"{rank}.pt")


# ---- what must be true of it


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where two processes were, and left their results: torchrun is started once."""
    folder = tmp_path_factory.mktemp("processes")
    paths = f"{Path(train.__file__).parent}{os.pathsep}{Path(__file__).parent}"
    env = {**os.environ, "PYTHONPATH": paths, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD), __file__]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def results(folder):
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.fixture
def alone(few_phantoms, monkeypatch):
    """The same run by one process."""
    return watched_run(monkeypatch, "--out", "alone")


@pytest.mark.parametrize("kind", LABELS)
def test_without_batchnorm_and_dropout_processes_reach_the_weights_and_losses_of_one(results, kind):
    """Also where one of them holds no label, or none of them does: a loss is a mean over images."""
    weights, rows, labelled = trained(LABELS[kind])
    held = [result[kind][2] for result in results]
    assert [sum(both) for both in zip(*held, strict=True)] == labelled
    assert any(min(both) == 0 < max(both) for both in zip(*held, strict=True)) and max(labelled) > 1
    for result in results:
        assert torch.allclose(result[kind][0], weights, atol=1e-6)
        for row, its_row in zip(rows, result[kind][1], strict=True):
            assert its_row == pytest.approx(row, abs=1e-5, nan_ok=True)


def test_with_batchnorm_and_dropout_processes_agree_on_weights_and_history_which_are_not_those_of_one(
    results, alone
):
    mine, others = (result["run"] for result in results)
    for a, b, c in zip(mine["weights"], others["weights"], alone["weights"], strict=True):
        assert torch.equal(a, b) and not torch.allclose(a, c, atol=1e-5)
    assert not torch.equal(*mine["weights"])  # they do move
    assert mine["history"] == others["history"] and len(mine["history"]) == 2
    assert mine["history"][-1]["loss"] != pytest.approx(alone["history"][-1]["loss"], abs=1e-5)


def test_all_processes_judge_an_epoch_by_the_same_validation_logits_though_their_own_differ(results):
    """BatchNorm's averages are each process's own; with its own figures one could stop before the other."""
    mine, others = (result["run"] for result in results)
    assert not any(torch.equal(a, b) for a, b in zip(mine["logits"], others["logits"], strict=True))
    for a, b, row in zip(mine["history"], others["history"], mine["logits"], strict=True):
        labels = torch.arange(12) % 2
        assert a["val_loss"] == b["val_loss"] == pytest.approx(F.cross_entropy(row, labels).item(), rel=1e-5)


def test_each_process_drops_other_units_and_others_in_every_epoch(results):
    dropped = [mask for result in results for mask in result["run"]["dropped"]]
    assert len(dropped) == 4 and all(0 < mask.count_nonzero() < 64 for mask in dropped)
    assert len({tuple(mask.tolist()) for mask in dropped}) == 4


def test_the_processes_share_out_every_batch_and_see_every_image_once_an_epoch(results):
    for mine, others in zip(*(result["run"]["images"] for result in results), strict=True):
        assert [len(x) for x in mine] == [len(x) for x in others] == [4, 4, 4]
        assert len(torch.cat([*mine, *others]).unique(dim=0)) == 24


def test_noise_residuals_are_what_a_network_reads_also_where_several_processes_train_it(results):
    wanted = models.forward(residual_network(), IMAGES)[0]
    for result in results:
        assert torch.allclose(result["residual"], wanted, atol=1e-6)


def test_one_process_writes_and_prints_and_one_alone_does_not_go_on_with_their_run(folder, few_phantoms, monkeypatch):
    assert {p.name for p in (folder / "run").iterdir()} == {"best.pt", "last.pt", "history.csv"}
    assert len((folder / "run/history.csv").read_text().splitlines()) == 1 + 2
    assert (folder / "printed-0").read_text().count("run is finished, epoch 2") == 1
    assert not (folder / "printed-1").read_text()
    monkeypatch.chdir(folder)
    with pytest.raises(data.UserError, match=r"begun with processes 2 \(now 1\)"):  # other bits
        fit("--out", "run", small=TINY)


def test_a_run_of_two_processes_that_both_died_is_taken_up_to_the_same_bits(folder, results, monkeypatch):
    assert (folder / "printed-0").read_text().count("going on after epoch 1") == 1
    model, facts = models.load_run(folder / "cut")
    last = torch.cat([p.flatten() for p in model.parameters()])
    assert facts["epoch"] == 2 and torch.equal(last, results[0]["run"]["weights"][-1])


if __name__ == "__main__":
    one_of_several()
