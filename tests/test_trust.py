"""What must hold when things go wrong: full disks, damaged files, signals, files that are no images."""

import hashlib
import resource
import shutil
import signal
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, few_phantoms_of, fit, image_file
from PIL import Image

import data
import evaluate
import models
import train


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
        data.run(write)
    assert str(end.value).startswith("error: ") and "\n" not in str(end.value)
    return str(end.value)


def test_a_full_disk_leaves_the_last_good_checkpoint_whole_and_says_so_in_one_line(tmp_path):
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
    lambda: data.table(Path("cache/t.npy"), 1000, (np.zeros((500, 1000), "float32") for _ in range(2))),
    lambda: data.show_phantoms("phantoms.png", n=3),
    lambda: evaluate.write_json("all.json", list(range(100_000))),
], ids=["table", "picture", "json"])  # fmt: skip
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
                data.run(lambda: fit("--out", "run"))
    finally:
        signal.signal(signal.SIGINT, handler)
    assert str(end.value) == "stopped; train.py goes on from the epoch it saved last, at most 20 s ago"
    fit("--out", "run")
    assert "going on after epoch 1" in capsys.readouterr().out
    assert len(Path("run/history.csv").read_text().splitlines()) == 3 and not list(Path("run").glob(".*"))


# ---- images


@pytest.mark.parametrize("name", ["huge.png", "empty.jpeg", "cut.jpeg", "text.jpeg", "damaged.png"])
def test_what_is_no_image_is_named_in_one_line_and_never_decoded(kermany, name):
    path = kermany / "test/NORMAL" / name
    whole = image_file(path).read_bytes()
    if name == "huge.png":  # its header claims 60000 x 60000 pixels, all its checksums right
        whole = whole[:16] + 2 * (60000).to_bytes(4) + whole[24:]
        whole = whole[:29] + data.zipfile.crc32(whole[12:29]).to_bytes(4) + whole[33:]
    damaged = whole[:60] + bytes([whole[60] ^ 255]) + whole[61:]
    contents = {"huge": whole, "empty": b"", "cut": whole[: len(whole) // 2], "text": b"no picture",
                "damaged": damaged}
    path.write_bytes(contents[path.stem])
    with pytest.raises(data.UserError, match=f"1 of 13 images cannot be read.*{name}") as error:
        data.load(kermany, 16, ("test",))
    assert "\n" not in str(error.value)


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
    model = models.build("squeezenet1_1", 2, 32)
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
        fit("--out", "teacher", "--epochs", "1")
        patched.setattr(train, "SAVE_SECONDS", 0)
        patched.setattr(train, "describe_epoch", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fit("--out", "run")
        return Path.cwd()


@pytest.fixture
def runs(trained, few_phantoms):
    shutil.copytree(trained, ".", dirs_exist_ok=True)


def spoil_facts(name, value=None):
    content = torch.load("teacher/best.pt", weights_only=True)
    facts = {k: v for k, v in content["facts"].items() if k != name}
    torch.save({**content, "facts": facts if value is None else {**facts, name: value}}, "teacher/best.pt")


def teach():
    """What train.py does with a teacher, without the epochs that follow."""
    args = train.get_args(["--role", "student", *SMALL, "--teacher", "teacher", "--out", "student"])
    train.load_teachers(args, data.load_as(vars(args), 32, ("train", "val"), "cache"), torch.device("cpu"))


def told(call):
    """What the user is told, in one line; "" if it simply works."""
    try:
        call()
    except (data.UserError, OSError) as error:
        assert str(error) and "\n" not in str(error)
        return str(error)
    return ""


FACTS = ["arch", "num_classes", "aux", "transform_input", "size", *models.RUN_FACTS]


def test_every_fact_of_a_checkpoint_is_taken_out_below(runs):
    assert set(models.load_checkpoint("teacher")[1]) == {*FACTS, "input", "first_weights", "sha256"}


@pytest.mark.parametrize("name", FACTS)
def test_a_checkpoint_that_lacks_a_fact_is_one_line_wherever_it_is_needed(runs, name, capsys):
    spoil_facts(name)
    lines = [told(read) for read in (lambda: models.load_checkpoint("teacher"), teach,
                                     lambda: evaluate.main(["teacher", "--grid"]))]
    assert all("teacher/best.pt is not a checkpoint of this project" in line for line in lines)


@pytest.mark.parametrize("name, value", [
    ("arch", "resnet999"), ("arch", 7), ("arch", "resnet18"), ("num_classes", 3), ("num_classes", -1),
    ("num_classes", 10**13), ("num_classes", "two"), ("size", 0), ("size", "32"), ("size", 10**6),
    ("classes", 2), ("classes", ["a", "b"]), ("seen_groups", 5), ("args", {}), ("args", [1]),
    ("validation", {}), ("validation", 0.5),
])  # fmt: skip
def test_a_checkpoint_with_absurd_facts_is_one_line(runs, name, value, capsys):
    spoil_facts(name, value)
    lines = [told(lambda: evaluate.main(["teacher"])), told(teach)]
    assert all("teacher" in line for line in lines if line) and any(lines)


@pytest.mark.parametrize("content", [
    {}, [1, 2], "text", {"format": 3}, {"format": 3, "model": {}, "facts": {}}, {"format": 2, "model": {}, "facts": {}},
    {"format": 3, "model": 5, "facts": {}}, {1: torch.zeros(2)}, {"weight": torch.zeros(2)},
    {"format": torch.zeros(2), "model": {}, "facts": {}}, {"model": {}, "facts": {}},
])  # fmt: skip
def test_a_file_of_something_else_is_no_checkpoint_nor_anything_to_start_from(tmp_path, content):
    torch.save(content, "other.pt")
    for read in (models.load_checkpoint, lambda path: models.build("squeezenet1_1", 2, 32, path)):
        with pytest.raises(data.UserError, match="other.pt") as error:
            read("other.pt")
        assert "\n" not in str(error.value)


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
        return {**saved, "model": models.build("resnet18", 2, 32).state_dict()}
    elif kind == "best.pt in its place":
        return torch.load("run/best.pt", weights_only=True)
    elif kind == "an absurd history":
        facts["history"] = [1, 2]
    elif kind.startswith("without "):
        del facts[kind.removeprefix("without ")]
    elif kind == "no facts":
        return {**saved, "facts": None}
    return {**saved, "facts": facts}


@pytest.mark.parametrize("kind", [
    "momentum of another shape", "momentum that is no tensor", "another optimiser", "no optimiser",
    "weights of another network", "best.pt in its place", "an absurd history", "without history", "without args",
    "without images", "without teachers", "without processes", "no facts",
])  # fmt: skip
def test_a_run_goes_on_from_no_last_pt_but_its_own(runs, kind):
    saved = torch.load("run/last.pt", weights_only=True)
    assert saved["facts"]["epoch"] == 1 and "optimizer" in saved["facts"]
    torch.save(spoiled(saved, kind), "run/last.pt")
    with pytest.raises(data.UserError, match="run/last.pt") as error:
        fit("--out", "run")
    assert "\n" not in str(error.value)


def test_weights_that_are_not_finite_teach_nobody(runs):
    model, facts = models.load_checkpoint("teacher")
    model.classifier[1].bias.data[0] = float("nan")
    models.save_checkpoint("teacher/best.pt", model, **facts)
    with pytest.raises(data.UserError, match="answers are not finite.*Use another --teacher"):
        fit("--teacher", "teacher", "--out", "student", role="student")
    assert not Path("student").exists()


def test_an_archive_cannot_write_outside_its_folder(tmp_path):
    with zipfile.ZipFile("set.zip", "w") as archive:
        for name in ("../outside.txt", "/absolute.txt", "a/../../up.txt", "train/NORMAL/inside.txt"):
            archive.writestr(name, "text")
    digest = hashlib.sha256(Path("set.zip").read_bytes()).hexdigest()
    data.download("deep/images", (tmp_path / "set.zip").as_uri(), digest)
    inside = {path.relative_to("deep/images").as_posix() for path in Path("deep/images").rglob("*.txt")}
    assert inside == {"outside.txt", "absolute.txt", "a/up.txt", "train/NORMAL/inside.txt"}
    assert not Path("/absolute.txt").exists() and {p.name for p in Path("deep").iterdir()} == {"images"}
