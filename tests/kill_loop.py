"""Kill a run at random moments and resume it, again and again: every run must end with the bits of a run that was
never stopped. Too slow for the suite:

    python tests/kill_loop.py --kills 50

Each round begins with nothing, so kills fall into the cache of images, the teacher's logits, epochs and the writing
of checkpoints alike. Children are forked, so a kill costs no import. A killed process may leave a .part file behind,
which the next start removes.
"""

import csv
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # torch.set_num_threads would not survive a fork
sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import torch  # noqa: E402
from conftest import asked_for, image_file  # noqa: E402

import evaluate  # noqa: E402
import models  # noqa: E402
import train  # noqa: E402

SMALL = ["--weights", "none", "--finetune", "all", "--arch", "shufflenet_v2_x0_5", "--size", "48", "--epochs", "4"]
SMALL += ["--batch-size", "16", "--val-fraction", "0.25", "--data", "images", "--device", "cpu"]
TEACHER = ["--role", "teacher", *SMALL, "--out", "teacher"]
STUDENT = ["--role", "student", *SMALL, "--teacher", "teacher", "--T", "3", "--out", "student"]


def child(argv):
    """Fork a child that trains and exits without cleaning up, and return its pid."""
    pid = os.fork()
    if pid:
        return pid
    log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    code = 1
    try:
        train.main(argv)
        code = 0
    except BaseException as error:
        print(type(error).__name__, error)
    os._exit(code)


def ending():
    """Return all that must not differ: the best weights, the history without its seconds, the test figures."""
    weights = models.load_checkpoint("student")[0].state_dict()
    with open("student/history.csv", newline="") as file:
        rows = [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]
    state = models.state_of(models.load_run("student")[1])
    assert state == "" and not list(Path("student").glob(".*")), f"the run ended{state}: {os.listdir('student')}"
    with open(os.devnull, "w") as sys.stdout:
        evaluate.main(["student"])
    sys.stdout = sys.__stdout__
    kept = json.loads(Path("student/metrics.json").read_text())
    figures = {k: v for k, v in kept.items() if k not in ("trained_by", "judged_by")}  # not figures
    return weights, rows, figures


def same(a, b):
    return a[1:] == b[1:] and a[0].keys() == b[0].keys() and all(torch.equal(a[0][k], b[0][k]) for k in a[0])


def main():
    wanted = asked_for("kill_loop.py", __doc__, "kills", 50)
    train.SAVE_SECONDS = 0  # a checkpoint per epoch, so that more kills fall into writing
    os.chdir(tempfile.mkdtemp())
    for part, n in (("train", 60), ("test", 16)):
        for i in range(n):
            image_file(Path(f"images/{part}/{('NORMAL', 'PNEUMONIA')[i % 2]}/{part}-{i}.png"), side=64)
    assert os.waitpid(child(TEACHER), 0)[1] == 0, Path("log").read_text()
    lengths = []
    for _ in range(3):
        for folder in ("student", "cache"):
            shutil.rmtree(folder, ignore_errors=True)
        start = time.perf_counter()
        assert os.waitpid(child(STUDENT), 0)[1] == 0, Path("log").read_text()
        lengths.append(time.perf_counter() - start)
    length, expected = min(lengths), ending()  # the first may be slower, and no kill must come after the end
    kills = endings = 0
    while min(kills, endings) < wanted:
        for folder in ("student", "cache"):
            shutil.rmtree(folder, ignore_errors=True)
        for _ in range(50):
            pid = child(STUDENT)
            time.sleep(random.uniform(0, length))
            os.kill(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
            if not os.WIFSIGNALED(status):
                assert status == 0, Path("log").read_text()
                break
            kills += 1
        endings += 1
        assert same(ending(), expected), f"ending {endings} differs from the run that was not stopped"
        print(f"{kills} kills, {endings} endings, all with the same bits", flush=True)


if __name__ == "__main__":
    main()
