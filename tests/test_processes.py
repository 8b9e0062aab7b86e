"""Several processes that train one run, as torchrun starts them."""

import contextlib
import math
import os
import shutil
import subprocess
import sys
from datetime import timedelta
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
                       (LOGITS > 0).float(), math.nan)
LABELS = {"classes": CLASSES, "findings": FINDINGS}
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))


# ---- what each process does


def trained(labels):
    """Train a network without BatchNorm or dropout for four epochs of batches of 8, 8 and 8. Return its weights,
    its rows of history, and the number of labels in each batch of this process."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    parallel = torch.nn.parallel.DistributedDataParallel(model) if dist.is_initialized() else model
    inputs, teacher = (models.from_tensor(table, torch.device("cpu")) for table in (X, LOGITS))
    rows, labelled = [], []
    for epoch in range(4):
        order = torch.Generator().manual_seed(epoch)
        batches = list(train.paired_batches(inputs, labels, teacher, 8, order))
        labelled += [int((y >= 0).sum()) for _, y, _ in batches]
        rows.append(train.train_one_epoch(parallel, batches, optimizer, T=2.0, alpha=0.5, clip=1.0))
    return torch.cat([p.detach().flatten() for p in model.parameters()]), rows, labelled


def plain_network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4 * 14 * 14, 2))


def residual_network():
    model = plain_network()
    model.facts = {"input": "residual"}
    models.read_residuals(model)
    return model


def watched_run(patch, *flags):
    """Train a network with BatchNorm and dropout. Return what this process had in each epoch: its dropout mask, its
    images, the weights after the epoch, its own validation logits, and the history."""
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


TIMEOUTS = {"init_process_group": [], "new_group": []}  # in seconds, of every call in `meeting`


def short(name):
    """Note the timeout of a function of torch.distributed, and call it with a minute: a mistake ends soon."""
    real = getattr(dist, name)

    def call(*args, timeout=None, **options):
        TIMEOUTS[name].append(timeout and timeout.total_seconds())
        return real(*args, timeout=timedelta(minutes=1), **options)

    return call


@contextlib.contextmanager
def meeting(place):
    """Let the processes meet at a file, because torchrun's own place serves only once."""
    where = {"init_method": f"file://{os.getcwd()}/{place}", "rank": int(os.environ["RANK"]), "world_size": WORLD}
    init, new_group = map(short, TIMEOUTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "init_process_group", lambda *args, **options: init(*args, **where, **options))
        patch.setattr(dist, "new_group", new_group)
        yield
    if dist.is_initialized():
        dist.destroy_process_group()


def cut_run(patch):
    """Train a run whose processes end in its second epoch, keep its folder as "earlier", and repeat its command."""
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
    if os.environ["RANK"] == "0":
        shutil.copytree("cut", "earlier")
    with patch.context() as patched, meeting("second"):
        patched.setattr(train, "is_best", lambda *_: True)  # best.pt is of the last epoch
        train.main(command)


APART = [("earlier", "empty"), ("empty", "earlier"), ("cut", "empty")]  # --out of each process; cut is finished


def apart(rank, folders):
    """Return how a process ends whose --out is not that of the other."""
    with meeting("-".join(folders)):
        try:
            data.cli(lambda: train.main(["--role", "teacher", *TINY, "--out", folders[rank]]))
        except SystemExit as end:
            return end.code
        except Exception as error:  # of torch.distributed
            return repr(error)
        return "no error"


def one_of_several():
    rank = int(os.environ["RANK"])
    with pytest.MonkeyPatch.context() as patch:
        few_phantoms_of(patch)
        patch.setattr(sys, "stdout", open(f"printed-{rank}", "w", buffering=1))
        results = {"run": watched_run(patch, "--out", "run")}
        assert not dist.is_initialized()
        cut_run(patch)
        results["apart"] = [apart(rank, folders) for folders in APART]
        results["timeouts"] = {name: [*seconds] for name, seconds in TIMEOUTS.items()}
        with meeting("third"):
            dist.init_process_group("gloo")
            results |= {name: trained(labels) for name, labels in LABELS.items()}
            rows = torch.arange(24)
            batches = train.paired_batches(lambda rows, affines: rows, rows, None, 7, torch.Generator())
            results["shares"] = [y for _, y, _ in batches]
            parallel = torch.nn.parallel.DistributedDataParallel(residual_network())
            results["residual"] = models.forward(parallel, IMAGES)[0].detach()
        torch.save(results, f"{rank}.pt")


# ---- what the tests check


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Start torchrun once, and return the folder where two processes left their results."""
    folder = tmp_path_factory.mktemp("processes")
    paths = f"{Path(train.__file__).parent}{os.pathsep}{Path(__file__).parent}"
    env = {**os.environ, "PYTHONPATH": paths, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD), __file__]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=180)
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
def test_weights_and_losses_equal_those_of_one_process(results, kind):
    """This holds without BatchNorm and dropout, also in batches where one process has no label, because a loss is a
    mean over images."""
    weights, rows, labelled = trained(LABELS[kind])
    held = [result[kind][2] for result in results]
    assert [sum(both) for both in zip(*held, strict=True)] == labelled
    assert any(min(both) == 0 < max(both) for both in zip(*held, strict=True)) and max(labelled) > 1
    for result in results:
        assert torch.allclose(result[kind][0], weights, atol=1e-6)
        for row, its_row in zip(rows, result[kind][1], strict=True):
            assert its_row == pytest.approx(row, abs=1e-5, nan_ok=True)


def test_processes_agree_on_weights_and_history(results, alone):
    """With BatchNorm and dropout, they differ from those of one process."""
    mine, others = (result["run"] for result in results)
    for a, b, c in zip(mine["weights"], others["weights"], alone["weights"], strict=True):
        assert torch.equal(a, b) and not torch.allclose(a, c, atol=1e-5)
    assert not torch.equal(*mine["weights"])  # they do change
    assert mine["history"] == others["history"] and len(mine["history"]) == 2
    assert mine["history"][-1]["loss"] != pytest.approx(alone["history"][-1]["loss"], abs=1e-5)


def test_validation_logits_of_process_0_decide(results):
    """BatchNorm's averages differ between processes. With its own figures, one could stop before the other."""
    mine, others = (result["run"] for result in results)
    assert not any(torch.equal(a, b) for a, b in zip(mine["logits"], others["logits"], strict=True))
    for a, b, row in zip(mine["history"], others["history"], mine["logits"], strict=True):
        labels = torch.arange(12) % 2
        assert a["val_loss"] == b["val_loss"] == pytest.approx(F.cross_entropy(row, labels).item(), rel=1e-5)


def test_dropout_differs_by_process_and_epoch(results):
    dropped = [mask for result in results for mask in result["run"]["dropped"]]
    assert len(dropped) == 4 and all(0 < mask.count_nonzero() < 64 for mask in dropped)
    assert len({tuple(mask.tolist()) for mask in dropped}) == 4


def test_every_image_is_seen_once_per_epoch(results):
    for mine, others in zip(*(result["run"]["images"] for result in results), strict=True):
        assert [len(x) for x in mine] == [len(x) for x in others] == [4, 4, 4]
        assert len(torch.cat([*mine, *others]).unique(dim=0)) == 24


def test_a_last_batch_of_three_rows_joins_the_one_before(results):
    """BatchNorm needs two rows in each process. Of 24 rows in batches of 7, 7 and 10, one row is left out of each
    odd batch."""
    shares = [result["shares"] for result in results]
    assert [[len(y) for y in share] for share in shares] == [[3, 3, 5]] * 2
    assert len(torch.cat([*shares[0], *shares[1]]).unique()) == 22


def test_processes_with_different_out_folders_end_in_one_line(results):
    """One folder holds an earlier epoch, or a finished run, and the other is empty."""
    for result in results:
        assert len(result["apart"]) == len(APART)
        for line in result["apart"]:
            assert line.startswith("error: ") and "\n" not in line and "share --out" in line


def test_timeouts_of_several_processes(results):
    """Collectives end after ten minutes, the wait for caches after hours."""
    for result in results:
        assert len(result["timeouts"]["init_process_group"]) >= 2
        assert all(0 < seconds <= 600 for seconds in result["timeouts"]["init_process_group"])
        assert result["timeouts"]["new_group"] and min(result["timeouts"]["new_group"]) >= 3600


def test_networks_read_noise_residuals_in_several_processes(results):
    wanted = plain_network()(models.residuals(IMAGES))
    for result in results:
        assert torch.allclose(result["residual"], wanted, atol=1e-6)


def test_process_0_writes_and_prints(folder):
    assert {p.name for p in (folder / "run").iterdir()} == {"best.pt", "history.csv"}
    assert len((folder / "run/history.csv").read_text().splitlines()) == 1 + 2
    assert (folder / "printed-0").read_text().count("run is finished after epoch 2") == 1
    assert not (folder / "printed-1").read_text()


def test_one_process_does_not_resume_a_run_of_two(folder, few_phantoms, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(data.UserError, match=r"begun with processes 2 \(now 1\)"):  # other bits
        fit("--out", "run", small=TINY)


def test_two_killed_processes_resume_to_the_same_bits(folder, results):
    assert (folder / "printed-0").read_text().count("cut is finished after epoch 2") >= 1
    assert "resuming after epoch 1" in (folder / "printed-0").read_text()
    model, facts = models.load_run(folder / "cut")
    last = torch.cat([p.flatten() for p in model.parameters()])
    assert facts["epoch"] == 2 and torch.equal(last, results[0]["run"]["weights"][-1])


def test_process_1_does_not_remove_the_folder_of_process_0(monkeypatch, tmp_path):
    """It may end while process 0 is about to write its first best.pt there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # main() replaces it
    monkeypatch.setattr(train, "processes", lambda: (1, 2))
    monkeypatch.setattr(train, "train", lambda args: None)
    train.main(["--role", "teacher", "--out", "run"])
    assert Path("run").is_dir()


def test_a_batch_too_small_for_two_processes_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train.get_args(["--role", "teacher", "--batch-size", "4"]).batch_size == 4
    with pytest.raises(SystemExit):
        train.get_args(["--role", "teacher", "--batch-size", "3"])
    assert "--batch-size is 3, expected 4 or more" in capsys.readouterr().err


if __name__ == "__main__":
    one_of_several()
