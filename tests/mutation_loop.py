"""Spoil images, CSVs, checkpoints and caches at random: each must be refused in one line, be made again, or
give the very numbers of the whole file. Too slow for the suite:

    python tests/mutation_loop.py --mutations 500
"""

import contextlib
import io
import os
import random
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import torch  # noqa: E402
from conftest import asked_for, film  # noqa: E402

import data  # noqa: E402
import models  # noqa: E402

HEADER = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position\n"


def spoil(content):
    """Flip bits, cut off, blank out, insert, or take another file's place."""
    content, kind = bytearray(content), random.randrange(6)
    at = random.randrange(max(1, len(content)))
    if kind == 0:
        for _ in range(random.choice((1, 1, 5, 50))):
            content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    elif kind == 1:
        del content[at:]
    elif kind == 2:
        content[at : at + 100] = bytes(len(content[at : at + 100]))
    elif kind == 3:
        content[at:at] = os.urandom(random.choice((1, 10, 1000)))
    elif kind == 4:
        content[:16] = os.urandom(16)
    else:
        starts = (b"", b"\n", b"PK\x03\x04", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"{}")
        content = bytearray(random.choice(starts))
    return bytes(content)


def images():
    """A spoiled film may still be a picture; then it must be one of the right shape."""
    path = random.choice(sorted(Path("films").rglob("*.png")) + sorted(Path("films").rglob("*.jpeg")))
    return path, lambda: data.load("films", 16, ("test",), cache=tempfile.mkdtemp(dir=".")).test.images.shape


def tables():
    """A spoiled CSV may say other things; then they must be labels of 0 and 1 for films that are there."""

    def read():
        films, names = data.list_films("nih")
        return {len(f.label) for f in films} <= {len(names)} and all(set(f.label) <= {0, 1} for f in films)

    return Path("nih/Data_Entry_2017.csv"), read


def checkpoints():
    def read():
        model, facts = models.load_checkpoint("run/best.pt")
        return [float(value.double().sum()) for value in model.state_dict().values()], facts["classes"]

    return Path("run/best.pt"), read


def caches():
    path = next(Path("cache").iterdir())
    return path, lambda: int(data.load("films", 16, ("test",)).test.images.long().sum())


def main():
    mutations = asked_for("mutation_loop.py", __doc__, "mutations", 500)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.chdir(tempfile.mkdtemp())
    for i in range(6):
        name = ("NORMAL", "PNEUMONIA")[i % 2]
        film(Path(f"films/train/{name}/a{i}.png"))
        film(Path(f"films/test/{name}/b{i}.{'png' if i < 3 else 'jpeg'}"))
        film(Path(f"nih/images/{i}.png"))
    rows = "".join(f"{i}.png,{'Mass|Edema' if i % 2 else 'No Finding'},0,{i},50,M,PA\n" for i in range(6))
    Path("nih/Data_Entry_2017.csv").write_text(HEADER + rows)
    Path("nih/test_list.txt").write_text("4.png\n5.png\n")
    models.save_checkpoint("run/best.pt", models.build("squeezenet1_1", 2, 32), classes=["a", "b"])
    data.load("films", 16, ("test",))

    kinds = {images: 0, tables: 0, checkpoints: 0, caches: 0}
    refused = passed = 0
    for i in range(mutations):
        kind = list(kinds)[i % 4]
        path, read = kind()
        content, clean = path.read_bytes(), read()
        path.write_bytes(spoil(content))
        start = time.perf_counter()
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                found = read()
            # A spoiled CSV that is still a CSV says something else; all the rest must say the same.
            assert found == clean, f"{path}: {found} instead of {clean}"
            passed += 1
        except (data.UserError, OSError) as error:
            assert "\n" not in str(error) and str(error), repr(error)
            refused += 1
        assert time.perf_counter() - start < 10, f"{path} hangs"
        path.write_bytes(content)
        kinds[kind] += 1
    told = ", ".join(f"{n} {kind.__name__}" for kind, n in kinds.items())
    print(f"{told}: {refused} refused in one line, {passed} read with the right numbers or made again")


if __name__ == "__main__":
    main()
