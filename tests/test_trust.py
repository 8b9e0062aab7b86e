"""What must hold when things go wrong: full disks, damaged files, signals, and files that are not images."""

import hashlib
import re
import resource
import shutil
import signal
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, few_phantoms_of, image_file, run
from PIL import Image

import data
import evaluate
import models
import train


def tiny():
    return models.build("tiny", 2, 32)


@contextmanager
def full_disk(bytes_left):
    """Limit the size of files, as if a disk filled up in the middle of writing."""
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)


def one_line(write):
    """Return the one line with which a script exits when `write` fails."""
    with pytest.raises(SystemExit) as end:
        data.cli(write)
    assert str(end.value).startswith("error: ") and "\n" not in str(end.value)
    return str(end.value)


def refused(call, *args):
    """Return the one line of a UserError."""
    with pytest.raises(data.UserError) as error:
        call(*args)
    assert str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def test_a_full_disk_keeps_the_last_checkpoint():
    models.save_checkpoint("best.pt", models.build("squeezenet1_1", 2, 32), epoch=1)
    good = Path("best.pt").read_bytes()
    try:
        with full_disk(100_000):
            assert "best.pt" in one_line(
                lambda: models.save_checkpoint("best.pt", models.build("squeezenet1_1", 2, 32), epoch=2))
    finally:
        assert [path.name for path in Path().iterdir()] == ["best.pt"] and Path("best.pt").read_bytes() == good
    assert models.load_checkpoint("best.pt")[1]["epoch"] == 1


@pytest.mark.parametrize("write", [
    lambda: data.cached_array(Path("cache/t.npy"), "float32", (1000, 1000), (np.zeros((500, 1000), "float32") for _ in range(2))),
    lambda: evaluate.write_json("all.json", list(range(100_000))),
    lambda: evaluate.write_csv("all.csv", ["n"], ([i] for i in range(100_000))),
], ids=["array", "json", "csv"])
def test_a_full_disk_leaves_no_half_file(write):
    with full_disk(100_000):
        assert "File too large" in one_line(write)
    assert not [path for path in Path().rglob("*") if path.is_file()]


def test_a_run_resumes_after_ctrl_c(few_phantoms, monkeypatch, capsys):
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with monkeypatch.context() as patched:
            patched.setattr(train, "describe_epoch", lambda *_: signal.raise_signal(signal.SIGINT))
            with pytest.raises((SystemExit, KeyboardInterrupt)) as end:
                data.cli(lambda: run("--out", "run"))
    finally:
        signal.signal(signal.SIGINT, handler)
    assert isinstance(end.value, SystemExit) and "\n" not in str(end.value)
    run("--out", "run")
    assert "resuming after epoch 1" in capsys.readouterr().out
    assert len(Path("run/history.csv").read_text().splitlines()) == 3 and not list(Path("run").glob(".*"))


# ---- images


@pytest.mark.parametrize("name", ["huge.png", "empty.jpeg", "cut.jpeg", "text.jpeg", "damaged.png"])
def test_a_file_that_is_not_an_image_is_named(kermany, name):
    path = kermany / "test/NORMAL" / name
    whole = image_file(path).read_bytes()
    if name == "huge.png":  # its header claims 60000 x 60000 pixels, all its checksums right
        whole = whole[:16] + 2 * (60000).to_bytes(4) + whole[24:]
        whole = whole[:29] + zlib.crc32(whole[12:29]).to_bytes(4) + whole[33:]
    damaged = whole[:60] + bytes([whole[60] ^ 255]) + whole[61:]
    contents = {"huge": whole, "empty": b"", "cut": whole[: len(whole) // 2], "text": b"no image",
                "damaged": damaged}
    path.write_bytes(contents[path.stem])
    said = refused(data.load, kermany, 16, ("test",))
    assert name in said


def test_unusual_images_are_read(kermany):
    Image.new("CMYK", (30, 20), (0, 0, 0, 0)).save(kermany / "test/NORMAL/cmyk.jpeg")
    image_file(kermany / "test/NORMAL/IM-0900-0001.png", shade=99).rename(kermany / "test/NORMAL/IM-0900-0001.jpeg")
    padded = image_file(kermany / "test/NORMAL/padded.jpeg", shade=120)
    padded.write_bytes(padded.read_bytes().replace(b"\xff\xc0", b"\xff\xff\xff\xc0"))  # as the format allows
    test = data.load(kermany, 16, ("test",)).test
    shades = dict(zip((Path(id).name for id in test.ids), test.images.float().mean((1, 2, 3)), strict=True))
    assert shades["IM-0900-0001.jpeg"] == 99 and shades["cmyk.jpeg"] > 200  # no ink is white
    assert shades["padded.jpeg"] == 120


# ---- checkpoints


def test_equal_weights_have_equal_files_and_hashes():
    """A hash of weights depends on no file name and on no fact."""
    model = tiny()
    for path in ("best.pt", "elsewhere/other name.pt"):
        models.save_checkpoint(path, model, epoch=3)
    assert Path("best.pt").read_bytes() == Path("elsewhere/other name.pt").read_bytes()
    models.save_checkpoint("best.pt", model, epoch=4)
    assert Path("best.pt").read_bytes() != Path("elsewhere/other name.pt").read_bytes()
    state = models.load_checkpoint("best.pt")[0].state_dict()
    assert models.weights_hash(state) == models.weights_hash(model.state_dict())
    state["features.0.bias"] = state["features.0.bias"] + 1e-6
    assert models.weights_hash(state) != models.weights_hash(model.state_dict())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a finished run, teacher, and one of two epochs that was stopped after the first, run."""
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(tmp_path_factory.mktemp("trained"))
        few_phantoms_of(patched)
        run("--out", "teacher", "--epochs", "1")
        patched.setattr(train, "SAVE_SECONDS", 0)
        patched.setattr(train, "describe_epoch", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run("--out", "run")
        return Path.cwd()


@pytest.fixture
def runs(trained, few_phantoms):
    shutil.copytree(trained, ".", dirs_exist_ok=True)


GONE = object()


def spoil_facts(name, value=GONE):
    content = torch.load("teacher/best.pt", weights_only=True)
    facts = {k: v for k, v in content["facts"].items() if k != name}
    torch.save({**content, "facts": facts if value is GONE else {**facts, name: value}}, "teacher/best.pt")


def teach():
    """Do what train.py does with a teacher, without the epochs that follow."""
    args = train.get_args(["--role", "student", *TINY, "--teacher", "teacher", "--out", "student"])
    train.load_teachers(args, data.load_as(vars(args), 32, ("train", "val"), "cache"), torch.device("cpu"))


def evaluate_it():
    evaluate.main(["teacher"])


OF_THE_NETWORK = {"arch", "num_classes", "aux", "transform_input", "input"}
OF_THE_RUN = {*models.RUN_FACTS}


def test_every_fact_that_is_read_is_taken_out_below(runs):
    others = {"first_weights", "from_run", "body_loaded", "provenance"}
    assert models.load_run("teacher")[1].keys() - others == OF_THE_NETWORK | OF_THE_RUN - others


@pytest.mark.parametrize("name", sorted(OF_THE_NETWORK | OF_THE_RUN))
def test_a_run_that_lacks_a_fact_is_refused(runs, name):
    spoil_facts(name)
    for use in (teach, evaluate_it):
        said = refused(use)
        assert said.startswith("teacher") and name in said


@pytest.mark.parametrize("name, value", [
    ("arch", "resnet999"), ("arch", 7), ("arch", "resnet18"), ("num_classes", 3), ("num_classes", -1),
    ("num_classes", 10**13), ("num_classes", "two"), ("classes", ["a", "b"]), ("size", None), ("history", None),
    ("config", {}), ("config", [1]), ("config", None),
])
def test_a_run_with_a_wrong_fact_is_refused(runs, name, value):
    spoil_facts(name, value)
    for use in (teach, evaluate_it):
        said = refused(use)
        assert "teacher" in said or "no network is called" in said


@pytest.mark.parametrize("content", [
    {}, [1, 2], "text", {"format": 5}, {"format": 5, "model": {}, "facts": {}}, {"format": 4, "model": {}, "facts": {}},
    {"format": 5, "model": 5, "facts": {}}, {1: torch.zeros(2)}, {"weight": torch.zeros(2)},
    {"format": torch.zeros(2), "model": {}, "facts": {}}, {"model": {}, "facts": {}},
])
def test_other_files_are_refused_as_weights(content):
    torch.save(content, "other.pt")
    for read in (models.load_checkpoint, lambda path: models.build("tiny", 2, 32, path)):
        assert "other.pt" in refused(read, "other.pt")


# ---- a mistake in the code keeps its traceback


def mistake(*_, **__):
    return an_undefined_name  # noqa: F821


@pytest.mark.parametrize("module, name", [
    (train, "metrics"), (train, "distillation_loss"), (train, "forward"), (train, "ended"),
    (train, "random_affines"), (models, "freeze"), (models, "replace_heads"), (models, "residuals"),
], ids=lambda value: value if isinstance(value, str) else value.__name__)
def test_a_mistake_in_training_keeps_its_traceback(module, name, few_phantoms, monkeypatch):
    monkeypatch.setattr(module, name, mistake)
    with pytest.raises(NameError, match="an_undefined_name"):
        data.cli(lambda: run("--augment", "--input", "residual"))


@pytest.mark.parametrize("module, name", [
    (evaluate, "measure"), (evaluate, "forward"), (evaluate, "cost"), (models, "bare_network"),
    (models, "replace_heads"),
], ids=lambda value: value if isinstance(value, str) else value.__name__)
def test_a_mistake_in_evaluation_keeps_its_traceback(module, name, runs, monkeypatch):
    monkeypatch.setattr(module, name, mistake)
    with pytest.raises(NameError, match="an_undefined_name"):
        data.cli(evaluate_it)


def test_a_mistake_in_resuming_keeps_its_traceback(runs, monkeypatch):
    monkeypatch.setattr(train, "ended", mistake)
    with pytest.raises(NameError, match="an_undefined_name"):
        data.cli(lambda: run("--out", "run"))


def test_a_mistake_in_a_network_of_ones_own(monkeypatch):
    class Own(torch.nn.Module):
        forward = mistake

        def __init__(self):
            super().__init__()
            self.last = torch.nn.Linear(3, 1000)

    monkeypatch.setitem(models.NETWORKS, "own", Own)
    with pytest.raises(NameError, match="an_undefined_name"):
        models.build("own", 2, 32)


def test_errors_keep_their_cause(runs):
    Path("damaged.pt").write_bytes(b"PK")
    model = Path("teacher/best.pt").read_bytes()
    Path("cut.pt").write_bytes(model[: len(model) // 2])
    spoil_facts("arch")
    for path in ("damaged.pt", "cut.pt", "teacher/best.pt"):
        with pytest.raises(data.UserError) as error:
            models.load_checkpoint(path)
        cause = error.value.__cause__
        assert cause is not None and type(cause).__name__ in str(error.value)
        assert re.search(r"\(\w+: .+\)$", str(error.value))


# ---- resuming


def spoil_momentum(value):
    return lambda facts: facts["last"]["optimizer"]["state"][0].update(momentum_buffer=value)


SPOIL = {  # what a damaged disk or another program may leave in the best.pt of a run that has not ended
    "momentum of another shape": spoil_momentum(torch.zeros(3)),
    "momentum that is not a tensor": spoil_momentum("none"),
    "another optimiser": lambda facts: facts["last"]["optimizer"]["param_groups"][0].update(params=[0]),
    "no optimiser": lambda facts: facts["last"].update(optimizer=None),
    "without optimiser": lambda facts: facts["last"].pop("optimizer"),
    "another network": lambda facts: facts["last"].update(model=models.build("squeezenet1_1", 2, 32).state_dict()),
    "no network": lambda facts: facts["last"].pop("model"),
    "last is a number": lambda facts: facts.update(last=1),
    "an absurd history": lambda facts: facts.update(history=[1, 2]),
    "an empty history": lambda facts: facts.update(history=[]),
    "config is a list": lambda facts: facts.update(config=[1]),
    "config is empty": lambda facts: facts.update(config={}),
    **{f"without {name}": lambda facts, name=name: facts.pop(name) for name in sorted(models.RUN_FACTS)},
}


@pytest.mark.parametrize("kind", SPOIL)
def test_a_run_does_not_resume_from_a_spoiled_file(runs, kind):
    saved = torch.load("run/best.pt", weights_only=True)
    assert len(saved["facts"]["history"]) == 1 and "optimizer" in saved["facts"]["last"]
    SPOIL[kind](saved["facts"])
    torch.save(saved, "run/best.pt")
    assert refused(run, "--out", "run").startswith("run")


def test_an_archive_cannot_write_outside_its_folder(tmp_path, monkeypatch):
    with zipfile.ZipFile("set.zip", "w") as archive:
        for name in ("../outside.txt", "/absolute.txt", "a/../../up.txt", "train/NORMAL/inside.txt"):
            archive.writestr(name, "text")
    digest = hashlib.sha256(Path("set.zip").read_bytes()).hexdigest()
    monkeypatch.setattr(data, "URL", (tmp_path / "set.zip").as_uri())
    monkeypatch.setattr(data, "SHA256", digest)
    data.download("deep/images")
    inside = {path.relative_to("deep/images").as_posix() for path in Path("deep/images").rglob("*.txt")}
    assert inside == {"train/NORMAL/inside.txt"}
    assert not Path("/absolute.txt").exists() and {p.name for p in Path("deep").iterdir()} == {"images"}
