"""What must hold when things go wrong: full disks, damaged files, signals, files that are no images."""

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
from conftest import few_phantoms_of, image_file, run, TINY
from PIL import Image

import data
import evaluate
import models
import train


def tiny():
    return models.build("tiny", 2, 32)


@contextmanager
def full_disk(bytes_left):
    """A limit on the size of files is a disk that fills up in the middle of writing."""
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)


def one_line(write):
    """What a script says and exits with when `write` fails: one line."""
    with pytest.raises(SystemExit) as end:
        data.cli(write)
    assert str(end.value).startswith("error: ") and "\n" not in str(end.value)
    return str(end.value)


def refused(call, *args):
    """What a user is told: one line."""
    with pytest.raises(data.UserError) as error:
        call(*args)
    assert str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def test_a_full_disk_leaves_the_last_good_checkpoint_whole_and_says_so_in_one_line():
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
    lambda: data.cached_array(Path("cache/t.npy"), 1000, (np.zeros((500, 1000), "float32") for _ in range(2))),
    lambda: evaluate.write_picture("noise.png", torch.randint(0, 256, (3, 300, 300), dtype=torch.uint8)),
    lambda: evaluate.write_json("all.json", list(range(100_000))),
    lambda: evaluate.write_csv("all.csv", ["n"], ([i] for i in range(100_000))),
], ids=["array", "picture", "json", "csv"])  # fmt: skip
def test_a_full_disk_leaves_no_half_file_and_is_one_line(write):
    with full_disk(100_000):
        assert "File too large" in one_line(write)
    assert not [path for path in Path().rglob("*") if path.is_file()]


def test_ctrl_c_says_that_the_same_command_goes_on_and_it_does(few_phantoms, monkeypatch, capsys):
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with monkeypatch.context() as patched:
            patched.setattr(train, "describe_epoch", lambda *_: signal.raise_signal(signal.SIGINT))
            with pytest.raises((SystemExit, KeyboardInterrupt)) as end:
                data.cli(lambda: run("--out", "run"))
    finally:
        signal.signal(signal.SIGINT, handler)
    assert str(end.value) == "stopped; train.py goes on from the epoch it saved last"
    run("--out", "run")
    assert "going on after epoch 1" in capsys.readouterr().out
    assert len(Path("run/history.csv").read_text().splitlines()) == 3 and not list(Path("run").glob(".*"))


# ---- images


@pytest.mark.parametrize("name", ["huge.png", "empty.jpeg", "cut.jpeg", "text.jpeg", "damaged.png"])
def test_what_is_no_image_is_named_in_one_line(kermany, name):
    path = kermany / "test/NORMAL" / name
    whole = image_file(path).read_bytes()
    if name == "huge.png":  # its header claims 60000 x 60000 pixels, all its checksums right
        whole = whole[:16] + 2 * (60000).to_bytes(4) + whole[24:]
        whole = whole[:29] + zlib.crc32(whole[12:29]).to_bytes(4) + whole[33:]
    damaged = whole[:60] + bytes([whole[60] ^ 255]) + whole[61:]
    contents = {"huge": whole, "empty": b"", "cut": whole[: len(whole) // 2], "text": b"no picture",
                "damaged": damaged}
    path.write_bytes(contents[path.stem])
    said = refused(data.load, kermany, 16, ("test",))
    assert f"{name} cannot be read. Repair or remove it" in said


def test_a_cmyk_jpeg_one_with_a_wrong_suffix_and_one_with_padding_are_images_like_others(kermany):
    Image.new("CMYK", (30, 20), (0, 0, 0, 0)).save(kermany / "test/NORMAL/cmyk.jpeg")
    image_file(kermany / "test/NORMAL/IM-0900-0001.png", shade=99).rename(kermany / "test/NORMAL/IM-0900-0001.jpeg")
    padded = image_file(kermany / "test/NORMAL/padded.jpeg", shade=120)
    padded.write_bytes(padded.read_bytes().replace(b"\xff\xc0", b"\xff\xff\xff\xc0"))  # as the format allows
    test = data.load(kermany, 16, ("test",)).test
    shades = dict(zip((Path(id).name for id in test.ids), test.images.float().mean((1, 2, 3)), strict=True))
    assert shades["IM-0900-0001.jpeg"] == 99 and shades["cmyk.jpeg"] > 200  # no ink is white
    assert shades["padded.jpeg"] == 120


# ---- checkpoints


def test_the_same_weights_saved_under_two_names_are_the_same_bytes_and_known_by_their_hash(tmp_path):
    model = tiny()
    for path in ("best.pt", "elsewhere/other name.pt"):
        models.save_checkpoint(path, model, epoch=3)
    content = Path("best.pt").read_bytes()
    assert content == Path("elsewhere/other name.pt").read_bytes()
    assert models.load_checkpoint("best.pt")[1]["sha256"] == hashlib.sha256(content).hexdigest()
    models.save_checkpoint("best.pt", model, epoch=4)
    other = models.load_checkpoint("best.pt")[1]["sha256"]
    assert other == hashlib.sha256(Path("best.pt").read_bytes()).hexdigest() != hashlib.sha256(content).hexdigest()


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
    """What train.py does with a teacher, without the epochs that follow."""
    args = train.get_args(["--role", "student", *TINY, "--teacher", "teacher", "--out", "student"])
    train.load_teachers(args, data.load_as(vars(args), 32, ("train", "val"), "cache"), torch.device("cpu"))


def judge():
    evaluate.main(["teacher"])


OF_THE_NETWORK = {"arch", "num_classes", "aux", "transform_input"}
OF_THE_RUN = models.RUN_FACTS | {"size"}


def test_every_fact_that_is_read_is_taken_out_below(runs):
    others = {"input", "first_weights", "from_run", "body_loaded", "sha256"}
    assert models.load_run("teacher")[1].keys() == OF_THE_NETWORK | OF_THE_RUN | others


@pytest.mark.parametrize("name", sorted(OF_THE_NETWORK | OF_THE_RUN))
def test_a_run_that_lacks_a_fact_is_one_line_that_names_it_for_its_student_and_for_its_judge(runs, name):
    spoil_facts(name)
    why = "is not a checkpoint of this project" if name in OF_THE_NETWORK else "was not made by train.py"
    for use in (teach, judge):
        said = refused(use)
        assert re.match(rf"teacher(/best.pt)? {why}", said) and name in said


@pytest.mark.parametrize("name, value", [
    ("arch", "resnet999"), ("arch", 7), ("arch", "resnet18"), ("num_classes", 3), ("num_classes", -1),
    ("num_classes", 10**13), ("num_classes", "two"), ("classes", ["a", "b"]), ("args", {}), ("args", [1]), ("args", None), ("size", None),
])  # fmt: skip
def test_a_run_that_claims_another_network_or_other_classes_is_one_line(runs, name, value):
    spoil_facts(name, value)
    for use in (teach, judge):
        said = refused(use)
        assert "teacher" in said or "no network is called" in said


@pytest.mark.parametrize("content", [
    {}, [1, 2], "text", {"format": 4}, {"format": 4, "model": {}, "facts": {}}, {"format": 3, "model": {}, "facts": {}},
    {"format": 4, "model": 5, "facts": {}}, {1: torch.zeros(2)}, {"weight": torch.zeros(2)},
    {"format": torch.zeros(2), "model": {}, "facts": {}}, {"model": {}, "facts": {}},
])  # fmt: skip
def test_a_file_of_something_else_is_no_checkpoint_nor_anything_to_start_from(content):
    torch.save(content, "other.pt")
    for read in (models.load_checkpoint, lambda path: models.build("tiny", 2, 32, path)):
        assert "other.pt" in refused(read, "other.pt")


# ---- a mistake of ours is a traceback


def mistake(*_, **__):
    return a_name_that_nobody_gave  # noqa: F821


@pytest.mark.parametrize("module, name", [
    (train, "metrics"), (train, "distillation_loss"), (train, "forward"), (train, "finished"),
    (train, "random_affines"), (models, "freeze"), (models, "replace_heads"), (models, "residuals"),
], ids=lambda value: value if isinstance(value, str) else value.__name__)  # fmt: skip
def test_a_mistake_of_ours_in_training_comes_out_as_itself(module, name, few_phantoms, monkeypatch):
    monkeypatch.setattr(module, name, mistake)
    with pytest.raises(NameError, match="a_name_that_nobody_gave"):
        data.cli(lambda: run("--augment", "--input", "residual"))


@pytest.mark.parametrize("module, name", [
    (evaluate, "measure"), (evaluate, "forward"), (evaluate, "cost"), (models, "bare_network"),
    (models, "replace_heads"),
], ids=lambda value: value if isinstance(value, str) else value.__name__)  # fmt: skip
def test_a_mistake_of_ours_in_judging_comes_out_as_itself(module, name, runs, monkeypatch):
    monkeypatch.setattr(module, name, mistake)
    with pytest.raises(NameError, match="a_name_that_nobody_gave"):
        data.cli(judge)


def test_a_mistake_of_ours_while_going_on_comes_out_as_itself(runs, monkeypatch):
    monkeypatch.setattr(train, "finished", mistake)
    with pytest.raises(NameError, match="a_name_that_nobody_gave"):
        data.cli(lambda: run("--out", "run"))


def test_a_mistake_in_an_own_networks_code_is_no_wrong_size(monkeypatch):
    class Own(torch.nn.Module):
        forward = mistake

        def __init__(self):
            super().__init__()
            self.last = torch.nn.Linear(3, 1000)

    monkeypatch.setitem(models.NETWORKS, "own", Own)
    with pytest.raises(NameError, match="a_name_that_nobody_gave"):
        models.build("own", 2, 32)


def test_what_a_damaged_file_raised_is_kept_as_the_cause(runs):
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


# ---- going on


def spoiled(saved, kind):
    """last.pt as a damaged disk, another program or a mistaken copy may leave it."""
    facts = {**saved["facts"]}
    if kind == "momentum of another shape":
        facts["optimizer"]["state"][0]["momentum_buffer"] = torch.zeros(3)
    elif kind == "momentum that is no tensor":
        facts["optimizer"]["state"][0]["momentum_buffer"] = "none"
    elif kind == "another optimiser":
        facts["optimizer"]["param_groups"][0]["params"] = [0]
    elif kind == "no optimiser":
        facts["optimizer"] = None
    elif kind == "weights of another network":
        return {**saved, "model": models.build("squeezenet1_1", 2, 32).state_dict()}
    elif kind == "best.pt in its place":
        return torch.load("run/best.pt", weights_only=True)
    elif kind == "an absurd history":
        facts["history"] = [1, 2]
    elif kind == "no history":
        facts["history"] = []
    elif kind.startswith("without "):
        del facts[kind.removeprefix("without ")]
    elif kind == "no facts":
        return {**saved, "facts": None}
    return {**saved, "facts": facts}


@pytest.mark.parametrize("kind", [
    "momentum of another shape", "momentum that is no tensor", "another optimiser", "no optimiser",
    "weights of another network", "best.pt in its place", "an absurd history", "no history", "without history",
    "without made", "without optimizer", "no facts",
])  # fmt: skip
def test_a_run_goes_on_from_no_last_pt_but_its_own(runs, kind):
    saved = torch.load("run/last.pt", weights_only=True)
    assert len(saved["facts"]["history"]) == 1 and "optimizer" in saved["facts"]
    torch.save(spoiled(saved, kind), "run/last.pt")
    assert "run/last.pt" in refused(run, "--out", "run")


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
