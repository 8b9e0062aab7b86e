"""What must hold when things go wrong: full disks, damaged files, signals, pictures that are no films."""

import hashlib
import os
import resource
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import SMALL, film, fit
from torchvision.io import write_png

import data
import evaluate
import models
import train


def test_a_full_disk_leaves_the_last_good_checkpoint_whole_and_says_so(tmp_path):
    """A limit on the size of files is a disk that fills up in the middle of writing."""
    models.save_checkpoint("best.pt", models.build("squeezenet1_1", 2, 32), epoch=1)
    good = Path("best.pt").read_bytes()
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(data.UserError, match="best.pt could not be written.*is whole.*make room"):
            models.save_checkpoint("best.pt", models.build("squeezenet1_1", 2, 32), epoch=2)
        with pytest.raises(data.UserError, match="could not be written"):
            data.table("cache", "t", [], (1000, 1000), "float32", lambda block, start: block.fill(0))
        with pytest.raises(data.UserError, match="phantoms.png could not be written"):
            data.show_phantoms("phantoms.png")
        record = {"model": models.build("squeezenet1_1", 2, 32).eval(), "at": {}, "folder": "run",
                  "facts": {"size": 32, "provenance": {}}, "data": data.load("phantoms", 32)}  # fmt: skip
        with pytest.raises(data.UserError, match="student.pt2 could not be written"):
            evaluate.export("student.pt2", record)
        assert not Path("phantoms.png").exists() and not Path("student.pt2").exists()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert Path("best.pt").read_bytes() == good and models.load_checkpoint("best.pt")[1]["epoch"] == 1
    assert not list(Path().rglob("*.part"))


def test_a_single_bit_flipped_in_the_weights_is_noticed(tmp_path):
    models.save_checkpoint("best.pt", models.build("squeezenet1_1", 2, 32))
    content = bytearray(Path("best.pt").read_bytes())
    content[len(content) // 2] ^= 1
    Path("best.pt").write_bytes(content)
    with pytest.raises(data.UserError, match="best.pt is not a readable file of weights.*checksum"):
        models.load_checkpoint("best.pt")


def test_what_a_killed_process_left_half_written_is_cleared_away_and_a_living_ones_is_not(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for pid in (dead.pid, os.getppid()):
        Path(f".file.{pid}.part").touch()
    with data.atomic("file") as part:
        part.write_text("whole")
    assert Path("file").read_text() == "whole"
    assert [path.name for path in Path().glob(".file.*")] == [f".file.{os.getppid()}.part"]


def test_a_polite_kill_says_after_which_epoch_the_same_command_goes_on(tmp_path):
    code = (
        "import data, train\n"
        "data.PHANTOMS = {'train': (24, 11), 'val': (12, 12), 'test': (16, 13)}\n"
        "train.SAVE_SECONDS = 0\n"
        "data.run(train.main)\n"
    )
    Path("patched.py").write_text(code)
    env = {**os.environ, "PYTHONPATH": str(Path(train.__file__).parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "patched.py", "--role", "teacher", *SMALL, "--epochs", "10000", "--out", "run"]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(400):
        time.sleep(0.1)
        if Path("run/last.pt").exists():
            break
    process.terminate()
    _, err = process.communicate(timeout=30)
    epoch = models.load_checkpoint("run/last.pt")[1]["epoch"]
    assert process.returncode == 130 and f"goes on after epoch {epoch:g} of run" in err
    assert "Traceback" not in err


def png(path, width, height):
    """A PNG whose header claims so many pixels, all its checksums right."""
    write_png(torch.zeros(1, 9, 9, dtype=torch.uint8), str(path))
    content = bytearray(path.read_bytes())
    content[16:24] = width.to_bytes(4) + height.to_bytes(4)
    content[29:33] = data.zlib.crc32(content[12:29]).to_bytes(4)
    path.write_bytes(content)


@pytest.mark.parametrize("name, says", [
    ("huge.png", "60000 x 60000 pixels are no film"),
    ("dot.png", "1 x 1 pixels are no film"),
    ("empty.jpeg", "neither a JPEG nor a PNG"),
    ("cut.jpeg", "unreadable"),
    ("text.jpeg", "neither a JPEG nor a PNG"),
    ("damaged.png", "a damaged PNG"),
])  # fmt: skip
def test_what_is_no_film_is_named_in_one_line_and_never_decoded(kermany, name, says):
    path = kermany / "test/NORMAL" / name
    if name == "huge.png":
        png(path, 60000, 60000)
    elif name == "dot.png":
        write_png(torch.zeros(1, 1, 1, dtype=torch.uint8), str(path))
    else:
        whole = film(path.with_name("x" + path.suffix)).read_bytes()
        path.with_name("x" + path.suffix).unlink()
        damaged = whole[:60] + bytes([whole[60] ^ 255]) + whole[61:]
        contents = {"empty": b"", "cut": whole[:40], "text": b"not a picture", "damaged": damaged}
        path.write_bytes(contents[path.stem])
    with pytest.raises(data.UserError) as error:
        data.load(kermany, 16, ("test",))
    assert name in str(error.value) and "\n" not in str(error.value)
    assert says == "unreadable" or says in str(error.value)


def test_a_cmyk_jpeg_one_with_a_wrong_suffix_and_one_with_padding_are_films_like_others(kermany):
    image = pytest.importorskip("PIL.Image")
    image.new("CMYK", (30, 20), (0, 0, 0, 0)).save(kermany / "test/NORMAL/cmyk.jpeg")
    film(kermany / "test/NORMAL/IM-0900-0001.png", shade=99).rename(kermany / "test/NORMAL/IM-0900-0001.jpeg")
    padded = film(kermany / "test/NORMAL/padded.jpeg", shade=120)
    padded.write_bytes(padded.read_bytes().replace(b"\xff\xc0", b"\xff\xff\xff\xc0"))  # as the format allows
    test = data.load(kermany, 16, ("test",)).test
    shades = dict(zip((Path(id).name for id in test.ids), test.images.float().mean((1, 2, 3)), strict=True))
    assert shades["IM-0900-0001.jpeg"] == 99 and shades["cmyk.jpeg"] > 200  # no ink is white
    assert shades["padded.jpeg"] == 120


def test_a_film_that_lies_in_two_splits_is_told(kermany, capsys):
    same = film(kermany / "train/NORMAL/IM-0700-0001.jpeg", side=60)
    (kermany / "test/NORMAL/IM-0800-0001.jpeg").write_bytes(same.read_bytes())
    data.load(kermany, 16, ("train", "val", "test"))
    assert "1 films of test are exact copies of films in" in capsys.readouterr().err


def test_weights_that_are_not_finite_teach_nobody(few_phantoms):
    fit("--out", "teacher")
    model, facts = models.load_checkpoint("teacher")
    model.classifier[1].bias.data[0] = float("nan")
    models.save_checkpoint("teacher/best.pt", model, **facts)
    with pytest.raises(data.UserError, match="finite teacher needed, found NaN"):
        fit("--teacher", "teacher", "--out", "student", role="student")
    assert not Path("student").exists()


def test_an_archive_cannot_write_outside_its_folder(tmp_path):
    with zipfile.ZipFile("set.zip", "w") as archive:
        for name in ("../outside.txt", "/absolute.txt", "a/../../up.txt", "train/NORMAL/inside.txt"):
            archive.writestr(name, "text")
    digest = hashlib.sha256(Path("set.zip").read_bytes()).hexdigest()
    data.download("deep/films", (tmp_path / "set.zip").as_uri(), digest)
    inside = {path.relative_to("deep/films").as_posix() for path in Path("deep/films").rglob("*.txt")}
    assert inside == {"outside.txt", "absolute.txt", "a/up.txt", "train/NORMAL/inside.txt"}
    assert not Path("/absolute.txt").exists() and {p.name for p in Path("deep").iterdir()} == {"films"}
