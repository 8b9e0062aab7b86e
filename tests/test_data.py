"""What images must become, and what must never happen to them on the way."""

import csv
import hashlib
import http.client
import http.server
import math
import os
import pickle
import shutil
import struct
import subprocess
import sys
import threading
import time
import tokenize
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import image_file
from PIL import Image

import data
import evaluate
import train


def split_of(source, split="train", **options):
    return getattr(data.load(source, 32, (split,), **options), split)


def png(path, side, depth, colour, rows, extra=b""):
    """A PNG written by hand, all its checksums right; rows: of each its filter's number and its bytes."""
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, depth, colour, 0, 0, 0))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(b"".join(rows)))
                     + chunk(b"IEND", b""))
    return path


def deep_png(path, side, value):
    """A grey PNG of 16 bits, every pixel of one value."""
    return png(path, side, 16, 0, [b"\0" + struct.pack(f">{side}H", *[value] * side)] * side)


def known(split):
    """{id: label} of a split, without the labels that are unknown."""
    return {id: label for id, label in zip(split.ids, split.labels.tolist(), strict=True)
            if (label != -1 if isinstance(label, int) else not math.isnan(label[0]))}


# ---- phantoms


def test_the_same_seed_draws_the_same_phantoms():
    """Another seed draws others."""
    a, b, c = (data.phantoms(6, 40, seed)[0] for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_a_phantom_shows_the_same_chest_at_every_size():
    large, _, large_masks = data.phantoms(6, 128, 3)
    small, _, small_masks = data.phantoms(6, 64, 3)
    shrunk = torch.nn.functional.avg_pool2d(large.float(), 2)
    assert (shrunk - small.float()).abs().mean() < 4  # grey levels of 256
    assert (large_masks[:, ::2, ::2] == small_masks).float().mean() > 0.97


def test_phantoms_with_pneumonia_have_an_opacity():
    """The others have none, and the image is brighter at the opacity."""
    images, labels, masks = data.phantoms(40, 64, 5)
    assert torch.equal(masks.flatten(1).any(1), labels == 1)
    sick, well = images[labels == 1, 0].float(), images[labels == 0, 0].float()
    pairs = zip(sick, masks[labels == 1], strict=True)
    gain = torch.stack([image[mask].mean() - well[:, mask].mean() for image, mask in pairs])
    assert gain.mean() > 20  # grey levels of 256


# ---- class folders


def test_only_images_are_read_once_and_val_is_folded_into_train(kermany):
    records, names = data.list_images(kermany)
    assert names == ["NORMAL", "PNEUMONIA"]
    for key in ("split", "folder"):
        count = {(split, label): sum((r[key], r["label"]) == (split, label) for r in records)
                 for split in ("train", "val", "test") for label in (0, 1)}
        assert count == {("train", 0): 17, ("train", 1): 18, ("val", 0): 0, ("val", 1): 0,
                         ("test", 0): 4, ("test", 1): 8}


def test_an_archive_that_holds_one_folder_more_is_found(kermany):
    assert len(data.list_images(kermany.parent)[0]) == len(data.list_images(kermany)[0])


def test_patients_differ_by_number_and_kind(kermany):
    group = {os.path.basename(r["path"]): r["group"] for r in data.list_images(kermany)[0]}
    assert group["person1_bacteria_1.jpeg"] == group["person1_bacteria_2.jpeg"]
    assert group["person1_bacteria_1.jpeg"] != group["person1_virus_1.jpeg"]
    assert group["IM-0001-0001.jpeg"] != group["NORMAL2-IM-0001-0001.jpeg"]


def test_the_folder_one_is_in_is_read_like_any_other(kermany, monkeypatch):
    records, _ = data.list_images(str(kermany))
    monkeypatch.chdir(kermany)
    assert data.list_images(".")[0] == records


def test_three_classes_come_from_the_file_names(kermany):
    loaded = data.load(kermany, 16, ("test",), classes=3)
    assert loaded.classes == ["NORMAL", "BACTERIAL", "VIRAL"]
    assert loaded.test.labels.bincount().tolist() == [4, 4, 4]
    assert all(
        ("virus" in id) == (label == 2) for id, label in zip(loaded.test.ids, loaded.test.labels, strict=True)
    )


def test_bacteria_or_virus_comes_from_below_the_class(kermany):
    """A data set's own folder may have either word in its name."""
    before = data.load(kermany, 16, ("test",), classes=3).test
    kermany.rename(kermany.with_name("virus"))
    after = data.load(kermany.with_name("virus"), 16, ("test",), classes=3).test
    assert torch.equal(after.labels, before.labels) and after.groups == before.groups


def test_normal_is_class_zero_whatever_the_alphabet_says(tmp_path):
    for name in ("NORMAL", "COVID"):
        for split in ("train", "test"):
            image_file(tmp_path / f"set/{split}/{name}/a-{name}{split}.png")
    assert data.list_images(tmp_path / "set")[1] == ["NORMAL", "COVID"]


def test_all_files_become_one_grey_channel(tmp_path):
    for channels in (1, 3):
        path = image_file(tmp_path / f"{channels}.png", side=20, shade=77, channels=channels)
        assert torch.equal(data.decode(path, 8), torch.full((1, 8, 8), 77, dtype=torch.uint8))
    pixels = torch.randint(0, 256, (1, 32, 32), dtype=torch.uint8)
    path = png(tmp_path / "exact.png", 32, 8, 0, [b"\0" + bytes(row) for row in pixels[0].tolist()])
    assert torch.equal(data.decode(path, 32), pixels)


def test_images_of_one_name_in_train_and_test_are_two_images(tmp_path):
    for split in ("train", "test"):
        for name in ("NORMAL", "SICK"):
            for i in range(4):
                image_file(tmp_path / f"set/{split}/{name}/{i}.png")
    loaded = data.load(tmp_path / "set", 16, ("train", "val", "test"))
    assert not set(loaded.train.groups) & set(loaded.test.groups) and len(loaded.test.ids) == 8


def test_three_classes_are_not_guessed(kermany):
    """A name without bacteria or virus is refused."""
    image_file(kermany / "train/PNEUMONIA/child7.jpeg")
    with pytest.raises(data.UserError, match="child7.jpeg. Use --classes 2"):
        data.load(kermany, 16, classes=3)


def test_no_patient_is_in_two_splits(kermany):
    for path in [*kermany.glob("train/PNEUMONIA/person*_1*.jpeg"), *kermany.glob("train/NORMAL/IM*")]:
        image_file(path.with_stem(path.stem[:-1] + "77"))  # a second image of many a child
    loaded = data.load(kermany, 16, ("train", "val", "test"), val_fraction=0.3)
    groups = [set(getattr(loaded, p).groups) for p in ("train", "val", "test")]
    assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]
    assert len(loaded.train.ids) + len(loaded.val.ids) >= 35


def backwards(monkeypatch):
    """A disk that lists folders and files in another order."""
    glob, below = Path.glob, data.files_below
    monkeypatch.setattr(data, "files_below", lambda *a: list(below(*a))[::-1])
    monkeypatch.setattr(Path, "glob", lambda *a, **k: iter(sorted(glob(*a, **k), reverse=True)))


def test_validation_images_are_always_the_same(kermany, monkeypatch):
    """They do not change with the order of files or the seed."""
    before = split_of(kermany, "val").ids
    backwards(monkeypatch)
    torch.manual_seed(99)
    assert split_of(kermany, "val").ids == before


def test_validation_takes_its_share_of_every_class(kermany):
    assert split_of(kermany, "val", val_fraction=0.25).labels.bincount().tolist() in ([4, 4], [4, 5])


def test_test_is_not_opened_unless_asked_for(kermany):
    assert not hasattr(data.load(kermany, 16), "test")


def test_per_class_takes_at_most_so_many(kermany):
    loaded = data.load(kermany, 16, ("train", "val"), per_class=10)
    labels = torch.cat([loaded.train.labels, loaded.val.labels])
    assert labels.bincount().tolist() == [10, 10]
    whole = data.load(kermany, 16, ("train", "val"))
    assert set(loaded.train.ids) < set(whole.train.ids) and set(loaded.val.ids) < set(whole.val.ids)
    loaded = data.load(kermany, 16, ("train", "val"), per_class=18)  # there are 17 and 18
    assert torch.cat([loaded.train.labels, loaded.val.labels]).bincount().tolist() == [17, 18]
    loaded = data.load(kermany, 16, ("train", "val"), per_class=15)  # 13.5 and 1.5 of each
    assert torch.cat([loaded.train.labels, loaded.val.labels]).bincount().tolist() == [15, 15]
    loaded = data.load(kermany, 16, ("train", "val"), per_class=2, val_fraction=0.8)
    assert loaded.train.labels.bincount().tolist() == loaded.val.labels.bincount().tolist() == [1, 1]


# ---- the cache


def test_a_warm_start_decodes_nothing_and_gives_the_same_pixels(kermany, monkeypatch):
    cold = split_of(kermany)
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("decoded again"))
    warm = split_of(kermany)
    assert torch.equal(cold.images, warm.images) and cold.ids == warm.ids
    assert cold.images.shape == (len(cold.ids), 1, 32, 32) and cold.images.dtype == torch.uint8


def test_each_row_of_the_cache_is_its_own_image(kermany):
    split = split_of(kermany)
    for i, id in enumerate(split.ids):
        assert torch.equal(split.images[i], data.decode(kermany / id, 32))


def test_a_replaced_image_of_equal_length_is_noticed(kermany):
    path = image_file(kermany / "test/NORMAL/IM-0100-0001-0002.jpeg", shade=90)
    before, length = split_of(kermany, "test").images.clone(), path.stat().st_size
    image_file(path, shade=200)
    assert path.stat().st_size == length
    assert not torch.equal(split_of(kermany, "test").images, before)


@pytest.mark.parametrize("change", ["file", "size", "code"])
def test_a_changed_source_makes_the_cache_again(kermany, monkeypatch, change):
    before, size = split_of(kermany, "test"), 32
    pixels = before.images.clone()
    if change == "file":
        image_file(kermany / "test/NORMAL/IM-0100-0001-0002.jpeg", shade=200)
    elif change == "size":
        size = 16
    else:
        monkeypatch.setattr(data, "decode", darker)
        monkeypatch.setattr(data, "PIXELS", data.PIXELS + 1)
    after = data.load(kermany, size, ("test",)).test
    assert not torch.equal(pixels, after.images) and before.key != after.key
    assert len(list((kermany.parent / "cache").iterdir())) == 2


def darker(path, size, decode=data.decode):
    return decode(path, size) // 2


def test_phantoms_are_drawn_again_after_a_change_of_code(few_phantoms, monkeypatch):
    before = split_of("phantoms")
    pixels, real = before.images.clone(), data.draw_blocks
    monkeypatch.setattr(data, "draw_blocks", lambda *args: (255 - block for block in real(*args)))
    assert split_of("phantoms").key == before.key  # from the cache
    monkeypatch.setattr(data, "PIXELS", data.PIXELS + 1)
    after = split_of("phantoms")
    assert torch.equal(after.images, 255 - pixels) and after.key != before.key


def test_only_old_unfinished_files_are_removed_from_the_cache(kermany):
    Path("cache").mkdir()
    for name, minutes in ((".old.part", 61), (".young.part", 59)):
        Path("cache", name).write_bytes(b"half")
        os.utime(Path("cache", name), (time.time() - 60 * minutes,) * 2)
    split_of(kermany, cache="cache")
    assert [path.suffix or path.name for path in sorted(Path("cache").iterdir())] == [".part", ".npy"]
    assert Path("cache/.young.part").read_bytes() == b"half"


@pytest.mark.parametrize("restored", [False, True])
def test_negatives_of_the_same_names_and_lengths_are_other_pixels(kermany, restored):
    """Also where whatever replaced the files restored their modification times."""
    def save(pixels):
        for path in kermany.glob("train/*/[!._]*.jpeg"):
            times = path.stat().st_atime_ns, path.stat().st_mtime_ns
            Image.fromarray(pixels).save(path, "BMP")  # not compressed
            if restored:
                os.utime(path, ns=times)
        split = data.load(kermany, 16, ("train",))
        return split.fingerprints, split.train.key

    pixels = ramp(16, 16)
    (positive, key), (negative, other_key) = save(pixels), save(255 - pixels)
    assert {k for k in positive if positive[k] != negative[k]} == {"train_pixels"} and key != other_key


def test_other_pixels_under_equal_names_share_no_cache(tmp_path, monkeypatch):
    for shade, place in ((60, "a/xray"), (200, "b/xray")):
        for i, name in enumerate(("NORMAL", "SICK")):
            path = image_file(tmp_path / place / f"test/{name}/{i}.png", shade=shade)
            os.utime(path, ns=(0, 0))
        (tmp_path / place / "train").mkdir()
    a, b = (data.load(place, 16, ("test",), cache=str(tmp_path / "cache")).test for place in ("a/xray", "b/xray"))
    assert a.images.unique().tolist() == [60] and b.images.unique().tolist() == [200] and a.key != b.key
    monkeypatch.chdir("a")
    again = data.load("xray", 16, ("test",), cache=str(tmp_path / "cache")).test  # one place, typed otherwise
    assert again.key == a.key


@pytest.mark.parametrize("damage", ["empty", "cut in the header", "cut in the pixels", "no header", "fewer rows",
                                    "other rows", "longer", "another dtype", "another shape", "Fortran order"])
def test_a_damaged_cache_is_one_line_that_says_what_to_delete(kermany, damage):
    split_of(kermany, "test")
    path, = (kermany.parent / "cache").iterdir()
    whole = path.read_bytes()
    assert b"(12, 1, 32, 32)" in whole[:128] and len(whole) == 128 + 12 * 32 * 32
    path.write_bytes({"empty": b"", "cut in the header": whole[:60], "cut in the pixels": whole[:-1],
                      "no header": bytes(128) + whole[128:], "longer": whole + b"0",
                      "another dtype": whole.replace(b"|u1", b"|i1"),
                      "another shape": whole.replace(b"(12, 1, 32, 32)", b"(12, 1, 16, 64)"),
                      "Fortran order": whole.replace(b"False,", b"True, "),
                      "fewer rows": whole.replace(b"(12, 1, 32, 32)", b"(10, 1, 32, 32)"),
                      "other rows": whole.replace(b"(12, 1, 32, 32)", b"(12, 1, 32, 22)")}[damage])
    with pytest.raises(data.UserError, match=rf"{path.name} is damaged; delete it, and it is made again") as error:
        split_of(kermany, "test")
    assert "\n" not in str(error.value)
    path.unlink()
    split_of(kermany, "test")
    assert path.read_bytes() == whole


def test_an_array_is_written_in_several_blocks(tmp_path):
    """The blocks keep their order."""
    def blocks():
        for start in (0, 500, 1000):
            yield np.arange(start, min(start + 500, 1200), dtype=np.int32)[:, None].repeat(3, 1)

    made = data.cached_array(tmp_path / "rows.npy", "int32", (1200, 3), blocks())
    read = data.cached_array(tmp_path / "rows.npy", "int32", (1200, 3), (pytest.fail("computed again") for _ in range(1)))
    assert made.shape == (1200, 3) and torch.equal(made[:, 2], torch.arange(1200, dtype=torch.int32))
    assert torch.equal(read, made) and (np.load(tmp_path / "rows.npy") == made.numpy()).all()
    made[7] = 0  # pages in memory are ours, the file is not
    assert np.load(tmp_path / "rows.npy")[7, 0] == 7


def test_a_cache_that_could_not_be_finished_leaves_nothing_behind(kermany):
    (kermany / "test/NORMAL/IM-0100-0001-0002.jpeg").write_bytes(b"no picture")
    (kermany / "test/PNEUMONIA/person100_virus_100.jpeg").write_bytes(b"")
    with pytest.raises(data.UserError, match="IM-0100-0001-0002.jpeg cannot be read. Repair or remove it"):
        split_of(kermany, "test")
    assert list((kermany.parent / "cache").iterdir()) == []


@pytest.mark.parametrize("n, seed", [(24, 21), (16, 11)])
def test_other_phantoms_have_another_cache(monkeypatch, n, seed):
    """Their seed and number belong to its name."""
    for phantoms in ((24, 11), (n, seed)):
        monkeypatch.setattr(data, "PHANTOMS", {"train": phantoms, "val": (4, 12)})
        assert torch.equal(split_of("phantoms").images, data.phantoms(phantoms[0], 32, phantoms[1])[0])


def test_no_image_is_decoded_twice(kermany, monkeypatch):
    """Test images are not decoded for training."""
    decoded, decode = [], data.decode
    monkeypatch.setattr(data, "decode", lambda path, *a: (decoded.append(path), decode(path, *a))[1])
    sizes = set()
    for options in ({}, {"val_fraction": 0.2}, {"val_fraction": 0.4}, {"per_class": 6},
                    {"classes": 3, "labels_per_class": 1}):
        loaded = data.load(str(kermany), 32, **options)
        sizes.add((len(loaded.train.ids), len(loaded.val.ids)))
        for split in (loaded.train, loaded.val):
            for i, id in enumerate(split.ids):
                assert torch.equal(split.images[i], decode(kermany / id, 32))
    assert len(sizes) >= 4
    assert sorted(decoded) == sorted(str(path) for path in kermany.glob("[tv][ra]*/*/[!._]*.jpeg"))
    split_of(kermany, "test")
    assert len(decoded) == len(set(decoded)) == 47


# ---- decoding


def ramp(width, height):
    """A smooth grey picture, (height, width) uint8."""
    down, right = np.mgrid[0:1:height * 1j, 0:1:width * 1j]
    return (127 + 80 * np.sin(5 * right + 1) * np.cos(7 * down) + 40 * right).clip(0, 255).astype(np.uint8)


def test_a_16_bit_image_keeps_its_greys(tmp_path):
    path = deep_png(tmp_path / "deep.png", 8, 40000)  # of 65535
    for size in (8, 4):
        assert (data.decode(path, size).int() - round(40000 / 257)).abs().max() <= 1
    for value, grey in ((0, 0), (65535, 255), (4095, 15)):
        assert data.decode(deep_png(path, 8, value), 8).unique().tolist() == [grey]


def test_palettes_alpha_and_inks_become_grey(tmp_path):
    palette = b"".join(bytes([shade] * 3) for shade in (200, 10, 90))
    body = struct.pack(">I", len(palette)) + b"PLTE" + palette
    extra = body + struct.pack(">I", zlib.crc32(body[4:]))
    path = png(tmp_path / "palette.png", 6, 8, 3, [b"\0" + bytes([0, 1, 2] * 2)] * 6, extra)
    assert data.decode(path, 6)[0, 3].tolist() == [200, 10, 90] * 2  # not the numbers 0, 1, 2
    colour = np.array([120, 60, 30], np.uint8)
    grey = 0.299 * 120 + 0.587 * 60 + 0.114 * 30  # ITU-R 601-2
    for name, pixel in (("rgb", colour), ("rgba", [*colour, 128]), ("la", [81, 7])):
        pixels = np.broadcast_to(np.array(pixel, np.uint8), (6, 6, len(pixel)))
        Image.fromarray(np.ascontiguousarray(pixels)).save(tmp_path / f"{name}.png")
        shades = data.decode(tmp_path / f"{name}.png", 6).unique()
        assert len(shades) == 1 and abs(shades.item() - (81 if name == "la" else grey)) <= 1, name
    for ink, grey in ((0, 255), (255, 0)):  # black ink alone
        Image.new("CMYK", (30, 20), (0, 0, 0, ink)).save(tmp_path / "cmyk.jpeg")
        assert (data.decode(tmp_path / "cmyk.jpeg", 8).int() - grey).abs().max() <= 2


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("width, height, part", [(1280, 1024, 8), (384, 320, 4), (128, 64, 1)])
def test_a_large_jpeg_is_decoded_at_a_part_of_its_size(
    tmp_path, monkeypatch, mode, width, height, part
):
    """Its pixels are those of a full decoding."""
    pixels = ramp(width, height)
    Image.fromarray(pixels).convert(mode).save(tmp_path / "large.jpeg", quality=95)
    seen, resize = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, *a, **k: (seen.append(self.size), resize(self, *a, **k))[1])
    found = data.decode(tmp_path / "large.jpeg", 64)[0].float()
    assert seen == [(width // part, height // part)]  # never below the 64 asked for
    by_hand = torch.from_numpy(pixels).float().view(64, height // 64, 64, width // 64).mean((1, 3))
    assert (found - by_hand).abs().mean() < 1 and (found - by_hand).abs().max() < 6


@pytest.mark.parametrize("kind", ["an unknown filter", "no rows", "no zlib", "cut off", "another sum"])
def test_a_png_with_wrong_pixels_is_named(kermany, monkeypatch, kind):
    """Its checksums are right."""
    compress = zlib.compress  # its stream ends in a checksum of its own, which PNG's says nothing about
    spoil = {"no zlib": lambda body: b"nonsense" * 5, "cut off": lambda body: compress(body)[:12],
             "another sum": lambda body: compress(body)[:-1] + b"?"}
    monkeypatch.setattr(zlib, "compress", spoil.get(kind, compress))
    rows = [(b"\x63" if kind == "an unknown filter" else b"\0") + bytes(range(9))] * 9
    png(kermany / "test/NORMAL/wrong.png", 9, 8, 0, [] if kind == "no rows" else rows)
    with pytest.raises(data.UserError, match="wrong.png cannot be read. Repair or remove it") as error:
        data.load(kermany, 16, ("test",))
    assert "\n" not in str(error.value)


def by_hand(path, size):
    """Today's pixels of a file that lies as it should: without a word on its orientation."""
    with Image.open(path) as image:
        image.draft("L", (size, size))
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        return torch.from_numpy(np.array(image.convert("L").resize((size, size), Image.Resampling.BILINEAR)))[None]


@pytest.mark.parametrize("kind", ["large jpeg", "grey png", "16 bits"])
@pytest.mark.parametrize("orientation", [None, 1, 3, 6, 8])
def test_images_are_turned_by_their_exif(tmp_path, kind, orientation):
    """Images without EXIF do not change by a bit."""
    pixels = ramp(192, 128)
    image = Image.fromarray(pixels.astype(np.uint16) * 257 if kind == "16 bits" else pixels)
    path, exif = tmp_path / ("a.jpeg" if "jpeg" in kind else "a.png"), Image.Exif()
    if orientation:
        exif[274] = orientation
    image.save(path, exif=exif, **({"quality": 95} if "jpeg" in kind else {}))
    found, turns = data.decode(path, 32), {3: 2, 6: 3, 8: 1}.get(orientation, 0)  # quarters, against the clock
    if turns:
        assert (found.int() - by_hand(path, 32).rot90(turns, (1, 2)).int()).abs().max() <= 2
        assert (found.int() - by_hand(path, 32).int()).abs().max() > 50
    else:
        assert torch.equal(found, by_hand(path, 32))


# ---- DICOM


def dicom(path, pixels=None, syntax=None, **tags):
    """A DICOM file of 8 or 16 bits, by default of 12 bits that its window shows as ramp(64, 48)."""
    pydicom = pytest.importorskip("pydicom")
    if pixels is None:
        pixels = 600 + 3 * ramp(64, 48).astype(np.uint16)
        scale = {"RescaleSlope": 2, "RescaleIntercept": -200}  # 1000 becomes 0, 2530 becomes 255
        tags = {**scale, "WindowCenter": [1765.5, 9], "WindowWidth": [1531, 9], **tags}
    file = pydicom.Dataset()
    file.SOPClassUID, file.SOPInstanceUID = pydicom.uid.DigitalXRayImageStorageForPresentation, pydicom.uid.generate_uid()
    file.Rows, file.Columns, file.SamplesPerPixel = *pixels.shape[:2], 1
    file.BitsAllocated, file.BitsStored = 8 * pixels.itemsize, min(12, 8 * pixels.itemsize)
    file.HighBit, file.PixelRepresentation, file.PhotometricInterpretation = file.BitsStored - 1, 0, "MONOCHROME2"
    file.PatientID, file.PixelData = "", pixels.tobytes()
    for name, value in tags.items():
        setattr(file, name, value)
    file.file_meta = pydicom.dataset.FileMetaDataset()
    file.file_meta.TransferSyntaxUID = syntax or pydicom.uid.ExplicitVRLittleEndian
    if syntax:
        file.PixelData = pydicom.encaps.encapsulate([b"no pixels"])
    path.parent.mkdir(parents=True, exist_ok=True)
    file.save_as(path, enforce_file_format=True)
    return path


def test_dicom_and_png_give_the_same_pixels(tmp_path):
    pixels = ramp(64, 48)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    wanted = data.decode(tmp_path / "a.png", 32).int()
    full = (pixels.astype(np.uint16) - pixels.min()) * 16  # no window: its full range is shown
    scaled = (full / full.max() * 255).round().astype(np.uint8)
    Image.fromarray(scaled).save(tmp_path / "full.png")
    colour = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}
    for path, target in (
        (dicom(tmp_path / "window.dcm"), wanted),
        (dicom(tmp_path / "inverted.DICOM", 255 - pixels, PhotometricInterpretation="MONOCHROME1",
               WindowCenter=128, WindowWidth=256), wanted),
        (dicom(tmp_path / "full", full), data.decode(tmp_path / "full.png", 32).int()),
        (dicom(tmp_path / "colour.dcm", pixels[:, :, None].repeat(3, 2), **colour), wanted),
    ):
        assert (data.decode(path, 32).int() - target).abs().max() <= 1, path.name


def test_dicom_is_clipped_to_its_window(tmp_path):
    pixels = np.array([[0, 1000, 1500, 2000, 4000]] * 5, np.uint16)
    grey = data.decode(dicom(tmp_path / "a.dcm", pixels, WindowCenter=1500.5, WindowWidth=1001), 5)
    assert grey[0, 0].tolist() == [0, 0, 128, 255, 255]


def test_patients_come_from_dicom_headers(tmp_path):
    for i in range(12):  # the names tell other patients, or none
        dicom(tmp_path / f"set/train/NORMAL/patient{i}.dcm", PatientID=f"P{i % 4}")
        dicom(tmp_path / f"set/train/SICK/1.2.840.{i}", PatientID=f"P{i % 4}")
    dicom(tmp_path / "set/train/SICK/patient7.Dcm")
    dicom(tmp_path / "set/train/SICK/unknown")
    loaded = data.load("set", 16, val_fraction=0.3)
    groups = [{*loaded.train.groups}, {*loaded.val.groups}]
    assert groups[0] | groups[1] == {"P0", "P1", "P2", "P3", "patient7", "train/SICK/unknown"}
    assert not groups[0] & groups[1] and len(loaded.train.ids) + len(loaded.val.ids) == 26


def test_only_the_header_is_read_for_the_patient(tmp_path):
    path = dicom(tmp_path / "a", syntax="1.2.840.10008.1.2.4.80", PatientID="P1")
    path.write_bytes(path.read_bytes()[:-12])  # whoever reads on comes to an end that is missing
    assert data.find_patient(path, "a") == "P1"


def test_dicom_without_pydicom_is_one_line(tmp_path, monkeypatch):
    path = dicom(tmp_path / "set/train/NORMAL/a.dcm")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    for read in (lambda: data.list_images("set"), lambda: data.decode(path, 16)):
        with pytest.raises(data.UserError, match="a.dcm is a DICOM file.*pip install pydicom"):
            read()


def test_dicom_that_cannot_be_shown_is_one_line(tmp_path):
    square = np.zeros((8, 8), np.uint8)
    cut = dicom(tmp_path / "cut.dcm")
    cut.write_bytes(cut.read_bytes()[:-5000])
    for path, why in ((dicom(tmp_path / "frames.dcm", square, Rows=4, NumberOfFrames=2), "several frames"),
                      (dicom(tmp_path / "palette.dcm", square, PhotometricInterpretation="PALETTE COLOR"), "PALETTE COLOR"),
                      (dicom(tmp_path / "coded.dcm", syntax="1.2.840.10008.1.2.4.80"), "decompress 'JPEG-LS"), (cut, "")):
        with pytest.raises(data.UserError, match=f"{path.name} cannot be read.*{why}") as error:
            data.decode(path, 16)
        assert "\n" not in str(error.value)


# ---- labels that are wrong, and labels that are hidden


def test_only_training_has_wrong_labels(monkeypatch):
    """They are as many as --wrong-labels asks for."""
    monkeypatch.setattr(data, "PHANTOMS", {"train": (200, 11), "val": (20, 12), "test": (20, 13)})
    loaded = data.load("phantoms", 16, ("train", "val", "test"), wrong_labels=0.2)
    wrong = [(getattr(loaded, split).labels != torch.arange(n) % 2).float().mean().item()
             for split, n in (("train", 200), ("val", 20), ("test", 20))]
    assert 0.1 < wrong[0] < 0.3 and wrong[1:] == [0, 0]
    right = data.load("phantoms", 16)
    assert torch.equal(right.train.labels, torch.arange(200) % 2)
    assert torch.equal(right.train.images, loaded.train.images)


def test_wrong_labels_do_not_depend_on_the_class(monkeypatch):
    monkeypatch.setattr(data, "PHANTOMS", {"train": (300, 11), "val": (4, 12)})
    split = split_of("phantoms", wrong_labels=0.2)
    wrong = split.labels != torch.arange(300) % 2
    down, right = torch.meshgrid(*[torch.linspace(-1, 1, 32)] * 2, indexing="ij")
    x = split.images[:, 0].double()
    tilt = (x * down * right).sum((1, 2)) / x.sum((1, 2))  # turns with the chest
    z = (tilt[wrong].mean() - tilt[~wrong].mean()) / (tilt.std() / wrong.sum().sqrt())
    assert abs(z) < 3


def test_wrong_labels_depend_on_names_alone(kermany, monkeypatch):
    """Pixels, order and seed do not matter."""
    truth = known(split_of(kermany))
    wrong = {}
    for share in (0.1, 0.4, 1):
        labels = known(split_of(kermany, wrong_labels=share))
        wrong[share] = {id for id in labels if labels[id] != truth[id]}
    assert wrong[0.1] < wrong[0.4] < wrong[1] == set(truth)
    assert 5 <= len(wrong[0.4]) <= 20  # of 32
    for path in kermany.glob("train/*/*.jpeg"):
        image_file(path, shade=50)
    backwards(monkeypatch)
    torch.manual_seed(99)
    labels = known(split_of(kermany, wrong_labels=0.4))
    assert {id for id in labels if labels[id] != truth[id]} == wrong[0.4]
    three = split_of(kermany, wrong_labels=1, classes=3)
    assert [(r + 1) % 3 for r in split_of(kermany, classes=3).labels.tolist()] == three.labels.tolist()


def test_findings_refuse_wrong_labels_and_subsets(few_phantoms):
    for options in ({"wrong_labels": 0.2}, {"per_class": 4}):
        with pytest.raises(data.UserError, match="findings has findings: --per-class and --wrong-labels need classes"):
            data.load("findings", 16, **options)


def test_fewer_labels_are_a_part_of_more(kermany):
    """--labels-per-class hides all other labels."""
    whole = data.load(kermany, 16)
    kept = {}
    for n in (0, 2, 4):
        loaded = data.load(kermany, 16, labels_per_class=n)
        kept[n] = known(loaded.train)
        assert loaded.train.ids == whole.train.ids and torch.equal(loaded.train.images, whole.train.images)
        assert (loaded.train.labels == -1).sum() == len(whole.train.ids) - 2 * n
        assert kept[n].items() <= known(whole.train).items()  # what is left is as it was
        assert torch.bincount(torch.tensor([*kept[n].values()], dtype=torch.long), minlength=2).tolist() == [n, n]
        assert known(loaded.val) == known(whole.val)
    assert kept[0].items() < kept[2].items() < kept[4].items()
    loaded = data.load(kermany, 16, labels_per_class=2, unlabelled=False)
    assert known(loaded.train) == kept[2] and len(loaded.train.ids) == 4
    assert loaded.val.ids == whole.val.ids
    for i, id in enumerate(loaded.train.ids):
        assert torch.equal(loaded.train.images[i], data.decode(kermany / id, 16))


def test_how_many_images_keep_their_findings(few_phantoms):
    """An image keeps all of its findings or none."""
    whole, kept = data.load("findings", 16), {}
    for n in (0, 2, 4):
        loaded = data.load("findings", 16, labels_per_class=n)
        kept[n] = known(loaded.train)
        assert loaded.train.ids == whole.train.ids and torch.equal(loaded.val.labels, whole.val.labels)
        hidden = loaded.train.labels.isnan()
        assert torch.equal(hidden.any(1), hidden.all(1)) and (~hidden[:, 0]).sum() == len(kept[n]) == 3 * n
        assert torch.equal(loaded.train.labels[~hidden], whole.train.labels[~hidden])
    assert kept[0].keys() < kept[2].keys() < kept[4].keys()
    loaded = data.load("findings", 16, labels_per_class=2, unlabelled=False)
    assert known(loaded.train) == kept[2] and len(loaded.train.ids) == 6


# ---- batches


def test_prepare_normalises_and_is_channels_last():
    """The mean and deviation are ImageNet's."""
    images = torch.randint(0, 256, (3, 1, 5, 7), dtype=torch.uint8)
    x = data.prepare(images, torch.device("cpu"))
    assert x.shape == (3, 3, 5, 7) and x.is_contiguous(memory_format=torch.channels_last)
    for c, (mean, std) in enumerate(zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)):
        assert torch.allclose(x[:, c], (images[:, 0] / 255 - mean) / std, atol=1e-5)


def test_augmentation_is_equal_at_two_sizes():
    """It never flips an image."""
    affines = train.random_affines(8, torch.Generator().manual_seed(1))
    assert (torch.linalg.det(affines[:, :, :2]) > 0.8).all()  # a flip has a negative determinant
    large, small = (data.prepare(data.phantoms(8, s, 3)[0], torch.device("cpu"), affines) for s in (96, 48))
    still = data.prepare(data.phantoms(8, 48, 3)[0], torch.device("cpu"))
    shrunk = torch.nn.functional.avg_pool2d(large, 2)
    assert (shrunk - small).abs().mean() < 0.12 < (still - small).abs().mean()


def test_augmentation_rotates_zooms_and_shifts_as_far_as_stated():
    affines = train.random_affines(10000, torch.Generator().manual_seed(1))  # rows a -b x, b a y
    (a, b), (x, y) = affines[:, :, 0].T, affines[:, :, 2].T
    drawn = torch.stack([torch.atan2(b, a), torch.hypot(a, b) - 1, x, y])
    for values, most in zip(drawn, (0.12, 0.08, 0.06, 0.06), strict=True):  # 7 degrees, 8 %, 3 % of a side
        assert values.min().item() == pytest.approx(-most, rel=0.01)
        assert values.max().item() == pytest.approx(most, rel=0.01) and abs(values.mean()) < 0.05 * most
    assert (torch.corrcoef(drawn) - torch.eye(4)).abs().max() < 0.05  # each is drawn by itself


# ---- errors and the command line


@pytest.mark.parametrize("source", ["nowhere", "."])
def test_a_wrong_folder_names_the_layout_expected(source):
    with pytest.raises(data.UserError, match=rf"No such folder: {source}/train.*train/CLASS.*another folder.*--download"):
        data.load(source, 32)


def test_a_set_without_train_is_refused(kermany):
    """The message lists what is there."""
    (kermany / "train").rename(kermany / "Train")
    shutil.rmtree(kermany / "chest_xray")
    with pytest.raises(data.UserError, match=r"No such folder: .*/train. .* holds Train, __MACOSX, test, val\."):
        data.list_images(kermany)


def test_a_flat_folder_is_told_how_to_divide_it():
    image_file(Path("flat/NORMAL/a.png"))
    with pytest.raises(data.UserError, match="holds NORMAL.*put their images in flat/train/CLASS and flat/test/CLASS"):
        data.list_images("flat")


def test_ids_are_sorted_with_slashes(tmp_path, monkeypatch):
    for name in ("A/x.png", "A-B/x.png", "A0/x.png"):
        image_file(tmp_path / "set/train" / name)
    monkeypatch.setattr(data, "files_below", lambda *a, real=data.files_below: reversed([*real(*a)]))
    assert [r["id"] for r in data.list_images("set")[0]] == ["train/A-B/x.png", "train/A/x.png", "train/A0/x.png"]


def test_text_files_are_opened_as_utf8(nih):
    code = "import data; data.list_images('ChestX-ray14')"
    subprocess.run([sys.executable, "-X", "warn_default_encoding", "-W", "error::EncodingWarning:data", "-c", code],
                   check=True, env={**os.environ, "PYTHONPATH": os.path.dirname(data.__file__)})


def test_a_class_without_images_is_named(kermany):
    for path in (kermany / "test/NORMAL").iterdir():
        path.unlink()
    with pytest.raises(data.UserError, match="has no test images of NORMAL"):
        split_of(kermany, "test")


def audit(folder, capsys):
    """What the audit prints, each run of blanks one blank."""
    data.main([str(folder)])
    return " ".join(capsys.readouterr().out.split())


def test_the_audit_counts_images_and_patients(kermany, capsys):
    """It also counts patients in both train and test."""
    text = audit(kermany, capsys)
    assert "images (patients) NORMAL PNEUMONIA all" in text
    assert "train 17 (17) 18 (17) 35 (34)" in text and "test 4 (4) 8 (8) 12 (12)" in text
    assert "patients in both train and test: 0" in text
    image_file(kermany / "test/PNEUMONIA/person3_virus_99.jpeg")
    assert "patients in both train and test: 1" in audit(kermany, capsys)


# ---- what is not read is said


@pytest.mark.parametrize("added, said", [
    ("train/NORMAL/a.tif", "left out: 1 train/NORMAL/*.tif."),
    ("train/NORMAL/deep/below/a.WEBP", "left out: 1 train/NORMAL/*.webp."),
    ("test/x.png", "left out: 1 test/*.png."),
    ("train/x.jpeg", "left out: 1 train/*.jpeg."),
    ("valid/SICK/a.png", "left out: 1 valid/SICK/*.png."),
    ("test/UNLABELLED/a.png", "left out: 1 test/UNLABELLED/*.png."),
    ("train/NORMAL/notes.txt", "left out: 1 train/NORMAL/*.txt."),
    ("train/NORMAL/no preamble.DCM", "left out: 1 train/NORMAL/*.dcm."),
    ("train/NORMAL/notes", "left out: 1 train/NORMAL/*."),
    ("train/_spare/a.png", ""), ("train/NORMAL/._a.tif", ""), ("train/NORMAL/.old/a.png", ""), ("train/NORMAL/Thumbs.db", ""),
])
def test_files_that_are_left_out_are_printed_once(kermany, capsys, added, said):
    """The audit and training print them."""
    before = [r["id"] for r in data.list_images(kermany)[0]]
    (kermany / added).parent.mkdir(parents=True, exist_ok=True)
    (kermany / added).write_bytes((kermany / before[0]).read_bytes())
    assert [r["id"] for r in data.list_images(kermany)[0]] == before
    told = capsys.readouterr().out
    assert said in told and told.count("\n") == bool(said) == told.count("Expected JPEG, PNG or DICOM files below train/CLASS/")
    data.print_once.cache_clear()
    assert said in audit(kermany, capsys)
    data.load(kermany, 16)
    assert capsys.readouterr().out == ""  # said already


@pytest.mark.parametrize("n, told", [(16, False), (17, True)])
def test_a_val_folder_becomes_part_of_train(kermany, capsys, n, told):
    """A large one is mentioned."""
    for i in range(n - 2):
        image_file(kermany / f"val/NORMAL/IM-{500 + i:04d}-0001.jpeg")
    records, _ = data.list_images(kermany)
    assert sum(r["split"] == "train" for r in records) == 33 + n
    assert capsys.readouterr().out.startswith(f"val/: its {n} images join the training images") == told


@pytest.mark.parametrize("names, told", [
    (("covid", "healthy"), "positive: healthy. If that is the healthy class, rename its folder NORMAL\n"),
    (("covid", "normal"), ""), (("a", "b", "c"), ""),
])
def test_without_normal_the_positive_class_is_printed(tmp_path, capsys, names, told):
    for name in names:
        image_file(tmp_path / f"set/train/{name}/patient1.png")
    data.list_images("set")
    assert capsys.readouterr().out == told


def test_a_folder_named_phantoms_is_read_as_a_path(few_phantoms):
    healthy_and_sick(Path("phantoms"), "train", [f"patient{i}" for i in range(6)])
    assert len(data.load("phantoms", 16).train.ids) == 24
    assert len(data.load("./phantoms", 16, ("train",)).train.ids) == 10


def test_a_pipe_and_dead_links_are_left_out(kermany, capsys):
    before = [r["id"] for r in data.list_images(kermany)[0]]
    os.mkfifo(kermany / "train/NORMAL/x.png")
    (kermany / "test/NORMAL/y.png").symlink_to("nowhere")
    (kermany / "train/NORMAL/loop").symlink_to("loop")
    assert [r["id"] for r in data.list_images(kermany)[0]] == before
    told = capsys.readouterr().out
    assert "left out: 2 links that lead nowhere" in told and "left out: 1 train/NORMAL/*.png. Expected" in told


@pytest.mark.parametrize("name", [b"caf\xe9.png", b"two\nlines.png", b"two\nlines/a.png"])
def test_a_name_that_no_csv_could_hold_is_refused(kermany, name):
    path = Path(os.fsdecode(os.fsencode(kermany / "train/NORMAL") + b"/" + name))
    image_file(path.parent / "a.png").rename(path)
    with pytest.raises(data.UserError, match="Rename '.*(dce9|two.nlines)") as error:
        data.list_images(kermany)
    assert str(error.value).isascii() and "\n" not in str(error.value)


# ---- images without any label


@pytest.fixture
def unlabelled(kermany):
    """The public set with images of patients that are elsewhere: in train, in nothing else, in test."""
    for i in range(8):
        image_file(kermany / f"train/UNLABELLED/person{i}_virus_900.jpeg")
        image_file(kermany / f"train/UNLABELLED/deep/person{200 + i}_virus_{i}.jpeg")
    return kermany


def ids_of(split, part="UNLABELLED"):
    return [id for id in split.ids if part in id]


def test_unlabelled_images_train_without_a_label_and_are_no_class(unlabelled):
    loaded = data.load(unlabelled, 16, ("train", "val", "test"), val_fraction=0.3)
    assert loaded.classes == ["NORMAL", "PNEUMONIA"]
    hidden = [id for id, label in zip(loaded.train.ids, loaded.train.labels.tolist(), strict=True) if label == -1]
    assert hidden == ids_of(loaded.train) and not ids_of(loaded.val) and not ids_of(loaded.test)
    left_out = {f"person{i}_virus" for i in range(8)} & {*loaded.val.groups}
    assert left_out and len(hidden) == 16 - len(left_out)  # validation's patients are never trained on
    assert not {*loaded.train.groups} & {*loaded.val.groups}
    for i, id in enumerate(loaded.train.ids):
        assert torch.equal(loaded.train.images[i], data.decode(unlabelled / id, 16))


def test_unlabelled_images_change_nothing_else(unlabelled):
    options = ({}, {"per_class": 6}, {"wrong_labels": 0.5}, {"labels_per_class": 2}, {"classes": 3})
    with_them = [data.load(unlabelled, 16, **o) for o in options]
    without = [data.load(unlabelled, 16, unlabelled=False, **o).train for o in options]
    shutil.rmtree(unlabelled / "train/UNLABELLED")
    for loaded, few, o in zip(with_them, without, options, strict=True):
        plain = data.load(unlabelled, 16, **o)
        assert loaded.val.ids == plain.val.ids and known(loaded.train) == known(plain.train) == known(few)
        assert ids_of(loaded.train) and not ids_of(few) and loaded.classes == plain.classes
        if "classes" not in o:  # which carves out other patients
            assert ids_of(loaded.train) == ids_of(with_them[0].train)  # --per-class takes none away
        assert [id for id in loaded.train.ids if "UNLABELLED" not in id] == plain.train.ids
        assert (loaded.train.labels[[id in ids_of(loaded.train) for id in loaded.train.ids]] == -1).all()


def test_an_unlabelled_patient_of_the_test_is_shared(unlabelled, capsys):
    assert "patients in both train and test: 0" in audit(unlabelled, capsys)
    image_file(unlabelled / "train/UNLABELLED/person103_virus_7.jpeg")
    assert "patients in both train and test: 1" in audit(unlabelled, capsys)


def test_the_audit_counts_unlabelled_images(unlabelled, capsys):
    """They have a column of their own."""
    text = audit(unlabelled, capsys)
    assert "images (patients) NORMAL PNEUMONIA UNLABELLED all" in text
    assert "train 17 (17) 18 (17) 16 (16) 51 (42)" in text and "test 4 (4) 8 (8) 0 (0) 12 (12)" in text


@pytest.mark.parametrize("role, alpha, stay", [("student", 0.9, True), ("student", 0.0, False),
                                               ("baseline", 0.9, False), ("teacher", 0.9, False)])
def test_only_students_train_on_unlabelled_images(unlabelled, role, alpha, stay):
    """At alpha 0 a student does not use them."""
    args = {"role": role, "alpha": alpha, "data": str(unlabelled), "per_class": None, "labels_per_class": 2,
            "classes": None, "val_fraction": 0.1, "wrong_labels": 0.0}
    loaded = data.load_as(args, 16, ("train",), "cache")
    assert (loaded.train.labels == -1).any() == stay and bool(ids_of(loaded.train)) == stay


# ---- what a split is, in 16 digits


def test_fingerprints_are_taken_before_labels_are_hidden(unlabelled):
    def prints(source=unlabelled, size=16, **options):
        return data.load(source, size, ("train",), **options).fingerprints

    first = prints()
    assert {*first} == {"train", "val", "test", "train_pixels"} and all(len(digits) == 16 for digits in first.values())
    assert prints(labels_per_class=2) == prints(unlabelled=False) == first
    assert {k for k, digits in prints(size=24).items() if digits != first[k]} == {"train_pixels"}
    moved = Path(shutil.copytree(unlabelled, "moved"))
    for path in moved.rglob("*.jpeg"):
        os.utime(path, ns=(0, 0))
    assert prints(moved) == first
    both = {"train", "train_pixels", "val"}
    for options, changed in (({"wrong_labels": 0.5}, {"train"}), ({"per_class": 6}, both),
                             ({"val_fraction": 0.4}, both), ({"classes": 3}, both | {"test"})):
        assert {split for split, digits in prints(**options).items() if digits != first[split]} == changed
    (moved / "test/NORMAL/IM-0100-0001-0002.jpeg").write_bytes(b"never decoded")
    changed = prints(moved)
    assert changed["test"] != first["test"] and changed["train"] == first["train"]


# ---- CSVs that are cut off, or that count an image twice


def test_images_in_neither_list_are_left_out(nih):
    """ChestX-ray14 has a list for training and one for testing."""
    lines = (nih / "test_list.txt").read_text().split()
    (nih / "test_list.txt").write_text(lines[0])
    with pytest.raises(data.UserError, match=f"{lines[1]} is in neither of the two lists beside .*Fetch both again"):
        data.list_images(nih)


@pytest.mark.parametrize("name", ["test_list.txt", "train_val_list.txt"])
def test_a_missing_list_of_chest_xray14_is_asked_for(nih, name):
    (nih / name).unlink()
    with pytest.raises(data.UserError, match="test_list.txt and train_val_list.txt are expected beside .*fetch both"):
        data.list_images(nih)


def chexpert_twice(root):
    path = root / "train.csv"
    path.write_text(path.read_text() + path.read_text().splitlines()[1] + "\n")
    return root


def test_an_image_that_a_csv_names_twice_is_refused_by_name(nih, chexpert):
    path = nih / "Data_Entry_2017.csv"
    path.write_text(path.read_text() + path.read_text().splitlines()[3] + "\n")
    for folder, name in ((nih, "00000002_000.png"), (chexpert_twice(chexpert), "patient00001/study1/view1_frontal.jpg")):
        with pytest.raises(data.UserError, match=f"has 2 rows of .*{name}. Expected one per image"):
            data.list_images(folder)


@pytest.mark.parametrize("rest", [0, 1], ids=["no byte", "a header alone"])
def test_an_empty_csv_is_said_to_be_empty(nih, chexpert, rest):
    for path in (nih / "Data_Entry_2017.csv", chexpert / "train.csv"):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:rest]))
        with pytest.raises(data.UserError, match=f"{path.name} is empty"):
            data.list_images(path.parent)


# ---- download


class Server(http.server.BaseHTTPRequestHandler):
    """Serves one archive; hangs up after `cut` bytes once."""

    content, cut, asked = b"", None, 0

    def do_GET(self):
        Server.asked += 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        end, Server.cut = Server.cut, None
        self.wfile.write(self.content[:end])

    def log_message(self, *_):
        pass


@pytest.fixture
def archive(kermany):
    """(url, sha256) of the miniature set, zipped, on localhost."""
    path = kermany.parent / "set.zip"
    with zipfile.ZipFile(path, "w") as file:
        for image in sorted(kermany.rglob("*.jpeg")):
            file.write(image, image.relative_to(kermany.parent))
    Server.content, Server.cut, Server.asked = path.read_bytes(), None, 0
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/set.zip", hashlib.sha256(Server.content).hexdigest()
    server.shutdown()


def download(archive, folder="fetched"):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(data, "URL", archive[0])
        patched.setattr(data, "SHA256", archive[1])
        data.main(["--download", folder])


def left_over():
    return {path.name for path in Path().iterdir()} - {"chest_xray", "set.zip"}


def test_a_download_is_checked_unpacked_and_readable(archive):
    download(archive)
    assert len(data.list_images("fetched")[0]) == 47 and left_over() == {"fetched"}


def test_a_broken_download_is_not_unpacked(archive):
    """The same command then works."""
    Server.cut = 5000
    with pytest.raises(data.UserError, match="could not be fetched.*run the command again"):
        download(archive)
    assert left_over() == set()
    download(archive)
    assert Server.asked == 2 and len(data.list_images("fetched")[0]) == 47 and left_over() == {"fetched"}


def test_an_archive_with_another_hash_is_deleted_and_never_unpacked(archive):
    with pytest.raises(data.UserError, match="hash"):
        download((archive[0], "0" * 64))
    assert left_over() == set()


def test_a_download_that_is_no_zip_is_one_line(archive):
    Server.content = b"<html>please sign in</html>"
    with pytest.raises(data.UserError, match="127.0.0.1.*could not be fetched and unpacked.*not a zip") as error:
        download((archive[0], hashlib.sha256(Server.content).hexdigest()))
    assert "\n" not in str(error.value) and not Path("fetched").exists()


def test_nothing_listening_is_one_line_with_the_remedy():
    start = time.time()
    with pytest.raises(data.UserError, match="could not be fetched.*run the command again"):
        download(("http://127.0.0.1:9/set.zip", "0" * 64))
    assert time.time() - start < 10


def test_a_folder_with_files_in_it_is_not_written_over(archive, kermany):
    with pytest.raises(data.UserError, match="chest_xray is not empty. Choose a new folder"):
        download(archive, str(kermany))
    assert Server.asked == 0


# ---- plumbing


def test_names_have_the_same_hash_on_every_machine():
    assert data.hash_fraction("train/NORMAL/IM-0001-0001.jpeg") == 0.7481095805514286


def test_a_mean_leaves_out_what_could_not_be_judged():
    assert evaluate.mean([1, math.nan]) == 1 and evaluate.mean(0.25) == 0.25 and math.isnan(evaluate.mean([math.nan]))


def test_an_interrupted_write_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), data.atomic(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def healthy_and_sick(root, split, names):
    for name in names:
        image_file(root / f"{split}/HEALTHY/{name}.png")
        image_file(root / f"{split}/SICK/{name}s.png")


def test_training_needs_no_test_folder(tmp_path):
    """Evaluation refuses a set without one."""
    healthy_and_sick(tmp_path / "set", "train", "abcd")
    assert data.load("set", 16).classes == ["HEALTHY", "SICK"]
    with pytest.raises(data.UserError, match="has no test images of HEALTHY"):
        data.load("set", 16, ("test",))


@pytest.mark.parametrize("names, says", [
    (["a", "b", "c", "d"], "8 of 8 images have no known patient"),
    (["a", "patient00002", "patient00003", "patient00004"], "2 of 8 images have no known patient"),
    (["patient00001", "patient00002", "patient00003"], None),
])
def test_images_without_a_known_patient_are_counted(tmp_path, capsys, names, says):
    """Once, also where the images are loaded again at a teacher's size."""
    healthy_and_sick(tmp_path / "set", "train", names)
    data.load("set", 16)
    data.load("set", 24)
    told = [line for line in capsys.readouterr().out.splitlines() if "no known patient" in line]
    assert says in told[0] and len(told) == 1 if says else told == []


def test_patients_of_the_test_split_are_known_in_training(tmp_path):
    healthy_and_sick(tmp_path / "set", "train", [f"patient{i}" for i in range(6)])
    for path in ("HEALTHY/patient9.png", "SICK/patient2.jpg"):
        image_file(tmp_path / "set/test" / path)
    assert {name for name in data.load("set", 16).test_groups if "/" not in name} == {"patient2", "patient9"}


def test_a_linked_folder_is_read_like_any_other(kermany):
    whole = [(r["id"], r["label"], r["split"]) for r in data.list_images(kermany)[0]]
    elsewhere = kermany.parent / "another disk"
    elsewhere.mkdir()
    for folder in ("train/NORMAL", "test"):  # a class, and a split
        (kermany / folder).rename(elsewhere / folder.replace("/", "-"))
        (kermany / folder).symlink_to(elsewhere / folder.replace("/", "-"))
    (kermany / "train/PNEUMONIA/more").symlink_to(elsewhere / "more")  # below a class
    image_file(elsewhere / "more/person900_virus_1.jpeg")
    found = [(r["id"], r["label"], r["split"]) for r in data.list_images(kermany)[0]]
    assert sorted(found) == sorted([*whole, ("train/PNEUMONIA/more/person900_virus_1.jpeg", 1, "train")])


@pytest.fixture
def patients_csv(kermany):
    """A list of patients for the public set: the same two in train, another in test."""
    ids = [r["id"] for r in data.list_images(kermany)[0]]
    path = kermany / "patients.csv"
    path.write_text("file,patient\n" + "".join(f"{id},{'t' if 'test/' in id else i % 2}\n" for i, id in enumerate(ids)))
    return path


def test_patients_come_from_a_list(kermany, patients_csv, capsys):
    loaded = data.load(kermany, 16, ("train", "val", "test"))
    assert [{*split.groups} for split in (loaded.test, loaded.val, loaded.train)] in (
        [{"t"}, {"0"}, {"1"}], [{"t"}, {"1"}, {"0"}])
    text = audit(kermany, capsys)
    assert "train 17 (2) 18 (2) 35 (2)" in text and "in both train and test: 0" in text
    patients_csv.write_text(patients_csv.read_text().replace(",t", ",1"))
    assert "in both train and test: 1" in audit(kermany, capsys)


@pytest.mark.parametrize("change, says", [
    (lambda lines: lines[:-2], r"2 have no patient or several rows, such as val/NORMAL/\S+jpeg\)"),
    (lambda lines: [*lines, lines[1]], r"1 have no patient or several rows, such as test/NORMAL/\S+jpeg\)"),
    (lambda lines: [*lines[:-1], lines[-1].split(",")[0] + ","], "1 have no patient"),
    (lambda lines: ["image,patient", *lines[1:]], "KeyError: 'file'"),
    (lambda lines: lines[:1], "csv is empty"),
], ids=["not named", "named twice", "no patient", "another header", "no rows"])
def test_a_wrong_list_of_patients_is_refused(kermany, patients_csv, change, says):
    patients_csv.write_text("\n".join(change(patients_csv.read_text().splitlines())))
    with pytest.raises(data.UserError, match=f"patients.csv needs the columns file, patient .*{says}"):
        data.list_images(kermany)


@pytest.mark.parametrize("link, target", [("train/NORMAL/more", "test/NORMAL"),
                                          ("test/NORMAL/one.jpeg", "val/NORMAL/NORMAL2-IM-1427-0001.jpeg")])
def test_a_link_between_train_and_test_is_refused(kermany, capsys, link, target):
    (kermany / link).symlink_to(kermany / target)
    for read in (lambda: data.load(kermany, 16), lambda: split_of(kermany, "test"), lambda: data.main([str(kermany)])):
        with pytest.raises(data.UserError, match=f"({target}.* and {link}|{link}.* and {target}).* are the same file"):
            read()
    assert "patients in both train and test" in capsys.readouterr().out  # the audit counts first


def test_a_link_in_a_circle_multiplies_no_image(kermany):
    before = [r["id"] for r in data.list_images(kermany)[0]]
    (kermany / "train/NORMAL/again").symlink_to(".", target_is_directory=True)
    assert [r["id"] for r in data.list_images(kermany)[0]] == before


def throw(error):
    raise error


def test_only_our_own_mistakes_are_tracebacks():
    """A user's mistake is one line."""
    for error in (RuntimeError("shapes differ"), NameError("auc"), KeyError("epoch")):
        with pytest.raises(type(error)):
            data.cli(lambda error=error: throw(error))
    for error in (data.UserError("no such folder"), OSError("no such folder")):
        with pytest.raises(SystemExit, match="^error: no such folder$"):
            data.cli(lambda error=error: throw(error))
    with pytest.raises(SystemExit, match="train.py resumes from the last saved epoch"):
        data.cli(lambda: throw(KeyboardInterrupt()))


@pytest.mark.parametrize("unbuffered", ["1", ""])
def test_a_reader_that_has_read_enough_is_no_error(unbuffered):
    """What `| head -1` does to its writer, without the race."""
    end, start = os.pipe()
    os.close(end)
    done = subprocess.run([sys.executable, data.__file__, "phantoms"], stdout=start, stderr=subprocess.PIPE,
                          env={**os.environ, "PYTHONUNBUFFERED": unbuffered})
    os.close(start)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("error", [OSError("a\nb"), EOFError(), ValueError("a"), KeyError("a"), IndexError("a"), TypeError("a"),
                                   AttributeError("a"), RuntimeError("a"), AssertionError(), SyntaxError("a"),
                                   pickle.UnpicklingError("a"), zipfile.BadZipFile("a"), csv.Error("a"),
                                   tokenize.TokenError("a"), http.client.HTTPException("a"), Image.DecompressionBombError("a")])
def test_explain_keeps_the_cause(error):
    """What a damaged file raises becomes one line."""
    with pytest.raises(data.UserError, match=rf"^x is damaged \({type(error).__name__}: .+\)$") as told:
        with data.explain("x is damaged"):
            throw(error)
    assert told.value.__cause__ is error


@pytest.mark.parametrize("error", [NameError("a"), UnboundLocalError("a"), ZeroDivisionError("a"), ImportError("a"),
                                   data.UserError("what is wrong")])
def test_what_no_file_raises_is_not_explained_away(error):
    with pytest.raises(type(error)) as told, data.explain("x is damaged"):
        throw(error)
    assert told.value is error


# ---- progress


class Clock:
    """Time that passes only where an item is worked on."""

    def __init__(self, monkeypatch, terminal):
        self.now = 0.0
        monkeypatch.setattr(data.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(data.sys.stdout, "isatty", lambda: terminal, raising=False)

    def work(self, items, seconds):
        for _ in items:
            self.now += seconds


def test_progress_shows_count_and_time_left(monkeypatch, capsys):
    """At the end, it wipes its line."""
    Clock(monkeypatch, terminal=True).work(data.progress(range(4), "epoch 1"), 20)
    assert capsys.readouterr().out.split("\r\033[K")[1:] == [
        "epoch 1  1/4  1:00 left", "epoch 1  2/4  0:40 left", "epoch 1  3/4  0:20 left", ""]


@pytest.mark.parametrize("seconds, left", [(59.7, "1:00"), (59.4, "0:59"), (119.6, "2:00"), (3599.9, "60:00")])
def test_no_time_left_has_sixty_seconds(monkeypatch, capsys, seconds, left):
    Clock(monkeypatch, terminal=True).work(data.progress(range(2), "x"), seconds)
    assert f"x  1/2  {left} left" in capsys.readouterr().out


def test_how_often_progress_is_printed(monkeypatch, capsys):
    """A terminal is refreshed twice per second. A file gets a line per minute."""
    Clock(monkeypatch, terminal=True).work(data.progress(iter(range(100)), "x", total=100), 0.1)
    assert 15 <= capsys.readouterr().out.count("x  ") <= 20  # in ten seconds
    Clock(monkeypatch, terminal=False).work(data.progress(range(100), "x"), 3)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[0] == "x  21/100  3:57 left" and "\033" not in "".join(lines)


def test_nothing_is_printed_before_the_first_item_is_done(monkeypatch, capsys):
    clock = Clock(monkeypatch, terminal=True)
    clock.now = 100
    next(data.progress(range(9), "x"))
    assert capsys.readouterr().out == ""


def test_a_file_name_in_another_script_is_a_name_like_others(kermany):
    path = image_file(kermany / "test/NORMAL/x.jpeg").rename(kermany / "test/NORMAL/IM-0500 患者é\u202f1.jpeg")
    assert f"test/NORMAL/{path.name}" in data.load(kermany, 16, ("test",)).test.ids


def test_validation_patients_have_the_smallest_hashes(kermany):
    """So a split depends on names alone, and new images move few patients."""
    split = data.load(kermany, 8, val_fraction=0.25)
    for k in (0, 1):
        val, train = ([data.hash_fraction(group) for group, label in zip(part.groups, part.labels, strict=True)
                       if label == k] for part in (split.val, split.train))
        assert max(val) < min(train)


def test_identity_affines_leave_images_where_they_are():
    images, cpu = torch.randint(0, 256, (2, 1, 9, 9), dtype=torch.uint8), torch.device("cpu")
    identity = torch.tensor([[1.0, 0, 0], [0, 1, 0]]).expand(2, 2, 3)
    assert torch.allclose(data.prepare(images, cpu, identity), data.prepare(images, cpu), atol=1e-4)


def test_no_teacher_may_have_seen_test_images(kermany):
    assert {*data.load(kermany, 8, ("test",)).test.ids} <= data.load(kermany, 8).test_groups
