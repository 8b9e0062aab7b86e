"""Several processes on one run, as torchrun starts them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SMALL, fit

import data
import models
import train

ROOT = Path(train.__file__).parent
FILMS = torch.randn(21, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(21) % 2
TABLE = torch.randn(21, 2, generator=torch.Generator().manual_seed(1))


def trained():
    """A network without BatchNorm or dropout after two epochs of batches of 9, 9 and 3; its loss too."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    for epoch in range(2):
        parts = train.batches(21, 9, torch.Generator().manual_seed(epoch))
        row = train.train_one_epoch(model, lambda i: FILMS[i], LABELS, parts, optimizer,
                                    lambda i: TABLE[i], 2.0, clip=1.0)  # fmt: skip
    return torch.cat([p.detach().flatten() for p in model.parameters()]), row


def one_of(rank, world, port, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    torch.save(trained(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_processes_with_a_share_of_each_batch_reach_the_weights_of_one_with_all_of_it(tmp_path):
    """With four of them, the last batch of three would leave one process without a film."""
    world = 4
    torch.multiprocessing.spawn(one_of, (world, "29613", str(tmp_path)), nprocs=world)
    alone, row = trained()
    for rank in range(world):
        weights, its_row = torch.load(tmp_path / f"{rank}.pt")
        assert torch.allclose(weights, alone, atol=1e-6)
        assert its_row == pytest.approx(row, abs=1e-5)


def torchrun(*flags, code=None, port):
    script = [str(ROOT / "train.py")]
    if code:
        Path("patched.py").write_text(code)
        script = ["patched.py"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port,
               *script, "--role", "teacher", *SMALL, *flags]  # fmt: skip
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


FEW = "import data, train\ndata.PHANTOMS = {'train': (24, 11), 'val': (12, 12), 'test': (16, 13)}\n"


def test_one_process_writes_and_tells_and_the_run_can_be_taken_up_by_as_many_alone(few_phantoms):
    main = FEW + "data.run(train.main)\n"
    first = torchrun("--out", "run", "--epochs", "1", code=main, port="29615")
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("epoch  1/1") == 1
    assert {p.name for p in Path("run").iterdir()} == {"best.pt", "last.pt", "history.csv"}
    assert models.load_checkpoint("run")[1]["epoch"] == 1
    with pytest.raises(data.UserError, match=r"begun with 2 processes \(now 1\)"):  # other bits
        fit("--out", "run", "--epochs", "1")


def test_a_run_of_two_processes_that_both_died_is_taken_up_to_the_same_bits(tmp_path):
    code = FEW + (
        "import os\ntrain.SAVE_SECONDS, real, calls = 0, train.predict, []\n"
        "def predict(*a):\n"
        "    calls.append(1)\n"
        "    if os.path.exists('die') and len(calls) == 2:\n"
        "        os._exit(9)\n"
        "    return real(*a)\n"
        "train.predict = predict\ndata.run(train.main)\n"
    )
    assert torchrun("--out", "whole", code=code, port="29621").returncode == 0
    Path("die").touch()
    assert torchrun("--out", "cut", code=code, port="29623").returncode != 0
    Path("die").unlink()
    again = torchrun("--out", "cut", code=code, port="29625")
    assert again.returncode == 0 and again.stdout.count("going on after epoch 1") == 1
    a, b = (models.load_checkpoint(f"{run}/last.pt")[0].state_dict() for run in ("whole", "cut"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_process_that_dies_ends_the_run_with_an_error(tmp_path):
    dies = FEW + (
        "import os\nreal = train.predict\n"
        "def predict(*a):\n"
        "    if os.environ['RANK'] == '1':\n"
        "        os._exit(9)\n"
        "    return real(*a)\n"
        "train.predict = predict\ndata.run(train.main)\n"
    )
    ended = torchrun("--out", "run", "--epochs", "3", code=dies, port="29619")
    assert ended.returncode != 0
