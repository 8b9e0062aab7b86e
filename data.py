"""Films in, tensors out: every split is one uint8 tensor of images, decoded once and kept in a cache.

    data = load("data/chest_xray", size=224)     data.train.images (N, 1, 224, 224), .labels, .ids, .groups
    data = load("phantoms", size=112)            chest films drawn here: no download, the truth is known

    python data.py data/chest_xray               count and audit a folder
    python data.py --download data/chest_xray    fetch the public set, 1.2 GB
    python data.py --phantoms phantoms.png       what the built-in films look like

There is no Dataset, no DataLoader and no worker: a batch is `images[index]`. Validation is carved out
of the training films by patient and depends on nothing but patients' names, never on a seed.
"""

import argparse
import ast
import csv
import hashlib
import itertools
import json
import math
import os
import platform
import re
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.io import ImageReadMode, decode_image, encode_png
from torchvision.transforms.functional import resize
from torchvision.utils import make_grid

VERSION = 2  # of what is written into caches: raise it when the same files would give other pixels
URL = "https://data.mendeley.com/public-files/datasets/rscbjbr9sj/files/f12eaf6d-6023-432f-acc9-80c9d7393433/file_downloaded"  # noqa: E501
SHA256 = "13efc055629733dbab07877f8b3c9f81097840dbcdaa326a8542322c2281ce36"
PAPER = {"train": (1363, 3922), "test": (236, 394)}  # NORMAL, PNEUMONIA: Table III of arXiv 2406.08837
FILM = re.compile(r"[^.].*\.(jpe?g|png)", re.IGNORECASE)  # and not .DS_Store, ._person1_virus_6.jpeg
# A patient, in the paths of the public set and of MURA. Bacteria and virus are two series of numbers:
# person7_virus is another child than person7_bacteria, and NORMAL2-IM-0007 another than IM-0007.
PATIENT = re.compile(r"person\d+_(?:bacteria|virus)|(?:NORMAL2-)?IM-\d+|(?:NORMAL|BACTERIA|VIRUS)-\d+"
                     r"|patient\d+")
MOST_PIXELS, LEAST_SIDE = 100_000_000, 8  # what a picture may claim and still be a film
# ImageNet's, for grey films all the same; as a shift and a scale of bytes.
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
SHIFT, SCALE = -MEAN / STD, 1 / (255 * STD)


class UserError(ValueError):
    """A mistake that whoever typed the command can mend: what was needed, what was found, what to do."""


# ---- phantoms: chest films drawn here ---------------------------------------------------------------


def phantoms(n, size, seed):
    """n synthetic chest films: images (n, 1, size, size) uint8, labels (n,), masks (n, size, size) bool.

    Half of them show pneumonia: one to three hazy opacities inside the lungs, where their mask is True.
    """
    labels = torch.arange(n) % 2
    images, masks, _ = draw(n, size, seed, labels[:, None].float())
    return images, labels, masks


def draw(n, size, seed, findings):
    """images, masks of the opacities, masks of the lungs; findings (n, 1 or 3) of 0 and 1: opacity, and if
    there are three columns also a large heart and fluid above the diaphragm.

    All differ in pose, exposure, heart, ribs, vessels and noise. The same seed gives the same films at
    every size, so a teacher may read them at 112 and its student at 80 pixels.
    """
    g = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=g)

    opacity, large_heart, fluid = F.pad(findings, (0, 3 - findings.shape[1])).unbind(1)
    angle, scale, shift = uniform(-0.08, 0.08), uniform(0.92, 1.08), uniform(-0.05, 0.05, 2)
    gain, heart, lung = uniform(0.85, 1.10), uniform(0.26, 0.36), uniform(0.9, 1.1, 2)
    ribs, phase = uniform(10, 13), uniform(0, 6.3)
    blobs = torch.stack([  # 3 opacities, then 6 vessels: x, y, radius, strength
        torch.cat([uniform(0.30, 0.55, 3), uniform(0.08, 0.38, 6)], 1) * uniform(-1, 1, 9).sign(),
        torch.cat([uniform(-0.45, 0.35, 3), uniform(-0.3, 0.3, 6)], 1),
        torch.cat([uniform(0.14, 0.24, 3), uniform(0.02, 0.05, 6)], 1),
        torch.cat([uniform(0.33, 0.53, 3) * (uniform(0, 3, 1) > torch.arange(3)), uniform(0.1, 0.25, 6)], 1),
    ], dim=-1)  # (n, 9, 4)
    blobs[:, :3, 3] *= opacity[:, None]
    heart += 0.12 * large_heart
    haze, grain = uniform(-1, 1, 1, 12, 12), torch.randn(n, 1, 96, 96, generator=g)

    images = torch.empty(n, 1, size, size, dtype=torch.uint8)
    masks, inside = torch.empty(2, n, size, size, dtype=torch.bool)
    across = (torch.arange(size) + 0.5) / size * 2 - 1  # pixel centres, from -1 to 1
    for i in range(n):
        down, right = torch.meshgrid(across, across, indexing="ij")
        x = (right * angle[i].cos() - down * angle[i].sin()) * scale[i] + shift[i, 0]
        y = (right * angle[i].sin() + down * angle[i].cos()) * scale[i] + shift[i, 1]

        def ellipse(cx, cy, a, b, x=x, y=y):  # 1 inside, 0 outside, a soft edge between
            return torch.sigmoid(12 * (1 - ((x - cx) / a) ** 2 - ((y - cy) / b) ** 2))

        lungs = ellipse(-0.42, -0.05, 0.31, 0.62 * lung[i, 0]) + ellipse(0.42, -0.05, 0.31, 0.62 * lung[i, 1])
        inside[i] = lungs > 0.5
        film = 0.55 * ellipse(0, 0.1, 0.95, 1.15) - 0.36 * lungs
        film += 0.28 * ellipse(0.13, 0.27, heart[i], 0.34) + 0.12 * torch.exp(-((x / 0.09) ** 2))
        film += 0.05 * lungs * torch.sin(ribs[i] * (y + 0.35 * x**2) + phase[i]).clamp(min=0)
        film += 0.25 * fluid[i] * lungs * torch.sigmoid(25 * (y - 0.22))
        bx, by, radius, strength = blobs[i, :, :, None, None].unbind(1)
        spots = strength * torch.exp(-((x - bx) ** 2 + (y - by) ** 2) / (2 * radius**2)) * lungs.clamp(max=1)
        masks[i] = (spots[:3] > 0.5 * strength[:3].clamp(min=1e-3)).any(0)
        texture = [F.interpolate(t[i][None], size=(size, size), mode="bilinear", antialias=True)[0, 0]
                   for t in (haze, grain)]
        film = gain[i] * (film + spots.sum(0)) + 0.04 * texture[0] + 0.04 * texture[1] + 0.05
        images[i, 0] = (255 * film.clamp(0, 1)).to(torch.uint8)
    return images, masks, inside


# ---- lists of films: what there is, before any pixel is read ----------------------------------------

PHANTOMS = {"train": (640, 11), "val": (160, 12), "test": (600, 15)}  # films and seed of each part
FINDINGS = ["OPACITY", "LARGE_HEART", "FLUID"]  # of the built-in films with several findings: `findings`
WRONG = 0.2  # share of the phantoms' training labels that are wrong, as those read off reports are


def film(id, label, part, path=None, group=None, negative=False):
    """label: index of the class, or a 0, 1 or NaN for every finding; part: train, val or test; group: the
    patient (unknown: one of its own); negative: bright where others are dark."""
    kind = label if isinstance(label, int) else 0  # with several findings all are of one kind
    return SimpleNamespace(id=id, label=label, kind=kind, part=part, path=path, group=group or id,
                           negative=negative)


def list_films(source, classes=None, uncertain="ignore"):
    """Every film of a source, and the names of its classes; nothing is decoded yet."""
    if source in ("phantoms", "findings"):
        films = []
        for part, (n, seed) in PHANTOMS.items():
            labels = (torch.arange(n) % 2).tolist()
            if source == "findings":  # independent of each other
                g = torch.Generator().manual_seed(2000 + seed)
                labels = (torch.rand(n, len(FINDINGS), generator=g) < 0.4).float().tolist()
            films += [film(f"phantom-{part}-{i}", label, part) for i, label in enumerate(labels)]
        return films, ["NORMAL", "PNEUMONIA"] if source == "phantoms" else FINDINGS
    for layout in LAYOUTS:
        if all(any(Path(source).glob(pattern)) for pattern in layout["csv"]):
            return list_csv(Path(source), layout, uncertain)
    for root in (Path(source), Path(source) / "chest_xray"):  # archives hold one folder more, or a copy in it
        if (root / "train").is_dir():
            return list_class_folders(root, classes)
    found = "no folder train in it" if Path(source).exists() else "no such folder"
    raise UserError(
        f"films needed in {source}, as train/CLASS/*.jpeg and test/CLASS/*.jpeg (CLASS: NORMAL, PNEUMONIA) "
        f"or with one of the public CSVs, found {found}: check --data, or fetch the public set:  "
        f"python data.py --download {source}"
    )


def list_class_folders(root, classes):
    """Kermany's set as Kaggle or Mendeley ship it, MURA v1.1, or any other folder of folders like them.

    A class is a folder, and all films below it are its films. The test films lie in `test`, or else in
    `valid` (MURA's). Kaggle's `val` holds 16 films, the last of each training class: too few to choose
    anything by, so they go back to train. With classes=3 pneumonia is parted by the names of its files.
    """
    root = root.absolute()  # "." would begin no path
    test = "test" if (root / "test").is_dir() else "valid"
    folders = [d for part in ("train", "val", "valid", "test") for d in (root / part).glob("[!._]*/")]
    names = sorted({d.name for d in folders}, key=lambda name: (name.upper() != "NORMAL", name))
    split = classes == 3 and names == ["NORMAL", "PNEUMONIA"]
    films = []
    for path in sorted(os.path.join(d, name) for folder in folders for d, _, found in os.walk(folder)
                       for name in found if FILM.fullmatch(name)):
        id = path[len(str(root)) + 1 :].replace(os.sep, "/")  # strings, for a Path costs 30 microseconds
        part, folder, rest = id.split("/", 2)
        label = names.index(folder)
        if split and label:
            kind = re.search("bacteria|virus", rest.lower())
            if not kind:
                raise UserError(f"--classes 3 needs bacteria or virus in the names of pneumonia films, "
                                f"found {path}: use --classes 2")
            label = 1 + (kind[0] == "virus")
        patient = PATIENT.search(rest)
        part = "test" if part == test else "train"
        films.append(film(id, label, part, path, patient and patient[0]))
    if films and all(f.group == f.id for f in films):
        print("the films' names tell no patients: each film is taken for one, see PATIENT in data.py")
    return films, ["NORMAL", "BACTERIAL", "VIRAL"] if split else [n.removeprefix("XR_") for n in names]


# The public sets with several findings a film, by their CSVs. `test`: a list of file names, or the CSV whose
# films they are, or the share of patients to hold back where the set has no split of its own.
LAYOUTS = [
    dict(  # ChestX-ray14: findings parted by |, in the order of its authors
        csv=["Data_Entry_2017*.csv"], image="Image Index", patient="Patient ID", test="test_list.txt",
        found=lambda row: row["Finding Labels"].split("|"),
        classes=["Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia",
                 "Pneumothorax", "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening",
                 "Hernia"],
    ),
    dict(  # CheXpert: a column a finding, 1.0, 0.0, -1.0 (uncertain) or empty (not mentioned: taken as 0)
        csv=["train.csv", "valid.csv"], image="Path", patient="Path", test="valid.csv",
        keep=lambda row: row["Frontal/Lateral"] == "Frontal",  # side views are left out
        classes=["Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema",
                 "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion",
                 "Pleural Other", "Fracture", "Support Devices"],
    ),
    dict(  # PadChest: a Python list in a cell, its words with stray spaces; 16-bit, some films negative
        csv=["PADCHEST*.csv"], image="ImageID", patient="PatientID", test=0.1,
        found=lambda row: [word.strip() for word in ast.literal_eval(row["Labels"] or "[]")],
        negative=lambda row: row["PhotometricInterpretation_DICOM"] == "MONOCHROME1",
        keep=lambda row: row["Projection"] in ("PA", "AP", "AP_horizontal"),
        classes=["atelectasis", "cardiomegaly", "pleural effusion", "infiltrates", "mass", "nodule",
                 "pneumonia", "pneumothorax", "consolidation", "interstitial pattern", "emphysema",
                 "pulmonary fibrosis", "pleural thickening", "hiatal hernia"],
    ),
]


def list_csv(root, layout, uncertain):
    """Films with several findings, as their set's CSV has them; those not on the disk are left out, and told.

    uncertain: a label of -1 is unknown and masked (ignore), or taken for 0 (zero) or 1 (one).
    """
    unsure = {"ignore": math.nan, "zero": 0.0, "one": 1.0}[uncertain]
    values = {0.0: 0.0, 1.0: 1.0, -1.0: unsure}
    everywhere = [] if layout["image"] == "Path" else os.walk(root)
    where = {name: d for d, _, names in everywhere for name in names}
    test = layout["test"]
    listed = ()
    if str(test).endswith(".txt"):
        if not (root / test).exists():
            raise UserError(f"{test} needed in {root}, found none: it says which films are for the test")
        listed = set((root / test).read_text().split())

    def read(row, csv_name):
        id, patient = row[layout["image"]], row[layout["patient"]]
        # CheXpert's paths begin with a folder that may have another name here, and hold the patient's.
        path = os.path.join(where[id], id) if id in where else os.path.join(root, id.split("/", 1)[-1])
        if not os.path.exists(path):
            return None
        patient = PATIENT.search(id)[0] if patient == id else patient
        if "found" in layout:
            found = layout["found"](row)
            label = [float(finding in found) for finding in layout["classes"]]
        else:
            label = [values[float(row[finding] or 0)] for finding in layout["classes"]]
        held_back = id in listed or csv_name == test
        if isinstance(test, float):
            held_back = int.from_bytes(by_hash(f"test {patient}")[:4]) < test * 2**32
        negative = "negative" in layout and layout["negative"](row)
        return film(id, label, "test" if held_back else "train", path, patient, negative)

    films = []
    for path in sorted(path for pattern in layout["csv"] for path in root.glob(pattern)):
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            try:
                keep = layout.get("keep")  # without it, all
                films += [read(row, path.name) for row in filter(keep, rows)]
            except (ValueError, TypeError, LookupError, AttributeError, SyntaxError, csv.Error) as error:
                raise UserError(f"{path} as it was published needed, found something else in line "
                                f"{rows.line_num} ({repr(error).splitlines()[0]}): fetch it anew") from None
    there = [f for f in films if f]
    if len(there) < len(films):
        print(f"{len(films) - len(there)} films of the CSVs are not in {root}, and left out")
    return there, layout["classes"]


def by_hash(name):
    """A shuffle that nothing but names decides: the same on every machine, with every seed and subset."""
    return hashlib.sha256(name.encode()).digest()


def take_per_class(films, room, names):
    """Put aside what is more than room[part] films of a class; the shortfall is printed.

    It comes after validation was carved out: a small subset never trains on what a large one holds back.
    """
    taken = Counter()
    for f in sorted(films, key=lambda f: by_hash(f.id)):
        if f.part in room:
            taken[f.part, f.label] += 1
            if taken[f.part, f.label] > room[f.part]:
                f.part = "aside"
    for label, name in enumerate(names):
        found = sum(min(taken[part, label], n) for part, n in room.items())
        if found < sum(room.values()):
            print(f"--per-class {sum(room.values())}: only {found} films of {name}")


def carve_validation(films, fraction):
    """Move whole patients from train to val, until every class has given up its fraction of films.

    Films of one child look alike: with a child on both sides, validation would reward recognising it.
    """
    patients = {}
    for f in films:
        if f.part == "train":
            patients.setdefault(f.group, []).append(f)
    counts = Counter(f.kind for same in patients.values() for f in same)
    wanted = {label: max(1, round(fraction * n)) for label, n in counts.items()}
    for group in sorted(patients, key=by_hash):
        if any(wanted[f.kind] > 0 for f in patients[group]):
            for f in patients[group]:
                f.part = "val"
                wanted[f.kind] -= 1


# ---- images: decoded once, kept as one tensor -------------------------------------------------------


def opened(path):
    content = np.fromfile(path, np.uint8)
    width, height = claimed(content.tobytes())
    if width * height > MOST_PIXELS or min(width, height) < LEAST_SIDE:
        raise RuntimeError(f"{width} x {height} pixels are no film")
    return decode_image(torch.from_numpy(content), ImageReadMode.GRAY)


def decode(path, size, negative=False):
    """One film as (1, size, size) uint8: grey, and squashed to a square so that no lung is cut off."""
    image = opened(path)
    if image.dtype == torch.uint16:  # 16-bit PNG: 65535 becomes 255
        image = (image.int() // 257).to(torch.uint8)
    image = resize(image, [size, size], antialias=True)
    return 255 - image if negative else image


def claimed(content):
    """Width and height by the file's own header, before a decoder reserves memory for so many pixels."""
    if content[:8] == b"\x89PNG\r\n\x1a\n":
        place, kind = 8, b""
        while kind != b"IEND":  # each chunk's CRC, for the decoder is known to crash on damaged data
            length, kind = int.from_bytes(content[place : place + 4]), content[place + 4 : place + 8]
            end = place + 8 + length
            if not kind or zlib.crc32(content[place + 4 : end]) != int.from_bytes(content[end : end + 4]):
                raise RuntimeError("a damaged PNG")
            place = end + 4
        return int.from_bytes(content[16:20]), int.from_bytes(content[20:24])
    place = 2
    while content[:2] == b"\xff\xd8" and place + 9 <= len(content):  # JPEG: segments of a known length
        marker, segment = content[place + 1], content[place + 2 : place + 9]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return int.from_bytes(segment[5:7]), int.from_bytes(segment[3:5])
        # Any number of FF may stand before a marker.
        place += 1 if marker == 0xFF else 2 + int.from_bytes(segment[:2])
    raise RuntimeError("neither a JPEG nor a PNG, or cut off")


def on_all_cores(function, films):
    """function(i, film) for every film; returns a line for each that cannot be read. Threads are enough,
    for decoding releases Python's lock; each has a stretch of films, which costs less than film by film."""
    bad = []

    def stretch(part):
        for i in part:
            try:
                function(i, films[i])
            except RuntimeError as error:  # torchvision's word for a file that is no picture
                bad.append(f"{films[i].path} ({str(error).splitlines()[0]})")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(stretch, np.array_split(range(len(films)), len(films) // 8 + 1)))
    return sorted(bad)


def decoding(films, size):
    """What fills a table with the films; every unreadable one is named."""
    bad = []

    def fill(block, start):
        def one(i, film):
            block[i] = decode(film.path, size, film.negative).numpy()

        bad.extend(on_all_cores(one, films[start : start + len(block)]))
        if bad and start + len(block) == len(films):
            raise UserError(f"{len(bad)} of {len(films)} films cannot be read, mend or remove: "
                            f"{'; '.join(bad)}")

    return fill


def load(source, size, splits=("train", "val"), per_class=None, classes=None, val_fraction=0.1,
         uncertain="ignore", cache="cache"):
    """The splits asked for, each with .images (N, 1, size, size) uint8, .labels, .ids and .groups; labels
    are (N,) classes, or (N, K) floats where a film may have several findings (.multilabel).

    Also .classes, .multilabel and .source. Only evaluate.py asks for "test".
    """
    films, names = list_films(str(source), classes, uncertain)
    multilabel = bool(films) and not isinstance(films[0].label, int)
    if per_class and multilabel:
        raise UserError(f"--per-class needs films of one class each, those of {source} may have several")
    if len(names) < 2 or classes not in (None, len(names)):
        raise UserError(f"{classes or 'at least 2'} classes needed in {source}, found {len(names)}: {names}")
    room = {"train": per_class}
    if all(f.part != "val" for f in films):  # the phantoms have validation films of their own
        carve_validation(films, val_fraction)
        if per_class:
            held_back = min(per_class - 1, max(1, round(val_fraction * per_class)))
            room = {"train": per_class - held_back, "val": held_back}
    if per_class:
        take_per_class(films, room, names)
    data = SimpleNamespace(classes=names, multilabel=multilabel, source=str(source))
    for part in splits:
        chosen = [f for f in films if f.part == part]
        if not chosen and part == "test":
            raise UserError(f"test films needed in {source}, found no folder test (nor valid): add one, with "
                            f"films of patients who are not in train")
        missing = set(range(1 if multilabel else len(names))) - {f.kind for f in chosen}
        if missing:
            raise UserError(f"films of every class needed for {part}, found none of "
                            f"{names[min(missing)]} in {source}: add films of more patients")
        setattr(data, part, load_split(chosen, part, str(source), size, cache))
    sums = {part: {hash(image.numpy().tobytes()) for image in getattr(data, part).images} for part in splits}
    for one, other in itertools.combinations(splits, 2):
        if same := len(sums[one] & sums[other]):  # which would make `other` look better than it is
            print(f"{same} films of {other} are exact copies of films in {one}: remove them from one of the "
                  f"two;  python data.py DIR  counts them", file=sys.stderr)
    return data


def load_as(args, size, splits, source=None):
    """load() as a run's flags say, a dict: the same films for training and for judging."""
    flags = {flag: args[flag] for flag in ("per_class", "classes", "val_fraction", "uncertain", "cache")}
    return load(source or args["data"], size, splits, **flags)


def load_split(films, part, source, size, cache):
    split = SimpleNamespace(ids=[f.id for f in films], groups=[f.group for f in films])
    split.labels = torch.tensor([f.label for f in films])
    if source in ("phantoms", "findings"):
        n, seed = PHANTOMS[part]
        chosen = [int(f.id.split("-")[2]) for f in films]
        shown = torch.tensor([f.label for f in list_films(source)[0] if f.part == part]).float().view(n, -1)
        split.images, split.masks, split.lungs = (tensor[chosen] for tensor in draw(n, size, seed, shown))
        if part == "train" and source == "phantoms":
            # A stream of its own: with the seed of the drawings, the tilted films would be the wrong ones.
            wrong = torch.rand(n, generator=torch.Generator().manual_seed(1000 + seed))[chosen] < WRONG
            split.labels = torch.where(wrong, 1 - split.labels, split.labels)
        split.fingerprint = fingerprint(VERSION, source, n, seed, split.ids)
        return split
    stats = [(f.id, f.negative, stat.st_size, stat.st_mtime_ns) for f in films for stat in [os.stat(f.path)]]
    split.fingerprint = fingerprint(VERSION, stats)
    name, shape = f"{Path(source).name}-{part}-{size}", (len(films), 1, size, size)
    split.images = table(cache, name, stats, shape, np.uint8, decoding(films, size))
    return split


def prepare(images, device, theta=None):
    """uint8 films (B, 1, H, W) -> what networks read, (B, 3, H, W) floats, normalised, on the device.

    theta: (B, 2, 3) affine matrices in relative coordinates, so the same ones serve two image sizes.
    """
    x = images.to(device, non_blocking=True).float()
    if theta is not None:
        grid = F.affine_grid(theta.to(device).double(), x.shape, align_corners=False)
        x = F.grid_sample(x, grid.float(), align_corners=False)  # double: autocast would take 8 bits
    # Channels last from the start, in one pass: convolutions run up to twice as fast on such tensors.
    shift, scale = (t.to(device, non_blocking=True) for t in (SHIFT, SCALE))
    return torch.addcmul(shift, x.permute(0, 2, 3, 1), scale).permute(0, 3, 1, 2)


def poses(n, generator):
    """(n, 2, 3): one small rotation, zoom and shift a film. No flips: the heart has a side."""
    angle, zoom, across, down = torch.rand(4, n, generator=generator) * 2 - 1
    angle, zoom = 0.12 * angle, 1 + 0.08 * zoom  # 7 degrees, 8 percent
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    return torch.stack([cos, -sin, 0.06 * across, sin, cos, 0.06 * down], dim=1).view(n, 2, 3)


# ---- plumbing the other scripts share -------------------------------------------------------------


def run(main):
    """Call a script's main: the user's mistakes end in one line and exit code 1, ours in a traceback."""
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


@contextmanager
def atomic(path, sync=True):
    """A name to write to; the file takes its place at `path` only once it is whole and, if `sync`, on the
    disk (a table is not waited for: its checksum tells)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    for left in path.parent.glob(f".{path.name}.*.part"):
        try:
            os.kill(int(left.name.split(".")[-2]), 0)  # signal 0 only asks whether that process lives
        except ProcessLookupError:  # it was killed half-way
            left.unlink(missing_ok=True)
        except OSError:
            pass  # another user's
    try:
        yield part
        if sync:
            with open(part, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"{path} could not be written ({error}): what was there before is whole; make room, "
                        f"and repeat the command") from None
    finally:
        part.unlink(missing_ok=True)


def write(path, content):
    with atomic(path) as part:
        part.write_bytes(content)


def write_picture(path, image):
    """A PNG; by Python's own writing, for torchvision's does not notice a full disk."""
    write(path, encode_png(image).numpy().tobytes())


def file_hash(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(*facts):
    """16 hex digits that change when any of the facts does."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def table(folder, name, facts, shape, dtype, fill):
    """An array computed once, then mapped from a file at every start; fill(block, start) writes its rows
    from `start` on into a block, so that a table may be larger than the memory.

    Its file is named after the facts that it was made from, so one made from others is never read, and
    ends in the array's CRC-32, so one that a crash or a bad disk spoiled is made again.
    """
    path = Path(folder) / f"{name}-{fingerprint(VERSION, facts, shape, dtype)}.table"
    dtype = np.dtype(dtype)
    if path.exists():  # mapped: pages are read when they are indexed
        content = np.memmap(path, np.uint8, "c") if path.stat().st_size else np.empty(0, np.uint8)
        if content[-8:].tobytes() == b"%08x" % zlib.crc32(content[:-8]):
            return torch.from_numpy(content[:-8].view(dtype).reshape(shape))
        print(f"{path} is damaged, not the bytes that were written: made again", file=sys.stderr)
    elif any(path.parent.glob(f"{name}-*.table")):
        print(f"{folder} holds {name} of other films or settings: made anew for these", file=sys.stderr)
    with atomic(path, sync=False) as part, open(part, "wb") as file:
        buffer, crc = np.empty((min(shape[0], 512), *shape[1:]), dtype), 0
        for start in progress(range(0, shape[0], 512), f"making {path.name}"):
            block = buffer[: shape[0] - start]
            fill(block, start)
            file.write(block)
            crc = zlib.crc32(block, crc)
        file.write(b"%08x" % crc)
    return torch.from_numpy(np.memmap(path, dtype, "c", shape=tuple(shape)))


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The script's docstring as it was typed, then every flag with its default, where it has one."""

    def _get_help_string(self, action):
        silent = action.default is None or isinstance(action.default, bool)
        return action.help if silent else super()._get_help_string(action)


def parser(usage, doc):
    return argparse.ArgumentParser(usage=f"python {usage} [FLAGS]", description=doc, allow_abbrev=False,
                                   formatter_class=lambda prog: Help(prog, 2, 32, 110))


def device_flag(parser):
    def device(name):
        try:
            torch.empty(0, device=name)
            return name
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise argparse.ArgumentTypeError(f"{name} cannot be used here ({reason}); try cpu") from None

    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device, default=default, help="cpu, cuda or cuda:N")


def origin(device):
    """What a number came from: command, commit, versions and machine."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:  # no git on this machine
        commit = "unknown"
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return {"command": " ".join(sys.argv), "commit": commit, "torch": str(torch.__version__),
            "device": cpu if "cuda" not in str(device) else torch.cuda.get_device_name(device)}


def progress(items, text):
    """Pass `items` on; on a terminal, a bar within the line while they go by. A log file gets nothing."""
    if not sys.stdout.isatty():
        yield from items
        return
    for done, item in enumerate(items):
        filled = 24 * done // len(items)
        print(f"\r{text}  [{'=' * filled}{' ' * (24 - filled)}] {done}/{len(items)}", end="", flush=True)
        yield item
    print("\r\033[K", end="", flush=True)


# ---- the command line: download, count, audit -------------------------------------------------------


def audit(source, classes=None):
    """Table III, and whatever would make a result on these films less than it seems."""
    films, names = list_films(source, classes)
    if not films:
        raise UserError(f"films needed in {source}, found none in its class folders: check the path")
    print("".join(f"{title:>18}" for title in ["films (patients)", *names, "all"]))
    for part in ("train", "val", "test"):
        mine = [f for f in films if f.part == part]
        columns = [[f for f in mine if (f.label == k if isinstance(f.label, int) else f.label[k] == 1)]
                   for k in range(len(names))] + [mine]
        if mine:
            cells = [f"{len(column)} ({len({f.group for f in column})})" for column in columns]
            print(f"{part:>18}" + "".join(f"{cell:>18}" for cell in cells))
        if part in PAPER and names == ["NORMAL", "PNEUMONIA"] and any(f.group != f.id for f in mine):
            print(f"{'the paper':>18}" + "".join(f"{n:>18}" for n in (*PAPER[part], sum(PAPER[part]))))
    train, test = ({f.group for f in films if f.part == part} for part in ("train", "test"))
    print(f"\npatients in both train and test: {len(train & test)}")
    if source in ("phantoms", "findings"):
        return print(f"training labels that are wrong on purpose: {WRONG * (source == 'phantoms'):.0%}")
    print(f"films whose name tells no patient, each taken for one: {sum(f.group == f.id for f in films)}")

    found = {}  # the parts in which a content occurs

    def look(i, f):
        opened(f.path)
        found.setdefault(file_hash(f.path), []).append(f.part)

    bad = on_all_cores(look, films)
    print(f"unreadable files: {len(bad)}" + "".join(f"\n  {line}" for line in bad))
    print(f"exact copies of another film: {sum(map(len, found.values())) - len(found)}, "
          f"of them across train and test: {sum(len(set(parts)) > 1 for parts in found.values())}")


def show_phantoms(path, n=6, size=224):
    """A picture of built-in films: a row without findings, one with opacities, the same ones outlined."""
    images, labels, masks = phantoms(2 * n, size, PHANTOMS["test"][1])
    films, extent = images.repeat(1, 3, 1, 1), masks[:, None].float()
    rim = F.max_pool2d(extent, 3, 1, 1) > extent  # pixels that touch an opacity from outside
    outlined = films.where(~rim, torch.tensor([255, 90, 0], dtype=torch.uint8).view(1, 3, 1, 1))
    rows = torch.cat([films[labels == 0], films[labels == 1], outlined[labels == 1]])
    write_picture(path, make_grid(rows, nrow=n, padding=3))
    print(f"{n} built-in films without an opacity, {n} with, and where it is: {path}")


def download(folder, url, sha256):
    """Fetch, check, unpack. A broken download goes on where it stopped; a wrong file is never unpacked."""
    folder = Path(folder).resolve()
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"a new or empty folder needed to unpack into, {folder} has files: choose another")
    part = folder.with_name(folder.name + ".zip.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        fetch(url, part)
    except OSError as error:  # URLError and a broken connection are OSErrors too
        raise UserError(f"{url} broke off ({error}): the same command goes on from there") from None
    found = file_hash(part)
    if found != sha256:
        part.unlink()
        raise UserError(f"{url} should have SHA-256 {sha256}, found {found}: deleted; run the command again")
    unpacked = folder.with_name(folder.name + ".unpacking")
    zipfile.ZipFile(part).extractall(unpacked)  # which strips absolute paths and .. from names
    if folder.exists():
        folder.rmdir()
    os.replace(unpacked, folder)
    part.unlink()
    print(f"unpacked to {folder}; now  python data.py {folder}")


def fetch(url, part):
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"})
    try:
        answer = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing beyond what we have: it was complete
            return
        raise
    if not answer.headers["Content-Length"]:
        raise UserError(f"the number of bytes needed from {url}, found none: fetch and unpack it by hand")
    with answer, open(part, "ab" if answer.status == 206 else "wb") as file:
        total = file.tell() + int(answer.headers["Content-Length"])
        print(f"{url}: {file.tell() / 1e6:.1f} of {total / 1e6:.1f} MB are here")
        for _ in progress(range((total - file.tell() >> 20) + 1), "downloading, MB"):
            file.write(answer.read(1 << 20))
        if file.tell() < total:
            raise OSError(f"{file.tell()} of {total} bytes")


def get_args(argv=None):
    p = parser("data.py [DIR]", __doc__)
    g = p.add_argument_group("what do I have")
    g.add_argument("source", nargs="?", metavar="DIR", help="the folder to count and audit (or: phantoms)")
    g.add_argument("--classes", type=int, choices=[2, 3], help="3: normal, bacterial, viral by file name")
    g.add_argument("--phantoms", metavar="FILE.png", help="draw some of the built-in films")
    g = p.add_argument_group("where do I get the public films")
    g.add_argument("--download", metavar="DIR", help="fetch them into this new folder")
    g.add_argument("--url", help="from where (default: ChestXRay2017.zip at Mendeley Data)")
    g.add_argument("--sha256", help="what the archive must hash to (default: what that file does)")
    args = p.parse_args(argv)
    if sum(map(bool, (args.source, args.download, args.phantoms))) != 1:
        p.error("give one of: a folder to audit, --download and a folder to fill, --phantoms and a picture")
    return args


def main(argv=None):
    args = get_args(argv)
    if args.download:
        download(args.download, args.url or URL, args.sha256 or SHA256)
    elif args.phantoms:
        show_phantoms(args.phantoms)
    else:
        audit(args.source, args.classes)


if __name__ == "__main__":
    run(main)
