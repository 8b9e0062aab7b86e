"""What films must become, and what must never happen to them on the way."""

import hashlib
import http.server
import os
import struct
import threading
import time
import zipfile
import zlib

import numpy as np
import pytest
import torch
from conftest import film

import data


def split_of(source, part="train", **options):
    return getattr(data.load(source, 32, (part,), **options), part)


# ---- phantoms


def test_the_same_seed_draws_the_same_phantoms_and_another_seed_others():
    a, b, c = (data.phantoms(6, 40, seed)[0] for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_a_phantom_shows_the_same_chest_at_every_size():
    large, _, large_masks = data.phantoms(6, 128, 3)
    small, _, small_masks = data.phantoms(6, 64, 3)
    shrunk = torch.nn.functional.avg_pool2d(large.float(), 2)
    assert (shrunk - small.float()).abs().mean() < 4  # grey levels of 256
    assert (large_masks[:, ::2, ::2] == small_masks).float().mean() > 0.97


def test_exactly_the_phantoms_with_pneumonia_have_an_opacity_and_it_is_brighter_there():
    images, labels, masks = data.phantoms(40, 64, 5)
    assert torch.equal(masks.flatten(1).any(1), labels == 1)
    sick, well = images[labels == 1, 0].float(), images[labels == 0, 0].float()
    pairs = zip(sick, masks[labels == 1], strict=True)
    gain = torch.stack([film[mask].mean() - well[:, mask].mean() for film, mask in pairs])
    assert gain.mean() > 20  # grey levels of 256


def test_wrong_labels_are_in_training_alone(monkeypatch):
    monkeypatch.setattr(data, "PHANTOMS", {"train": (200, 11), "val": (20, 12), "test": (20, 13)})
    loaded = data.load("phantoms", 16, ("train", "val", "test"))
    wrong = [(getattr(loaded, p).labels != torch.arange(n) % 2).float().mean().item()
             for p, n in (("train", 200), ("val", 20), ("test", 20))]  # fmt: skip
    assert 0.1 < wrong[0] < 0.3 and wrong[1:] == [0, 0]


def test_which_labels_are_wrong_has_nothing_to_do_with_what_the_films_show(monkeypatch):
    monkeypatch.setattr(data, "PHANTOMS", {"train": (300, 11), "val": (4, 12)})
    split = split_of("phantoms")
    wrong = split.labels != torch.arange(300) % 2
    down, right = torch.meshgrid(*[torch.linspace(-1, 1, 32)] * 2, indexing="ij")
    x = split.images[:, 0].double()
    tilt = (x * down * right).sum((1, 2)) / x.sum((1, 2))  # turns with the chest
    z = (tilt[wrong].mean() - tilt[~wrong].mean()) / (tilt.std() / wrong.sum().sqrt())
    assert abs(z) < 3


# ---- class folders


def test_only_films_are_read_once_and_val_is_folded_into_train(kermany):
    films, names = data.list_films(kermany)
    assert names == ["NORMAL", "PNEUMONIA"]
    count = {(part, label): sum((f.part, f.label) == (part, label) for f in films)
             for part in ("train", "val", "test") for label in (0, 1)}  # fmt: skip
    assert count == {
        ("train", 0): 17,
        ("train", 1): 18,
        ("val", 0): 0,
        ("val", 1): 0,
        ("test", 0): 4,
        ("test", 1): 8,
    }


def test_an_archive_that_holds_one_folder_more_is_found(kermany):
    assert len(data.list_films(kermany.parent)[0]) == len(data.list_films(kermany)[0])


def test_patients_are_told_by_number_and_kind_not_by_number_alone(kermany):
    group = {os.path.basename(f.path): f.group for f in data.list_films(kermany)[0]}
    assert group["person1_bacteria_1.jpeg"] == group["person1_bacteria_2.jpeg"]
    assert group["person1_bacteria_1.jpeg"] != group["person1_virus_1.jpeg"]
    assert group["IM-0001-0001.jpeg"] != group["NORMAL2-IM-0001-0001.jpeg"]


def test_the_folder_one_is_in_is_read_like_any_other(kermany, monkeypatch):
    films, _ = data.list_films(str(kermany))
    monkeypatch.chdir(kermany)
    assert [(f.id, f.part) for f in data.list_films(".")[0]] == [(f.id, f.part) for f in films]


def test_three_classes_come_from_the_file_names(kermany):
    loaded = data.load(kermany, 16, ("test",), classes=3)
    assert loaded.classes == ["NORMAL", "BACTERIAL", "VIRAL"]
    assert loaded.test.labels.bincount().tolist() == [4, 4, 4]
    assert all(
        ("virus" in id) == (label == 2) for id, label in zip(loaded.test.ids, loaded.test.labels, strict=True)
    )


def test_normal_is_class_zero_whatever_the_alphabet_says(tmp_path):
    for name in ("NORMAL", "COVID"):
        for part in ("train", "test"):
            film(tmp_path / f"set/{part}/{name}/a-{name}{part}.png")
    assert data.list_films(tmp_path / "set")[1] == ["NORMAL", "COVID"]


def test_grey_and_colour_files_become_one_grey_channel_with_the_right_pixels(tmp_path):
    for channels in (1, 3):
        path = film(tmp_path / f"{channels}.png", side=20, shade=77, channels=channels)
        assert torch.equal(data.decode(path, 8), torch.full((1, 8, 8), 77, dtype=torch.uint8))
    path = film(tmp_path / "exact.png", side=32)
    assert torch.equal(data.decode(path, 32), data.decode_image(str(path)))


def test_films_of_one_name_in_train_and_test_are_two_films(tmp_path):
    for part in ("train", "test"):
        for name in ("NORMAL", "SICK"):
            for i in range(4):
                film(tmp_path / f"set/{part}/{name}/{i}.png")
    loaded = data.load(tmp_path / "set", 16, ("train", "val", "test"))
    assert not set(loaded.train.groups) & set(loaded.test.groups) and len(loaded.test.ids) == 8


def test_three_classes_are_not_guessed_from_names_that_do_not_tell(kermany):
    film(kermany / "train/PNEUMONIA/child7.jpeg")
    with pytest.raises(data.UserError, match="child7.jpeg: use --classes 2"):
        data.load(kermany, 16, classes=3)


def test_a_16_bit_film_keeps_its_greys(tmp_path):
    # an 8 x 8 grey PNG of depth 16 in which every pixel is 40000 of 65535, written by hand
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    pixels = zlib.compress((b"\0" + struct.pack(">8H", *[40000] * 8)) * 8)
    header = struct.pack(">IIBBBBB", 8, 8, 16, 0, 0, 0, 0)
    path = tmp_path / "deep.png"
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    for size in (8, 4):
        assert (data.decode(path, size).int() - round(40000 / 257)).abs().max() <= 1


def test_no_patient_is_in_two_splits(kermany):
    for path in [*kermany.glob("train/PNEUMONIA/person*_1*.jpeg"), *kermany.glob("train/NORMAL/IM*")]:
        film(path.with_stem(path.stem[:-1] + "77"))  # a second film of many a child
    loaded = data.load(kermany, 16, ("train", "val", "test"), val_fraction=0.3)
    groups = [set(getattr(loaded, p).groups) for p in ("train", "val", "test")]
    assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]
    assert len(loaded.train.ids) + len(loaded.val.ids) >= 35


def test_validation_does_not_change_with_the_order_of_files_or_the_seed(kermany, monkeypatch):
    before = split_of(kermany, "val").ids
    listdir = data.os.listdir
    monkeypatch.setattr(data.os, "listdir", lambda folder: sorted(listdir(folder), reverse=True))
    torch.manual_seed(99)
    assert split_of(kermany, "val").ids == before


def test_validation_takes_its_share_of_every_class(kermany):
    assert split_of(kermany, "val", val_fraction=0.25).labels.bincount().tolist() in ([4, 4], [4, 5])


def test_test_is_not_opened_unless_asked_for(kermany):
    assert not hasattr(data.load(kermany, 16), "test")


def test_per_class_takes_at_most_so_many_and_says_what_is_missing(kermany, capsys):
    loaded = data.load(kermany, 16, ("train", "val"), per_class=10)
    labels = torch.cat([loaded.train.labels, loaded.val.labels])
    assert labels.bincount().tolist() == [10, 10] and capsys.readouterr().out == ""
    whole = data.load(kermany, 16, ("train", "val"))
    assert set(loaded.train.ids) < set(whole.train.ids) and set(loaded.val.ids) < set(whole.val.ids)
    data.load(kermany, 16, ("train",), per_class=18)
    assert "only 17 films of NORMAL" in capsys.readouterr().out
    loaded = data.load(kermany, 16, ("train", "val"), per_class=15)  # 13.5 and 1.5 of each
    assert torch.cat([loaded.train.labels, loaded.val.labels]).bincount().tolist() == [15, 15]
    loaded = data.load(kermany, 16, ("train", "val"), per_class=2, val_fraction=0.8)
    assert loaded.train.labels.bincount().tolist() == loaded.val.labels.bincount().tolist() == [1, 1]


# ---- the cache


def test_a_warm_start_decodes_nothing_and_gives_the_same_pixels(kermany, monkeypatch):
    cold = split_of(kermany)
    monkeypatch.setattr(data, "decode", lambda *_: pytest.fail("decoded again"))
    warm = split_of(kermany)
    assert torch.equal(cold.images, warm.images) and cold.ids == warm.ids
    assert cold.images.shape == (len(cold.ids), 1, 32, 32) and cold.images.dtype == torch.uint8


def test_each_row_of_the_cache_is_its_own_film(kermany):
    split = split_of(kermany)
    for i, id in enumerate(split.ids):
        assert torch.equal(split.images[i], data.decode(kermany / id, 32))


def test_a_film_replaced_by_another_of_the_same_length_is_noticed(kermany):
    path = film(kermany / "test/NORMAL/IM-0100-0001-0002.jpeg", shade=90)
    before, length = split_of(kermany, "test").images.clone(), path.stat().st_size
    film(path, shade=200)
    assert path.stat().st_size == length
    assert not torch.equal(split_of(kermany, "test").images, before)


@pytest.mark.parametrize("change", ["file", "size", "version", "truncated", "spoiled"])
def test_the_cache_is_made_again_when_what_it_was_made_from_changes(kermany, monkeypatch, change, capsys):
    before = split_of(kermany, "test").images.clone()
    cached = list((kermany.parent / "cache").iterdir())
    size = 32
    if change == "file":
        film(kermany / "test/NORMAL/IM-0100-0001-0002.jpeg", shade=200)
    elif change == "size":
        size = 16
    elif change == "version":
        monkeypatch.setattr(data, "VERSION", data.VERSION + 1)
    else:
        content = cached[0].read_bytes()
        zeros = bytes(len(content) - 500) if change == "spoiled" else b""  # as a power cut may leave them
        cached[0].write_bytes(content[:500] + zeros)
    after = data.load(kermany, size, ("test",)).test.images
    assert (change not in ("file", "size")) == torch.equal(before, after)
    damaged = change in ("truncated", "spoiled")
    told = capsys.readouterr().err
    assert ("damaged" in told) == damaged and ("made anew" in told) == (change in ("file", "version"))
    assert len(list((kermany.parent / "cache").iterdir())) == (1 if damaged else 2)


def test_a_table_of_several_blocks_is_written_in_order_and_read_again(tmp_path, capsys):
    def fill(block, start):
        block[:] = np.arange(start, start + len(block))[:, None]

    for _ in range(2):
        made = data.table(tmp_path, "rows", [], (1200, 3), np.int32, fill)
        assert torch.equal(made[:, 2], torch.arange(1200, dtype=torch.int32))
        fill = None  # the second time it is read
    assert capsys.readouterr().err == ""


def test_a_cache_that_could_not_be_finished_leaves_nothing_behind(kermany):
    (kermany / "test/NORMAL/IM-0100-0001-0002.jpeg").write_bytes(b"no picture")
    (kermany / "test/PNEUMONIA/person100_virus_100.jpeg").write_bytes(b"")
    with pytest.raises(data.UserError, match="2 of 12.*IM-0100.*person100_virus"):
        split_of(kermany, "test")
    assert list((kermany.parent / "cache").iterdir()) == []


# ---- batches


def test_prepare_normalises_by_imagenets_mean_and_deviation_and_is_channels_last():
    images = torch.randint(0, 256, (3, 1, 5, 7), dtype=torch.uint8)
    x = data.prepare(images, torch.device("cpu"))
    assert x.shape == (3, 3, 5, 7) and x.is_contiguous(memory_format=torch.channels_last)
    for c, (mean, std) in enumerate(zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)):
        assert torch.allclose(x[:, c], (images[:, 0] / 255 - mean) / std, atol=1e-5)


def test_augmentation_moves_a_film_the_same_way_at_two_sizes_and_never_flips_it():
    theta = data.poses(8, torch.Generator().manual_seed(1))
    assert (torch.linalg.det(theta[:, :, :2]) > 0.8).all()  # a flip has a negative determinant
    large, small = (data.prepare(data.phantoms(8, s, 3)[0], torch.device("cpu"), theta) for s in (96, 48))
    still = data.prepare(data.phantoms(8, 48, 3)[0], torch.device("cpu"))
    shrunk = torch.nn.functional.avg_pool2d(large, 2)
    assert (shrunk - small).abs().mean() < 0.12 < (still - small).abs().mean()


# ---- errors and the command line


@pytest.mark.parametrize("source, says", [("nowhere", "no such folder"), (".", "no folder train")])
def test_a_wrong_folder_names_the_layout_expected(source, says):
    with pytest.raises(data.UserError, match=rf"train/CLASS.*{says}.*--download"):
        data.load(source, 32)


def test_a_class_without_films_is_named(kermany):
    for path in (kermany / "test/NORMAL").iterdir():
        path.unlink()
    with pytest.raises(data.UserError, match="test, found none of NORMAL"):
        split_of(kermany, "test")


def test_the_audit_counts_films_patients_copies_and_unreadable_files(kermany, capsys):
    (kermany / "test/PNEUMONIA/person100_bacteria_100.jpeg").write_bytes(b"no picture")
    copy = kermany / "train/NORMAL/IM-0003-0001.jpeg"
    (kermany / "test/NORMAL/IM-0101-0001-0002.jpeg").write_bytes(copy.read_bytes())
    data.main([str(kermany)])
    text = " ".join(capsys.readouterr().out.split())
    assert "train 17 (17) 18 (17) 35 (34) the paper 1363 3922 5285" in text
    assert "test 4 (4) 8 (8) 12 (12) the paper 236 394 630" in text
    assert "patients in both train and test: 0" in text and "unreadable files: 1" in text
    assert "copies of another film: 1, of them across train and test: 1" in text


# ---- download


class Server(http.server.BaseHTTPRequestHandler):
    """Serves one archive; honours Range, and hangs up after `cut` bytes once."""

    content, cut, ranges = b"", None, []

    def do_GET(self):
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        Server.ranges.append(start)
        if start >= len(self.content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(self.content) - start))
        self.end_headers()
        end, Server.cut = Server.cut, None
        self.wfile.write(self.content[start:end])

    def log_message(self, *_):
        pass


@pytest.fixture
def archive(kermany):
    """(url, sha256) of the miniature set, zipped, on localhost."""
    path = kermany.parent / "set.zip"
    with zipfile.ZipFile(path, "w") as file:
        for film_path in sorted(kermany.rglob("*.jpeg")):
            file.write(film_path, film_path.relative_to(kermany.parent))
    Server.content, Server.cut, Server.ranges = path.read_bytes(), None, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/set.zip", hashlib.sha256(Server.content).hexdigest()
    server.shutdown()


def download(archive, folder="fetched"):
    data.main(["--download", folder, "--url", archive[0], "--sha256", archive[1]])


def test_a_download_is_checked_unpacked_and_readable(archive):
    download(archive)
    assert len(data.list_films("fetched")[0]) == 47


def test_a_broken_download_goes_on_where_it_stopped(archive):
    Server.cut = 5000
    with pytest.raises(data.UserError, match="the same command goes on"):
        download(archive)
    assert not data.Path("fetched").exists()
    download(archive)
    assert Server.ranges == [0, 5000] and len(data.list_films("fetched")[0]) == 47


def test_a_download_that_was_complete_but_not_unpacked_is_not_fetched_again(archive):
    data.Path("fetched.zip.part").write_bytes(Server.content)
    download(archive)
    assert len(data.list_films("fetched")[0]) == 47


def test_an_archive_with_another_hash_is_deleted_and_never_unpacked(archive):
    with pytest.raises(data.UserError, match="SHA-256"):
        download((archive[0], "0" * 64))
    assert not data.Path("fetched").exists() and not data.Path("fetched.zip.part").exists()


def test_nothing_listening_is_one_line_with_the_remedy():
    start = time.time()
    with pytest.raises(data.UserError, match="broke off.*goes on"):
        download(("http://127.0.0.1:9/set.zip", "0" * 64))
    assert time.time() - start < 10


def test_a_folder_with_files_in_it_is_not_written_over(archive, kermany):
    with pytest.raises(data.UserError, match="new or empty"):
        download(archive, str(kermany))


# ---- plumbing


def test_an_interrupted_write_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), data.atomic(path) as part:
        part.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_the_picture_of_phantoms_rims_the_opacities_and_nothing_else():
    data.main(["--phantoms", "phantoms.png"])
    picture = data.decode_image(data.torch.from_numpy(data.np.fromfile("phantoms.png", data.np.uint8)))
    assert picture.shape == (3, 3 * 227 + 3, 6 * 227 + 3)
    coloured = picture[0] != picture[2]
    healthy, sick, rimmed = coloured[: 3 * 227].split(227)
    assert not healthy.any() and not sick.any()
    for column in rimmed[:, : 6 * 227].split(227, dim=1):
        assert column.sum() > 50
        assert torch.nn.functional.avg_pool2d(column[None].float(), 5, 1).max() < 1  # a line, nothing filled


def test_names_that_tell_no_patients_are_told_and_a_missing_test_folder_is_named(tmp_path, capsys):
    for name in ("a", "b", "c", "d"):
        film(tmp_path / f"films/train/HEALTHY/{name}.png")
        film(tmp_path / f"films/train/SICK/{name}s.png")
    assert data.load("films", 16).classes == ["HEALTHY", "SICK"]
    assert "tell no patients" in capsys.readouterr().out
    with pytest.raises(data.UserError, match="found no folder test"):
        data.load("films", 16, ("test",))


def test_the_papers_counts_stand_beside_the_public_films_alone(kermany, capsys):
    data.main([str(kermany)])
    assert "the paper" in capsys.readouterr().out
    data.main(["phantoms"])
    assert "the paper" not in capsys.readouterr().out
