"""Small images and small networks: every test runs the real code on miniatures made here."""

import argparse
import csv
import os
import random
import zlib
from collections import OrderedDict

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # bits are compared here, and only a CPU's repeat to the last one
os.environ["OMP_NUM_THREADS"] = "1"  # networks this small spend their time waiting for a second thread

import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch import nn  # noqa: E402

import data  # noqa: E402
import models  # noqa: E402
import train  # noqa: E402

NIH_HEADER = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
NIH_HEADER += "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],\n"  # its commas as they are


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    """Runs and caches are written where the command is typed: a fresh folder for each test."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    data.print_once.cache_clear()  # each test prints again


@pytest.fixture
def few_phantoms(monkeypatch):
    """The built-in images, fewer of them."""
    few_phantoms_of(monkeypatch)


def few_phantoms_of(patched):
    patched.setattr(data, "PHANTOMS", {"train": (24, 11), "val": (12, 12), "test": (16, 13)})


def image_file(path, side=40, shade=None, channels=1):
    """A picture file of one grey shade, or of noise that its name decides, so that no two are alike."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = torch.Generator().manual_seed(zlib.crc32(path.name.encode()))
    grey = (torch.randint(0, 256, (side, side), generator=noise) if shade is None
            else torch.full((side, side), shade))
    pixels = grey.to(torch.uint8).numpy()
    Image.fromarray(pixels if channels == 1 else pixels[:, :, None].repeat(channels, 2)).save(path)
    return path


@pytest.fixture
def kermany(tmp_path):
    """The public set in miniature, with everything that its archives are known to bring along."""
    root = tmp_path / "chest_xray"
    for i in range(8):
        image_file(root / f"train/PNEUMONIA/person{i}_bacteria_{i}.jpeg")
        image_file(root / f"train/PNEUMONIA/person{i}_virus_{i}.jpeg", channels=3)
        image_file(root / f"train/NORMAL/IM-{i:04d}-0001.jpeg", side=50)
        image_file(root / f"train/NORMAL/NORMAL2-IM-{i:04d}-0001.jpeg")
    image_file(root / "train/PNEUMONIA/person1_bacteria_2.jpeg")  # a second image of one child
    image_file(root / "val/PNEUMONIA/person1946_bacteria_4874.jpeg")
    image_file(root / "val/NORMAL/NORMAL2-IM-1427-0001.jpeg")
    for i in range(100, 104):
        image_file(root / f"test/PNEUMONIA/person{i}_bacteria_{i}.jpeg")
        image_file(root / f"test/PNEUMONIA/person{i}_virus_{i}.jpeg")
        image_file(root / f"test/NORMAL/IM-{i:04d}-0001-0002.jpeg")
    for junk in ("train/.DS_Store", "train/PNEUMONIA/.DS_Store", "train/PNEUMONIA/._person1_bacteria_1.jpeg",
                 "__MACOSX/train/NORMAL/._IM-0001-0001.jpeg", "train/NORMAL/Thumbs.db"):
        (root / junk).parent.mkdir(parents=True, exist_ok=True)
        (root / junk).write_bytes(b"junk")
    image_file(root / "chest_xray/train/NORMAL/IM-0001-0001.jpeg")  # the nested copy in Kaggle's archive
    return root


@pytest.fixture
def mura(tmp_path):
    """MURA v1.1 in miniature: seven body parts, patients with several studies and of several body parts."""
    root = tmp_path / "MURA-v1.1"
    for part in ("ELBOW", "FINGER", "FOREARM", "HAND", "HUMERUS", "SHOULDER", "WRIST"):
        for patient in range(1, 5):
            study = root / f"train/XR_{part}/patient{patient:05d}/study1_positive"
            image_file(study / f"image1-{part}{patient}.png", shade=20 * patient)
            image_file(study.with_name("study2_negative") / f"image1-{part}{patient}b.png", channels=3)
        image_file(root / f"valid/XR_{part}/patient11185/study1_positive/image1-{part}.png")
        (root / f"train/XR_{part}/patient00001/study1_positive/._image1.png").write_bytes(b"junk")
    (root / "train_image_paths.csv").write_text("MURA-v1.1/train/XR_ELBOW/patient00001/...")
    return root


@pytest.fixture
def nih(tmp_path):
    root = tmp_path / "ChestX-ray14"
    rows = [("00000001_000.png", "Cardiomegaly|Emphysema", 1), ("00000001_001.png", "No Finding", 1),
            ("00000002_000.png", "Pleural_Thickening", 2), ("00000003_000.png", "Infiltration|Mass", 3),
            ("00000003_001.png", "Hernia", 3), ("00000004_000.png", "No Finding", 4),
            ("00000005_000.png", "Mass", 5), ("00000006_000.png", "Mass", 6)]
    text = "".join(
        f"{name},{found},0,{patient},58,M,PA,2894,2729,0.143,0.143,\n" for name, found, patient in rows
    )
    for i, (name, _, _) in enumerate(rows):
        image_file(root / f"images_{i % 2 + 1:03d}/images/{name}")
    (root / "Data_Entry_2017.csv").write_text(NIH_HEADER + text)
    (root / "train_val_list.txt").write_text("\n".join(name for name, _, p in rows if p < 5))
    (root / "test_list.txt").write_text("\n".join(name for name, _, p in rows if p >= 5) + "\n")
    return root


@pytest.fixture
def chexpert(tmp_path):
    root = tmp_path / "CheXpert-v1.0-small"
    names = data.CHEXPERT
    header = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", "No Finding", *names]
    for part, patients in (("train", range(1, 7)), ("valid", range(64541, 64543))):
        root.mkdir(exist_ok=True)
        with open(root / f"{part}.csv", "w") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            for patient in patients:
                for view in ("frontal", "lateral"):
                    path = f"{part}/patient{patient:05d}/study1/view1_{view}.jpg"
                    image_file(root / path)
                    values = ["1.0", "0.0", "-1.0", ""] + [""] * (len(names) - 4)
                    row = [f"{root.name}/{path}", "Male", "60", view.title(), "AP", "", *values]
                    writer.writerow(row)
    return root


def tiny_network():
    """A network of one's own with BatchNorm, dropout and two fully connected layers, for images of 32 pixels."""
    features = nn.Sequential(nn.Conv2d(3, 8, 5, stride=3), nn.BatchNorm2d(8), nn.ReLU(),
                             nn.AdaptiveAvgPool2d(3), nn.Flatten())
    classifier = nn.Sequential(nn.Dropout(0.1), nn.Linear(72, 16), nn.ReLU(), nn.Linear(16, 1000))
    return nn.Sequential(OrderedDict(features=features, classifier=classifier))


models.NETWORKS["tiny"] = tiny_network  # for --arch tiny


SMALL = ["--arch", "squeezenet1_1", "--size", "32", "--epochs", "2", "--batch-size", "8", "--lr", "0.01",
         "--wrong-labels", "0", "--labels-per-class", "1000", "--steps-per-epoch", "3"]
TINY = ["--arch", "tiny", *SMALL[2:]]  # a third of the time


def asked_for(script, doc, what, n):
    """The command line of a loop too long for the suite: seeds its random choices, returns how many."""
    p = argparse.ArgumentParser(description=doc, formatter_class=data.Help)
    p.add_argument(f"--{what}", type=int, default=n, help="how many")
    p.add_argument("--seed", type=int, default=0, help="of what is chosen at random")
    args = p.parse_args()
    random.seed(args.seed)
    return getattr(args, what)


def fit(*flags, role="teacher", small=SMALL):
    """Type `train.py --role ROLE ...` with a small network; returns the arguments as they were understood."""
    argv = ["--role", role, *small, *flags]
    train.main(argv)
    return train.get_args(argv)


def run(*flags, role="teacher"):
    """The same with the smallest network."""
    return fit(*flags, role=role, small=TINY)
