"""Spoil images, CSVs, checkpoints, first weights and caches at random: each must be refused in one line, or be
read as what it still is: an image of the right shape, labels of 0 and 1, weights of the same network, the very
pixels of the whole cache. No pixel or weight has a checksum, so a cache is spoiled in its header alone, or cut
off. Any other exception is one that data.explain does not know of. Too slow for the suite:

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
from conftest import NIH_HEADER, asked_for, image_file  # noqa: E402

import data  # noqa: E402
import models  # noqa: E402


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
    """A spoiled image may still be a picture; then it must be one of the right shape."""
    path = random.choice(sorted(Path("images").rglob("*.png")) + sorted(Path("images").rglob("*.jpeg")))
    return path, lambda: data.load("images", 16, ("test",), cache=tempfile.mkdtemp(dir=".")).test.images.shape


def tables():
    """A spoiled CSV may say other things; then they must be labels of 0 and 1 for images that are there."""

    def read():
        records, names = data.list_images("nih")
        return all(len(r["label"]) == len(names) and set(r["label"]) <= {0, 1} for r in records)

    return random.choice((Path("nih/Data_Entry_2017.csv"), Path("nih/test_list.txt"))), read


def shapes(model):
    return {name: value.shape for name, value in model.state_dict().items()}


def checkpoints():
    """A weight that was spoiled is another number; then it must be one of the same network."""
    return Path("run/best.pt"), lambda: shapes(models.load_checkpoint("run/best.pt")[0])


def first_weights():
    """The same of a plain state_dict, as torchvision and others publish them."""
    return Path("plain.pth"), lambda: shapes(models.build("squeezenet1_1", 2, 32, "plain.pth"))


def caches():
    path = next(Path("cache").iterdir())
    return path, lambda: data.load("images", 16, ("test",)).test.images.tolist()


def spoil_header(content):
    """As spoil, within the 128 bytes that say what follows; or the end is missing."""
    if random.randrange(4) == 0:
        return content[: random.randrange(len(content))]
    return spoil(content[:128]) + content[128:]


def main():
    mutations = asked_for("mutation_loop.py", __doc__, "mutations", 500)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.chdir(tempfile.mkdtemp())
    for i in range(6):
        name = ("NORMAL", "PNEUMONIA")[i % 2]
        image_file(Path(f"images/train/{name}/a{i}.png"))
        image_file(Path(f"images/test/{name}/b{i}.{'png' if i < 3 else 'jpeg'}"))
        image_file(Path(f"nih/images/{i}.png"))
    rows = "".join(f"{i}.png,{'Mass|Edema' if i % 2 else 'No Finding'},0,{i},50,M,PA,9,9,1,1,\n" for i in range(6))
    Path("nih/Data_Entry_2017.csv").write_text(NIH_HEADER + rows)
    Path("nih/train_val_list.txt").write_text("".join(f"{i}.png\n" for i in range(4)))
    Path("nih/test_list.txt").write_text("4.png\n5.png\n")
    models.save_checkpoint("run/best.pt", models.build("squeezenet1_1", 2, 32), classes=["a", "b"])
    torch.save(models.build("squeezenet1_1", 2, 32).state_dict(), "plain.pth")
    data.load("images", 16, ("test",))

    kinds = {images: 0, tables: 0, checkpoints: 0, first_weights: 0, caches: 0}
    refused = passed = 0
    for i in range(mutations):
        kind = list(kinds)[i % len(kinds)]
        path, read = kind()
        content = path.read_bytes()
        with contextlib.redirect_stdout(io.StringIO()):
            clean = read()
        path.write_bytes((spoil_header if kind is caches else spoil)(content))
        start = time.perf_counter()
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                found = read()
            assert found == clean, f"{path}: {found} instead of {clean}"
            passed += 1
        except (data.UserError, OSError) as error:
            assert "\n" not in str(error) and str(error), repr(error)
            refused += 1
        assert time.perf_counter() - start < 10, f"{path} hangs"
        path.write_bytes(content)
        kinds[kind] += 1
    told = ", ".join(f"{n} {kind.__name__}" for kind, n in kinds.items())
    print(f"{told}: {refused} refused in one line, {passed} read")


if __name__ == "__main__":
    main()
