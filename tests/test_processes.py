"""Several processes on one run, as torchrun starts them."""

import math
import multiprocessing
import os
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import SMALL, fit

import data
import models
import train

ROOT = Path(train.__file__).parent
WORLD = 2
FEW = {"train": (24, 11), "val": (12, 12), "test": (16, 13)}
X = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
TABLE = torch.randn(24, 3, generator=torch.Generator().manual_seed(1))
CLASSES = (torch.arange(24) % 3).where(torch.arange(24) % 5 == 0, -1)  # 5 of 24 have a label
FINDINGS = torch.where(torch.rand(24, 3, generator=torch.Generator().manual_seed(2)) < 0.15,
                       (TABLE > 0).float(), math.nan)  # fmt: skip
LABELS = {"classes": CLASSES, "findings": FINDINGS}


def trained(labels):
    """A network without BatchNorm or dropout after four epochs of batches of 8, 8 and 8: its weights, its rows
    of history, and how many labels each batch of this process held."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    parallel = torch.nn.parallel.DistributedDataParallel(model) if dist.is_initialized() else model
    args = types.SimpleNamespace(batch_size=8, T=2.0, augment=False, steps_per_epoch=None, device="cpu",
                                 no_amp=False)  # fmt: skip
    rows, known = [], []
    for epoch in range(4):
        order = torch.Generator().manual_seed(epoch)
        batches = list(train.paired_batches((X, None), labels, [(TABLE, None)], args, order))
        known += [int((y >= 0).sum()) for _, y, _ in batches]
        rows.append(train.train_one_epoch(parallel, batches, optimizer, T=2.0, alpha=0.5, clip=1.0))
    return torch.cat([p.detach().flatten() for p in model.parameters()]), rows, known


def residual_network():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4 * 14 * 14, 2))
    model.facts = {"input": "residual"}
    return model


IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def as_torchrun_would(rank, port, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(rank),
                   "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}  # fmt: skip
    os.chdir(folder)
    torch.set_num_threads(1)
    data.PHANTOMS, sys.stdout = FEW, open(f"said-{rank}", "a", buffering=1)


def one_of(rank, port, folder):
    """What each process does: a run, and then parts of one."""
    as_torchrun_would(rank, port, folder)
    epochs, real = [], train.train_one_epoch

    def watched(model, batches, *args):
        batches = list(batches)
        with torch.random.fork_rng():
            dropped = F.dropout(torch.ones(64))
        row = real(model, batches, *args)
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        epochs.append((dropped, [x.flatten(1) for x, _, _ in batches], weights))
        return row

    train.train_one_epoch = watched
    train.main(["--role", "teacher", *SMALL, "--out", "run"])
    train.train_one_epoch = real
    assert not dist.is_initialized()
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    results = {name: trained(labels) for name, labels in LABELS.items()}
    parallel = torch.nn.parallel.DistributedDataParallel(residual_network())
    results |= {"epochs": epochs, "residual": models.forward(parallel, IMAGES)[0].detach()}
    torch.save(results, f"{rank}.pt")
    dist.destroy_process_group()


def start(target, folder):
    """Processes forked off one that has imported torch and done nothing with it: no import a process, and
    none of the threads of this one, which a fork would not survive."""
    multiprocessing.set_forkserver_preload(["torch", "torchvision"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    torch.multiprocessing.start_processes(target, (port, str(folder)), nprocs=WORLD, start_method="forkserver")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where two processes were, and left their results; they are started once for most tests below."""
    folder = tmp_path_factory.mktemp("processes")
    start(one_of, folder)
    return folder


@pytest.fixture
def processes(folder):
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("kind", LABELS)
def test_processes_with_a_share_of_each_batch_reach_the_weights_of_one_with_all_of_it(processes, kind):
    """Also where one of them holds no label, or none of them does."""
    alone, rows, known = trained(LABELS[kind])
    held = [result[kind][2] for result in processes]
    assert [sum(both) for both in zip(*held, strict=True)] == known
    assert any(min(both) == 0 < max(both) for both in zip(*held, strict=True)) and max(known) > 1
    for result in processes:
        weights, its_rows, _ = result[kind]
        assert torch.allclose(weights, alone, atol=1e-6)
        for row, its_row in zip(rows, its_rows, strict=True):
            assert its_row == pytest.approx(row, abs=1e-5)


def test_each_process_drops_other_units_and_others_in_every_epoch(processes):
    dropped = [mask for result in processes for mask, _, _ in result["epochs"]]
    assert len(dropped) == 4 and all(0 < mask.count_nonzero() < 64 for mask in dropped)
    assert len({tuple(mask.tolist()) for mask in dropped}) == 4


def test_the_processes_share_out_every_batch_and_see_every_image_once_an_epoch(processes):
    for (_, mine, _), (_, others, _) in zip(*(result["epochs"] for result in processes), strict=True):
        assert [len(x) for x in mine] == [len(x) for x in others] == [4, 4, 4]
        assert len(torch.cat([*mine, *others]).unique(dim=0)) == 24


def test_the_processes_of_a_run_hold_the_same_weights_after_every_epoch(processes):
    for (*_, mine), (*_, others) in zip(*(result["epochs"] for result in processes), strict=True):
        assert torch.equal(mine, others)
    assert not torch.equal(*(weights for *_, weights in processes[0]["epochs"]))


def test_noise_residuals_are_what_a_network_reads_also_where_several_processes_train_it(processes):
    alone = models.forward(residual_network(), IMAGES)[0]
    for result in processes:
        assert torch.allclose(result["residual"], alone, atol=1e-6)


def test_one_process_writes_and_tells_and_the_run_can_be_taken_up_by_as_many_alone(
    folder, few_phantoms, monkeypatch
):
    assert {p.name for p in (folder / "run").iterdir()} == {"best.pt", "last.pt", "history.csv"}
    assert len((folder / "run/history.csv").read_text().splitlines()) == 1 + 2
    assert (folder / "said-0").read_text().count("epoch  1/2") == 1 and not (folder / "said-1").read_text()
    monkeypatch.chdir(folder)
    with pytest.raises(data.UserError, match=r"begun with 2 processes \(now 1\)"):  # other bits
        fit("--out", "run")


def dies_in_the_second_epoch(rank, port, folder):
    as_torchrun_would(rank, port, folder)
    train.SAVE_SECONDS, real, calls = 0, train.predict, []
    train.is_best = lambda *_: True  # best.pt is of the last epoch

    def predict(*args):
        calls.append(1)
        if len(calls) == 2 and os.path.exists("die"):
            os._exit(9)
        return real(*args)

    train.predict = predict
    train.main(["--role", "teacher", *SMALL, "--out", "run"])


def test_a_run_of_two_processes_that_both_died_is_taken_up_to_the_same_bits(tmp_path):
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    start(dies_in_the_second_epoch, tmp_path / "whole")
    Path("cut/die").touch()
    with pytest.raises(torch.multiprocessing.ProcessExitedException):
        start(dies_in_the_second_epoch, tmp_path / "cut")
    Path("cut/die").unlink()
    start(dies_in_the_second_epoch, tmp_path / "cut")
    assert Path("cut/said-0").read_text().count("going on after epoch 1") == 1
    a, b = (models.load_checkpoint(f"{name}/run")[0].state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_batch_too_small_for_two_images_a_process_is_refused(monkeypatch):
    monkeypatch.setattr(train, "processes", lambda: (0, 3))
    with pytest.raises(data.UserError, match="--batch-size 5 leaves 3 processes less than two images each"):
        fit("--batch-size", "5")


# ---- torchrun itself


def torchrun(*flags, code=""):
    Path("patched.py").write_text(f"import os, data, train\ndata.PHANTOMS = {FEW}\n{code}\ndata.run(train.main)")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD),
               "patched.py", "--role", "teacher", *SMALL, *flags]  # fmt: skip
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def test_torchrun_starts_the_very_run_that_the_tests_above_start(folder):
    done = torchrun("--out", "run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch  2/2") == 1
    a, b = (models.load_checkpoint(run)[0].state_dict() for run in ("run", folder / "run"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_process_that_dies_ends_the_run_with_an_error(tmp_path):
    """The other one would wait for it for ever."""
    dies = 'if os.environ["RANK"] == "1":\n    train.predict = lambda *_: os._exit(9)'
    assert torchrun("--out", "run", "--epochs", "3", code=dies).returncode != 0
