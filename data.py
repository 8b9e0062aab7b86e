"""Images in, tensors out: a split is one uint8 tensor of images, decoded once and kept in a cache.

    data = load("data/chest_xray", size=224)     data.train.images (N, 1, 224, 224), .labels, .ids
    data = load("phantoms", size=112)            chest X-rays drawn here: no download

    python data.py data/chest_xray               count and audit a folder
    python data.py --download data/chest_xray    fetch the public set, 1.2 GB
    python data.py --phantoms phantoms.png       what the built-in images look like

There is no Dataset, no DataLoader and no worker: a batch is `images[rows]`. Validation is carved
out of the training images by patient; it depends on the patients' names alone, never on a seed.
"""

import argparse
import ast
import csv
import functools
import hashlib
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
import zipfile
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.utils import make_grid

VERSION = 3  # of the cache: raise it when the same files would give other pixels
URL = ("https://data.mendeley.com/public-files/datasets/rscbjbr9sj/files/"
       "f12eaf6d-6023-432f-acc9-80c9d7393433/file_downloaded")
SHA256 = "13efc055629733dbab07877f8b3c9f81097840dbcdaa326a8542322c2281ce36"
MEAN = torch.tensor([0.485, 0.456, 0.406])  # ImageNet's, which pre-trained networks expect
STD = torch.tensor([0.229, 0.224, 0.225])

IMAGE_FILE = re.compile(r"[^.].*\.(jpe?g|png)", re.IGNORECASE)  # not ._person1_virus_6.jpeg
# The name of a patient in the paths of the public set and of MURA. Bacteria and virus are numbered
# separately: person7_virus is another child than person7_bacteria, NORMAL2-IM-0007 than IM-0007.
PATIENT = re.compile(r"person\d+_(?:bacteria|virus)|(?:NORMAL2-)?IM-\d+"
                     r"|(?:NORMAL|BACTERIA|VIRUS)-\d+|patient\d+")


class UserError(ValueError):
    """An error the user can fix: what is wrong, what was expected, what to do, in one line."""


# ---- load: from a folder to tensors --------------------------------------------------------------


def load(source, size, splits=("train", "val"), per_class=None, labels_per_class=None, classes=None,
         val_fraction=0.1, uncertain="ignore", wrong_labels=0.0, unlabelled=True, cache="cache"):
    """The splits asked for, each with .images (N, 1, size, size) uint8, .labels, .ids and .groups.

    labels: (N,) class indices, -1 unknown; or, where an image may have several findings
    (data.multilabel), (N, K) floats 0, 1 or NaN, unknown. groups: the patients. Also data.classes,
    .multilabel and .source. Row i is image i in all of them. Only evaluate.py asks for "test".
    unlabelled: whether training images that --labels-per-class leaves without a label stay.
    """
    records, names = list_images(str(source), classes)
    multilabel = any(isinstance(r["label"], list) for r in records)
    if len(names) < 2 or classes not in (None, len(names)):
        raise UserError(f"{source} has the classes {names}. Expected {classes or 'at least 2'}")
    if multilabel and (per_class or wrong_labels):
        raise UserError(f"--per-class and --wrong-labels expect one class an image; those of "
                        f"{source} may have several findings. Leave both flags out")
    counts = {"train": per_class}
    if all(r["split"] != "val" for r in records):  # the phantoms have validation images already
        carve_validation(records, val_fraction)
        if per_class:
            counts["val"] = min(per_class - 1, max(1, round(val_fraction * per_class)))
            counts["train"] -= counts["val"]
    if per_class:  # after validation: a small subset never trains on what a large one holds back
        keep_per_class(records, counts, names)
    for r in records:
        if r["split"] == "train" and r["chance"] < wrong_labels:
            r["label"] = (r["label"] + 1) % len(names)
        if multilabel:  # validation and test leave out what CheXpert marks as uncertain, always
            unsure = UNSURE[uncertain if r["split"] == "train" else "ignore"]
            r["label"] = [unsure if value == -1 else value for value in r["label"]]
    if labels_per_class is not None:
        hide_labels(records, labels_per_class, len(names), unlabelled)
    data = SimpleNamespace(classes=names, multilabel=multilabel, source=str(source))
    test = [r for r in records if r["split"] == "test"]
    data.test_groups = {r["group"] for r in test} | {r["id"] for r in test}  # patients and images
    check_splits(data, records, splits)
    for split in splits:
        setattr(data, split, load_split(data, records, split, size, cache))
    return data


def check_splits(data, records, splits):
    """Refuse a split that lacks a class; say before training what evaluate.py will refuse."""
    for split in (*splits, "test"):
        kinds = {r["kind"] for r in records if r["split"] == split}
        needed = data.classes[:1] if data.multilabel else data.classes
        if missing := [name for k, name in enumerate(needed) if k not in kinds]:
            problem = f"{data.source} has no {split} images of {', '.join(missing)}"
            if split in splits:
                raise UserError(f"{problem}. Expected some of every class; add other patients")
            tell(f"{problem}: evaluate.py will need some")
    shared = data.test_groups & {r["group"] for r in records if r["folder"] != "test"}
    if shared and "test" not in splits:
        tell(f"{len(shared)} patients of {data.source} are in both train and test, such as "
             f"{min(shared)}: evaluate.py refuses runs that have learned from them")


def load_as(args, size, splits, cache, source=None):
    """load() as a run's flags say, a dict: the same images for training and for judging."""
    names = "per_class labels_per_class classes val_fraction uncertain wrong_labels".split()
    return load(source or args["data"], size, splits, cache=cache,
                unlabelled=args["role"] == "student", **{name: args[name] for name in names})


def load_split(data, records, split, size, cache):
    """One split as tensors: rows of the table that holds all images of its folder."""
    chosen = [r for r in records if r["split"] == split]
    folder = [r for r in records if r["folder"] == chosen[0]["folder"]]
    if data.source in PHANTOM_SOURCES:
        made_from, blocks = PHANTOMS[split], draw_blocks(data.source, split, size)
    else:
        stats = [(r["id"], r["negative"], os.stat(r["path"])) for r in folder]
        made_from = [(id, negative, s.st_size, s.st_mtime_ns) for id, negative, s in stats]
        blocks = decode_blocks(folder, size)
    name = f"{Path(data.source).resolve().name}-{chosen[0]['folder']}-{size}"
    path = Path(cache) / f"{name}-{fingerprint(VERSION, made_from)}.npy"
    pixels = table(path, len(folder), blocks)  # (all images of the folder, 1, size, size)
    rows = torch.tensor([i for i, r in enumerate(folder) if r["split"] == split])
    images = SimpleNamespace(  # a copy in memory: 50 kB an image at 224
        images=pixels[rows, :1], labels=torch.tensor([r["label"] for r in chosen]),
        ids=[r["id"] for r in chosen], groups=[r["group"] for r in chosen],
        fingerprint=fingerprint(path.name, rows.tolist()))
    if data.source in PHANTOM_SOURCES:
        images.masks = pixels[rows, 1] > 0
    return images


def list_images(source, classes=None):
    """A record for every image, and the names of the classes; nothing is decoded yet."""
    root = Path(source)
    if source in PHANTOM_SOURCES:
        return list_phantoms(source), PHANTOM_SOURCES[source]
    for pattern, list_set, findings in (("Data_Entry_2017*.csv", list_chestxray14, CHESTXRAY14),
                                        ("valid.csv", list_chexpert, CHEXPERT),
                                        ("PADCHEST*.csv", list_padchest, PADCHEST)):
        if csvs := sorted(root.glob(pattern)):
            newest = csvs[-1]  # ChestX-ray14 was corrected in Data_Entry_2017_v2020.csv
            with explain(f"{newest} is not the CSV that its authors published; fetch it again"):
                records = list(list_set(newest))
            found = [r for r in records if r["path"] and os.path.exists(r["path"])]
            if not found:
                raise UserError(f"No image of {newest} is below {root}. Unpack them there")
            if len(found) < len(records):
                tell(f"{len(records) - len(found)} images of the CSV are not in {root}: left out")
            return found, findings
    for folder in (root, root / "chest_xray"):  # archives hold one folder more, or a copy inside
        if (folder / "train").is_dir():
            return list_class_folders(folder, classes)
    found = ", ".join(sorted(folder.name for folder in root.glob("*/"))[:9])
    why = f"No folder train in {source}, but {found or 'none'}" if root.exists() \
        else f"No such folder: {source}"
    raise UserError(f"{why}. Expected train/CLASS/*.jpeg, test/CLASS/*.jpeg, or a CSV set; python "
                    f"data.py --download {source} fetches the public images")


def record(id, label, folder, path=None, group=None, negative=False):
    """label: index of the class, or a list of 0, 1 or NaN, one a finding. folder: train or test, as
    the data set has it; split: where it is used. negative: bright where other images are dark."""
    return {"id": id, "label": label, "kind": label if isinstance(label, int) else 0, "path": path,
            "folder": folder, "split": folder, "group": group or id, "negative": negative,
            "chance": lot(f"wrong {id}")}  # --wrong-labels above this spoils the label


def list_class_folders(root, classes):
    """Kermany's set as Kaggle or Mendeley ship it, MURA v1.1, or folders like theirs: all images
    below a class's folder are its images. Test images lie in `test`, or else in `valid` (MURA's).
    Kaggle's `val` holds 16 images, too few to choose by: they go back to train."""
    root = root.absolute()
    test = "test" if (root / "test").is_dir() else "valid"
    folders = [d for split in ("train", "val", test) for d in (root / split).glob("[!._]*/")]
    names = sorted({d.name for d in folders}, key=lambda name: (name.upper() != "NORMAL", name))
    three = classes == 3 and names == ["NORMAL", "PNEUMONIA"]
    records = []
    for path in sorted(path for folder in folders for path in files_below(folder)):
        id = path[len(str(root)) + 1 :].replace(os.sep, "/")
        split, class_name, rest = id.split("/", 2)
        label = names.index(class_name)
        if three and label:
            kind = re.search("bacteria|virus", rest.lower())
            if not kind:
                raise UserError(f"--classes 3 expects bacteria or virus in names of pneumonia "
                                f"images, not {path}. Use --classes 2")
            label = 1 + (kind[0] == "virus")
        patient = PATIENT.search(rest)
        folder = "test" if split == test else "train"
        records.append(record(id, label, folder, path, patient and patient[0]))
    if nameless := sum(r["group"] == r["id"] for r in records):
        tell(f"{nameless} of {len(records)} file names tell no patient: each such image counts as "
             f"a patient of its own (see PATIENT in data.py)")
    names = [name.removeprefix("XR_") for name in names]
    return records, ["NORMAL", "BACTERIAL", "VIRAL"] if three else names


# ---- the three public sets with several findings an image, by their CSVs -------------------------

CHESTXRAY14 = ["Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule",
               "Pneumonia", "Pneumothorax", "Consolidation", "Edema", "Emphysema", "Fibrosis",
               "Pleural_Thickening", "Hernia"]  # in the order of its authors
CHEXPERT = ["Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema",
            "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion",
            "Pleural Other", "Fracture", "Support Devices"]
PADCHEST = ["atelectasis", "cardiomegaly", "pleural effusion", "infiltrates", "mass", "nodule",
            "pneumonia", "pneumothorax", "consolidation", "interstitial pattern", "emphysema",
            "pulmonary fibrosis", "pleural thickening", "hiatal hernia"]


UNSURE = {"ignore": math.nan, "zero": 0.0, "one": 1.0}  # what --uncertain makes of CheXpert's -1


def read_csv(path):
    with open(path, newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def files_below(root):
    """The paths of all images below a folder, links followed, though not in circles."""
    def fail(error):  # os.walk would leave out a folder that it cannot read
        raise error

    paths, visited = [], set()
    for folder, below, files in os.walk(root, followlinks=True, onerror=fail):
        visited.add(os.path.realpath(folder))
        below[:] = [d for d in below if os.path.realpath(os.path.join(folder, d)) not in visited]
        paths += [os.path.join(folder, name) for name in files if IMAGE_FILE.fullmatch(name)]
    if odd := [path for path in paths if path.encode(errors="replace").decode() != path]:
        raise UserError(f"{odd[0]!r} is not a file name in UTF-8. Rename it")
    return paths


def files_by_name(root):
    paths = files_below(root)
    by_name = {os.path.basename(path): path for path in paths}
    if len(by_name) < len(paths):
        raise UserError(f"Two images below {root} have the same name, which the CSV cannot tell "
                        f"apart: keep one folder of images there")
    return by_name


def list_chestxray14(path):
    """ChestX-ray14: findings separated by |; test_list.txt names the test images."""
    paths = files_by_name(path.parent)
    test = set((path.parent / "test_list.txt").read_text().split())
    for row in read_csv(path):
        id, found = row["Image Index"], row["Finding Labels"].split("|")
        assert row["Patient ID"] and {*found} <= {*CHESTXRAY14, "No Finding"}, row
        yield record(id, [float(name in found) for name in CHESTXRAY14],
                     "test" if id in test else "train", paths.get(id), row["Patient ID"])


def list_chexpert(path):
    """CheXpert: a column a finding, 1.0, 0.0, -1.0 (uncertain) or empty (not mentioned: 0). Side
    views are left out. Its published validation set, valid.csv, is our test set."""
    values = {"": 0.0, "0.0": 0.0, "1.0": 1.0, "-1.0": -1.0}
    for name, split in (("train.csv", "train"), ("valid.csv", "test")):
        for row in read_csv(path.with_name(name)):
            if row["Frontal/Lateral"] == "Frontal":
                id = row["Path"]  # its first folder is the set's own name, which may differ here
                yield record(id, [values[row[finding]] for finding in CHEXPERT], split,
                             os.path.join(path.parent, id.split("/", 1)[1]), PATIENT.search(id)[0])


def list_padchest(path):
    """PadChest: a Python list in a cell; 16-bit files, some of them negatives. Side views and
    images without a report, or to "exclude" by it, are left out. There is no test split of its own:
    a tenth of the patients, chosen by name, is held back."""
    paths = files_by_name(path.parent)
    for row in read_csv(path):
        words = ast.literal_eval(row["Labels"] or "[]")
        assert isinstance(words, list), row
        found = [word.strip() for word in words if word]
        frontal = row["Projection"] in ("PA", "AP", "AP_horizontal")
        if frontal and found and "exclude" not in found:
            id, patient = row["ImageID"], row["PatientID"]
            yield record(id, [float(name in found) for name in PADCHEST],
                         "test" if lot(f"test {patient}") < 0.1 else "train", paths.get(id),
                         patient, row["PhotometricInterpretation_DICOM"] == "MONOCHROME1")


# ---- which image is used for what ----------------------------------------------------------------


def lot(name):
    """A number in [0, 1) that follows from the name alone, the same on every machine."""
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:6]) / 2**48


def carve_validation(records, fraction):
    """Move whole patients from train to val, until every class has given up its fraction of images.
    With a child on both sides, validation would reward recognising the child.
    """
    train, patients = [r for r in records if r["split"] == "train"], defaultdict(list)
    for r in train:
        patients[r["group"]].append(r)
    counts = Counter(r["kind"] for r in train)
    wanted = {kind: max(1, round(fraction * n)) for kind, n in counts.items()}
    for group in sorted(patients, key=lot):
        if any(wanted[r["kind"]] > 0 for r in patients[group]):
            for r in patients[group]:
                r["split"] = "val"
                wanted[r["kind"]] -= 1


def keep_per_class(records, counts, names):
    """Leave at most counts[split] images of each class in a split; print what is missing."""
    for k, name in enumerate(names):
        found = 0
        for split, n in counts.items():
            same = [r for r in records if (r["split"], r["kind"]) == (split, k)]
            for r in sorted(same, key=lambda r: lot(r["id"]))[n:]:
                r["split"] = "unused"
            found += min(n, len(same))
        if found < sum(counts.values()):
            tell(f"--per-class {sum(counts.values())}: only {found} images of {name}")


def hide_labels(records, n, n_classes, unlabelled):
    """Leave n training images of each class their label, chosen by name as keep_per_class does; of
    images with several findings n times as many as there are findings."""
    seen, train = Counter(), [r for r in records if r["split"] == "train"]
    for r in sorted(train, key=lambda r: lot(r["id"])):
        several = isinstance(r["label"], list)
        seen[r["kind"]] += 1
        if seen[r["kind"]] > n * (n_classes if several else 1):
            r["label"] = [math.nan] * n_classes if several else -1
            r["split"] = "train" if unlabelled else "unused"


# ---- pixels: decoded once, kept as one table -----------------------------------------------------


def decode(path, size, negative=False):
    """One image as (1, size, size) uint8: grey, and squashed to a square so that no lung is cut."""
    with Image.open(path) as image:
        image.draft("L", (size, size))  # a JPEG is decoded at 1/2, 1/4 or 1/8 if that is enough
        if image.mode.startswith("I"):  # 16 bits: 65535 becomes 255
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        grey = image.convert("L").resize((size, size), Image.Resampling.BILINEAR)  # antialiased
    pixels = torch.from_numpy(np.array(grey))[None]
    return 255 - pixels if negative else pixels


def decode_blocks(records, size):
    """Yield the images as arrays (up to 512, 1, size, size); name the files that are unreadable."""
    bad, dark = [], 0

    def pixels(r):
        try:
            return decode(r["path"], size, r["negative"]).numpy()
        except Exception as error:  # a damaged file can raise nearly anything
            bad.append(f"{r['path']} ({one_line(error)})")
            return np.zeros((1, size, size), np.uint8)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # PIL decodes without holding Python's lock
        for start in progress(range(0, len(records), 512), "decoding images, blocks of 512"):
            block = np.stack(list(pool.map(pixels, records[start : start + 512])))
            dark += int((block.max((1, 2, 3)) < 16).sum())
            yield block
    if bad:
        raise UserError(f"{len(bad)} of {len(records)} images cannot be read. "
                        f"Repair or remove them: {'; '.join(sorted(bad))}")
    if dark:
        tell(f"{dark} of {len(records)} images are nearly black: no pixel is above 15 of 255. "
             f"Files of 16 bits that use only 12 must be multiplied by 16 first")


def table(path, n, blocks):
    """A tensor of n rows that is computed once, kept in `path` and mapped from there ever after.
    blocks: a generator of arrays, n rows in all, not started where the file exists. A table may be
    larger than the memory.
    """
    if not path.exists():
        with atomic(path) as temporary, open(temporary, "wb") as file:
            for i, block in enumerate(blocks):
                if i == 0:
                    np.lib.format.write_array_header_1_0(file, {
                        "descr": block.dtype.str, "fortran_order": False,
                        "shape": (n, *block.shape[1:])})
                file.write(np.ascontiguousarray(block))
    with explain(f"{path} is damaged; delete it, and it is made again"):
        rows = np.load(path, mmap_mode="c")  # pages of the file are read when rows are
        assert len(rows) == n and rows.offset + rows.nbytes == path.stat().st_size, "other rows"
        return torch.from_numpy(rows)


def prepare(images, device, theta=None):
    """uint8 images (B, 1, H, W) -> what networks read: (B, 3, H, W) floats, normalised, on device.
    theta: (B, 2, 3) affine matrices in relative coordinates: the same ones serve two image sizes.
    Rows of other tables, logits and features, are only moved to the device.
    """
    if images.dtype != torch.uint8:
        return images.to(device).float()
    x = images.to(device, non_blocking=True).float()  # (B, 1, H, W), 0 to 255
    if theta is not None:
        # In double precision, because autocast would compute the coordinates with 8 bits.
        grid = F.affine_grid(theta.to(device).double(), x.shape, align_corners=False)
        x = F.grid_sample(x, grid.float(), align_corners=False)
    # Channels are last in memory from the start: convolutions run up to twice as fast on that.
    shift, scale = normalisation(device)
    return torch.addcmul(shift, x.permute(0, 2, 3, 1), scale).permute(0, 3, 1, 2)


@functools.cache
def normalisation(device):
    """(x / 255 - MEAN) / STD as one product and one sum: shift + x * scale, copied once."""
    return (-MEAN / STD).to(device), (1 / (255 * STD)).to(device)


def random_affines(n, generator):
    """(n, 2, 3): a small rotation, zoom and shift an image. No flips: the heart has a side."""
    angle, zoom, across, down = torch.rand(4, n, generator=generator) * 2 - 1
    angle, zoom = 0.12 * angle, 1 + 0.08 * zoom  # 7 degrees, 8 percent
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    return torch.stack([cos, -sin, 0.06 * across, sin, cos, 0.06 * down], dim=1).view(n, 2, 3)


# ---- phantoms: chest X-rays drawn here -----------------------------------------------------------

PHANTOM_SOURCES = {"phantoms": ["NORMAL", "PNEUMONIA"],
                   "findings": ["OPACITY", "LARGE_HEART", "FLUID"]}  # several findings an image
PHANTOMS = {"train": (640, 11), "val": (160, 12), "test": (600, 16)}  # images, seed


def phantoms(n, size, seed):
    """n drawn chest X-rays: images (n, 1, size, size) uint8, labels (n,), masks (n, size, size).
    Half show pneumonia: one to three hazy opacities in the lungs, where the mask is True.
    """
    labels = torch.arange(n) % 2
    images, masks, _ = draw(n, size, seed, labels[:, None].float())
    return images, labels, masks


def list_phantoms(source):
    records = []
    for split, (n, seed) in PHANTOMS.items():
        labels = (torch.arange(n) % 2).tolist()
        if source == "findings":  # independent of each other
            g = torch.Generator().manual_seed(2000 + seed)
            labels = (torch.rand(n, 3, generator=g) < 0.4).float().tolist()
        chances = torch.rand(n, generator=torch.Generator().manual_seed(1000 + seed)).tolist()
        records += [record(f"phantom-{split}-{i}", labels[i], split) | {"chance": chances[i]}
                    for i in range(n)]
    return records


def draw_blocks(source, split, size):
    """Yield one array (n, 2, size, size): the phantoms of a split, and 255 on their opacities."""
    n, seed = PHANTOMS[split]
    truth = [r["label"] for r in list_phantoms(source) if r["split"] == split]
    images, masks, _ = draw(n, size, seed, torch.tensor(truth).float().view(n, -1))
    yield torch.cat([images, 255 * masks[:, None].to(torch.uint8)], 1).numpy()


def draw(n, size, seed, findings):
    """images, masks of the opacities, masks of the lungs. findings: (n, 1 or 3) of 0 and 1."""
    chests = random_chests(n, seed, findings)
    drawn = [draw_chest({name: value[i] for name, value in chests.items()}, size)
             for i in progress(range(n), "drawing phantoms")]
    images, masks, lungs = (torch.stack(parts) for parts in zip(*drawn, strict=True))
    return images[:, None], masks, lungs


def random_chests(n, seed, findings):
    """The shapes of n chests, {name: (n, ...)}: the same at every size, so that a teacher may see
    them at 112 pixels and its student at 80."""
    g = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=g)

    opacity, large_heart, fluid = F.pad(findings, (0, 3 - findings.shape[1])).unbind(1)
    chests = {
        "fluid": fluid, "angle": uniform(-0.08, 0.08), "scale": uniform(0.92, 1.08),
        "shift": uniform(-0.05, 0.05, 2), "exposure": uniform(0.85, 1.10),
        "heart": uniform(0.26, 0.36) + 0.12 * large_heart, "lung": uniform(0.9, 1.1, 2),
        "ribs": uniform(10, 13), "rib_phase": uniform(0, 6.3)}
    # Nine soft spots, each an x, y, radius and strength: 3 opacities (large), 6 vessels (small).
    x = torch.cat([uniform(0.30, 0.55, 3), uniform(0.08, 0.38, 6)], 1) * uniform(-1, 1, 9).sign()
    y = torch.cat([uniform(-0.45, 0.35, 3), uniform(-0.3, 0.3, 6)], 1)
    radius = torch.cat([uniform(0.14, 0.24, 3), uniform(0.02, 0.05, 6)], 1)
    hazy = uniform(0.33, 0.53, 3) * (uniform(0, 3, 1) > torch.arange(3)) * opacity[:, None]
    strength = torch.cat([hazy, uniform(0.1, 0.25, 6)], 1)
    chests["spots"] = torch.stack([x, y, radius, strength], dim=1)  # (n, 4, 9)
    chests["haze"] = uniform(-1, 1, 1, 12, 12)  # coarse noise, and fine noise like a detector's
    chests["grain"] = torch.randn(n, 1, 96, 96, generator=g)
    return chests


def draw_chest(chest, size):
    """image (size, size) uint8, mask of the opacities, mask of the lungs, of one chest."""
    across = (torch.arange(size) + 0.5) / size * 2 - 1  # pixel centres, from -1 to 1
    down, right = torch.meshgrid(across, across, indexing="ij")
    cos, sin = chest["angle"].cos(), chest["angle"].sin()
    x = (right * cos - down * sin) * chest["scale"] + chest["shift"][0]  # a patient stands a bit
    y = (right * sin + down * cos) * chest["scale"] + chest["shift"][1]  # tilted, near, off-centre

    def ellipse(cx, cy, a, b):  # 1 inside, 0 outside, a soft edge between
        return torch.sigmoid(12 * (1 - ((x - cx) / a) ** 2 - ((y - cy) / b) ** 2))

    # Air is dark, tissue bright: a bright trunk, the two lungs taken out of it ...
    lungs = (ellipse(-0.42, -0.05, 0.31, 0.62 * chest["lung"][0])
             + ellipse(0.42, -0.05, 0.31, 0.62 * chest["lung"][1]))
    image = 0.55 * ellipse(0, 0.1, 0.95, 1.15) - 0.36 * lungs
    # ... the heart, left of the middle (on the right in the image), and the spine ...
    image += 0.28 * ellipse(0.13, 0.27, chest["heart"], 0.34) + 0.12 * torch.exp(-((x / 0.09) ** 2))
    # ... ribs, as curved stripes over the lungs, and fluid, which settles at their bottom.
    image += 0.05 * lungs * torch.sin(
        chest["ribs"] * (y + 0.35 * x**2) + chest["rib_phase"]).clamp(min=0)
    image += 0.25 * chest["fluid"] * lungs * torch.sigmoid(25 * (y - 0.22))
    spot_x, spot_y, radius, strength = chest["spots"][:, :, None, None]  # each (9, 1, 1)
    spots = strength * torch.exp(-((x - spot_x) ** 2 + (y - spot_y) ** 2) / (2 * radius**2))
    spots = spots * lungs.clamp(max=1)
    mask = (spots[:3] > 0.5 * strength[:3].clamp(min=1e-3)).any(0)  # where an opacity is at half
    haze, grain = (F.interpolate(chest[name][None], size=(size, size), mode="bilinear",
                                 antialias=True)[0, 0] for name in ("haze", "grain"))
    image = chest["exposure"] * (image + spots.sum(0)) + 0.04 * haze + 0.04 * grain + 0.05
    return (255 * image.clamp(0, 1)).to(torch.uint8), mask, lungs > 0.5


# ---- small things that all scripts share ---------------------------------------------------------


@functools.cache
def tell(text):
    """Print a text once a process: load(), called again at a teacher's size, would repeat it."""
    print(text)


def run(main):
    """Call a script's main: a user's mistake is one line and exit code 1, ours a traceback."""
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except (MemoryError, torch.OutOfMemoryError):
        sys.exit("error: out of memory. Lower --batch-size or --size")
    except KeyboardInterrupt:
        sys.exit("stopped; train.py goes on from the epoch it saved last, at most 20 s ago")


def one_line(error):
    return " ".join(str(error).split())[:150] or type(error).__name__


@contextmanager
def explain(sentence):
    """Make one UserError of whatever a damaged or foreign file raises inside the block."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{sentence} ({type(error).__name__}: {one_line(error)})") from None


@contextmanager
def atomic(path):
    """A name to write to; the file takes its place at `path` only once it is whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def mean(value):
    """Of several findings, leaving out those that could not be judged; of one figure itself."""
    return float(torch.as_tensor(value, dtype=torch.float64).nanmean())


def aligned(header, rows):
    """A table as lines of text, figures to the right. A cell may have several lines."""
    rows = [[cell.split("\n") for cell in row] for row in [header, *rows]]
    widths = [max(len(line) for row in rows for line in row[i]) for i in range(len(header))]
    text = [""]
    for row in rows:
        for parts in zip_longest(*row, fillvalue=""):
            cells = [f"{part:>{width}}" for part, width in zip(parts, widths, strict=True)]
            cells[0] = f"{parts[0]:<{widths[0]}}"
            text.append("  ".join(cells).rstrip())
    return text


def write_csv(path, header, rows):
    with atomic(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def write_picture(path, image):
    """image (3, H, W) uint8, as a PNG."""
    with atomic(path) as temporary:
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(temporary, "PNG")


def fingerprint(*facts):
    """16 hex digits that change when any of the facts does."""
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:16]


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The script's docstring as it was typed, then every flag with its default."""


def usable_device(name):
    """An argparse type: the name, if torch can use that device."""
    with explain("this machine has no such device"):
        torch.empty(0, device=name)
    return name


def number(kind, low, high=math.inf):
    """An argparse type: a number from low to high."""
    def parse(text):
        if not low <= kind(text) <= min(high, 1e12):  # no NaN, no infinity
            raise argparse.ArgumentTypeError(f"{text} is not a number from {low:g} to {high:g}")
        return kind(text)

    parse.__name__ = kind.__name__  # for argparse's own message about abc
    return parse


def origin(device):
    """What a number came from: command, commit, versions and machine."""
    git = subprocess.run("git describe --always --dirty --abbrev=12", shell=True, text=True,
                         capture_output=True, cwd=Path(__file__).parent)
    commit = git.stdout.strip() or "unknown"  # no repository, or no git on this machine
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return {"command": " ".join(sys.argv), "commit": commit, "torch": str(torch.__version__),
            "device": cpu if "cuda" not in str(device) else torch.cuda.get_device_name(device)}


def progress(items, text):
    """Pass `items` on, with a line on a terminal that says how far it is."""
    start = time.perf_counter()
    for done, item in enumerate(items):
        show_progress(text, done, len(items), start)
        yield item
    show_progress(text)


def show_progress(text, done=0, total=0, start=0.0, more=""):
    """`text  12/40  0:21 left` on one line of a terminal; without a total, the line is wiped."""
    if sys.stdout.isatty():
        left = (time.perf_counter() - start) / max(done, 1) * (total - done)
        line = f"{text}  {done}/{total}  {more}{left // 60:.0f}:{left % 60:02.0f} left"
        print(f"\r\033[K{line if total else ''}", end="", flush=True)


# ---- the command line: count, audit, download ----------------------------------------------------


def audit(source, classes=None):
    """Counts, and whatever would make a result on these images less than it seems."""
    records, names = list_images(source, classes)
    patients = defaultdict(list)  # (split, class): the patient of each image
    for r in records:
        patients[r["split"], "all"].append(r["group"])
        for k, name in enumerate(names):
            if r["label"] == k or isinstance(r["label"], list) and r["label"][k] == 1:
                patients[r["split"], name].append(r["group"])
    rows, header = [], ["images (patients)", *names, "all"]
    for split in ("train", "val", "test"):
        if patients[split, "all"]:
            cells = [patients[split, name] for name in header[1:]]
            rows.append([split, *(f"{len(cell)} ({len(set(cell))})" for cell in cells)])
    print("\n".join(aligned(header, rows)))
    shared = {*patients["train", "all"]} & {*patients["test", "all"]}
    print(f"\npatients in both train and test: {len(shared)}")
    if source in PHANTOM_SOURCES:
        return
    bad, splits = [], defaultdict(list)  # the splits in which a content occurs
    for r in progress(records, "reading images"):
        try:
            splits[hashlib.sha256(Path(r["path"]).read_bytes()).digest()].append(r["split"])
            decode(r["path"], 8)
        except Exception as error:
            bad.append(f"\n  {r['path']} ({one_line(error)})")
    copies = sum(len(where) for where in splits.values()) - len(splits)
    print(f"unreadable files: {len(bad)}{''.join(bad)}\n"
          f"exact copies of another image: {copies}, of them across train and "
          f"test: {sum(len(set(where)) > 1 for where in splits.values())}")


def show_phantoms(path, n=6, size=224):
    """A picture of phantoms: a row of normal ones, a row with opacities, and those outlined."""
    images, labels, masks = phantoms(2 * n, size, PHANTOMS["test"][1])
    normal, opaque = (images[labels == k].repeat(1, 3, 1, 1) for k in (0, 1))
    rows = torch.cat([normal, opaque, outline(opaque, masks[labels == 1])])
    write_picture(path, make_grid(rows, nrow=n, padding=3))
    print(f"{path}: normal phantoms, phantoms with opacities, and where these are")


def outline(images, masks):
    """images (N, 3, H, W) with an orange line around each mask (N, H, W)."""
    inside = masks[:, None].float()
    rim = F.max_pool2d(inside, 3, 1, 1) > inside  # pixels that touch a mask from outside
    return images.where(~rim, torch.tensor([255, 90, 0], dtype=torch.uint8).view(3, 1, 1))


def download(folder, url, sha256):
    """Fetch, check, unpack. A file with another hash is never unpacked."""
    folder = Path(folder).resolve()
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty. Choose a new folder to unpack into")
    archive, unpacked = (folder.with_name(folder.name + end) for end in (".zip", ".unpacking"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with explain(f"{url} could not be fetched and unpacked; run the command again"):
        torch.hub.download_url_to_file(url, str(archive), hash_prefix=sha256)
        with zipfile.ZipFile(archive) as file:
            file.extractall(unpacked)  # which strips absolute paths and .. from names
    os.replace(unpacked, folder)
    archive.unlink()
    print(f"unpacked to {folder}; now  python data.py {folder}")


def get_args(argv=None):
    p = argparse.ArgumentParser(usage="python data.py [DIR] [FLAGS]", description=__doc__,
                                formatter_class=Help, allow_abbrev=False)
    g = p.add_argument_group("what do I have")
    g.add_argument("source", nargs="?", metavar="DIR", help="a folder to audit, or phantoms")
    g.add_argument("--classes", type=int, choices=[2, 3], help="3: normal, bacterial, viral")
    g.add_argument("--phantoms", metavar="FILE.png", help="draw some of the built-in images")
    g = p.add_argument_group("where do I get the public images")
    g.add_argument("--download", metavar="DIR", help="fetch them into this new folder")
    args = p.parse_args(argv)
    if sum(map(bool, (args.source, args.download, args.phantoms))) != 1:
        p.error("give one of: a folder to audit, --download and a folder, --phantoms and a picture")
    return args


def main(argv=None):
    args = get_args(argv)
    if args.download:
        download(args.download, URL, SHA256)
    elif args.phantoms:
        show_phantoms(args.phantoms)
    else:
        audit(args.source, args.classes)


if __name__ == "__main__":
    run(main)
