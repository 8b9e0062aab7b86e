"""Turn images into tensors. A split is one uint8 tensor of images, decoded once and then cached.
There is no Dataset, DataLoader or worker, because a batch is just `images[rows]`.

    data = load("data/chest_xray", size=224)     data.train.images (N, 1, 224, 224), .labels, .ids
    data = load("phantoms", size=112)            phantoms, drawn by this file without a download
    python data.py data/chest_xray               count and audit a folder
    python data.py --download data/chest_xray    fetch the public set, 1.2 GB
"""

import argparse
import csv
import functools
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

URL = ("https://data.mendeley.com/public-files/datasets/rscbjbr9sj/files/"
       "f12eaf6d-6023-432f-acc9-80c9d7393433/file_downloaded")
SHA256 = "13efc055629733dbab07877f8b3c9f81097840dbcdaa326a8542322c2281ce36"
PIXELS = 1  # a version number: raise it when decode, prepare or phantoms change, to renew caches
MEAN, STD = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])  # ImageNet's
IMAGE_FILE = re.compile(r"(?i).+\.(jpe?g|png)")  # DICOM files are known by their first bytes
# A patient's name in a path; person7_virus is another child than person7_bacteria.
PATIENT = re.compile(r"person\d+_(?:bacteria|virus)|(?:NORMAL2-)?IM-\d+"
                     r"|(?:NORMAL|BACTERIA|VIRUS)-\d+|patient\d+")

class UserError(ValueError):
    """An error the user can fix: what is wrong, what was expected, what to do, in one line."""

# ---- load: from a folder to tensors --------------------------------------------------------------
def load(source, size, splits=("train", "val"), per_class=None, labels_per_class=None, classes=None,
         val_fraction=0.1, wrong_labels=0.0, unlabelled=True, cache="cache"):
    """Return the splits, each with .images (N, 1, size, size) uint8, .labels, .ids, and .groups for
    patients. Row i is image i in all of them. labels: (N,) class indices, -1 if unknown; or (N, K)
    floats 0, 1 or NaN for findings. unlabelled: whether to keep training images without a label."""
    records, names = list_images(str(source), classes)
    data = SimpleNamespace(classes=names, source=str(source), fingerprints={},
                           multilabel=any(isinstance(r["label"], list) for r in records))
    if len(names) < 2 or classes not in (None, len(names)):
        raise UserError(f"{source} has the classes {names}. Expected {classes or 'at least 2'}")
    if data.multilabel and (per_class or wrong_labels):
        raise UserError(f"{source} has findings: --per-class and --wrong-labels need classes")
    refuse_shared_files(records)
    if data.source not in PHANTOM_SOURCES:  # these have validation images of their own
        carve_validation(records, val_fraction)
    if per_class:  # only now, so that no small subset trains on a large one's validation images
        keep_per_class(records, per_class, val_fraction)
    for r in records:
        if r["split"] == "train" and r["chance"] < wrong_labels and r["label"] != -1:
            r["label"] = (r["label"] + 1) % len(names)
    for split in ("train", "val", "test"):  # before images are left out, since gains compare these
        facts = [(r["id"], r["bytes"], r["label"]) for r in records if r["split"] == split]
        data.fingerprints[split] = fingerprint(facts)
    if labels_per_class is not None:
        n_labels = labels_per_class * (len(names) if data.multilabel else 1)
        for r in surplus(records, "train", n_labels):
            r["label"] = -1
    for r in records:
        if r["split"] == "train" and r["label"] == -1 and not unlabelled:
            r["split"] = "train, left out"
    data.n_wrong = sum(r["chance"] < wrong_labels and r["label"] != -1
                       for r in records if r["split"] == "train")
    data.test_groups = {r[key] for r in records if r["split"] == "test" for key in ("group", "id")}
    for split in splits:
        kinds = {r["kind"] for r in records if r["split"] == split}
        needed = ["any kind"] if data.multilabel else names  # findings all have kind 0
        if missing := [name for k, name in enumerate(needed) if k not in kinds]:
            raise UserError(f"{source} has no {split} images of {', '.join(missing)}. Add patients")
    for split in splits:
        setattr(data, split, load_split(data, records, split, size, cache))
    return data

def load_as(config, size, splits, cache, source=None):
    """Return load() with the flags of a run's config, so that evaluation sees the same images."""
    names = ("per_class", "labels_per_class", "classes", "val_fraction", "wrong_labels")
    return load(source or config["data"], size, splits, **{name: config[name] for name in names},
                unlabelled=config["role"] == "student" and config["alpha"] > 0, cache=cache)

def load_split(data, records, split, size, cache):
    """Return one split as tensors: rows of the cached array of its folder. Its pixels are hashed
    (250 MB take 0.2 seconds), because names and lengths of files do not identify images."""
    chosen = [r for r in records if r["split"] == split]
    folder = [r for r in records if r["folder"] == chosen[0]["folder"]]
    drawn = data.source in PHANTOM_SOURCES
    place = data.source if drawn else os.path.realpath(data.source)
    # `changed` also holds the time when a file's metadata changed, which no copying tool restores.
    key = fingerprint(PIXELS, place, size, [(r["id"], r["bytes"], r["changed"]) for r in folder])
    path = Path(cache, f"{os.path.basename(place)}-{chosen[0]['folder']}-{size}-{key}.npy")
    blocks = draw_blocks(folder, size) if drawn else decode_blocks(folder, size)
    shape = (len(folder), 1 + drawn, size, size)  # all images of the folder; phantoms with masks
    pixels = cached_array(path, "uint8", shape, blocks)
    digest = hashlib.sha256()
    for i, r in enumerate(folder):
        if r["split"].startswith(split):  # with "train, left out", because gains compare hashes
            digest.update(pixels[i, :1].numpy())
    data.fingerprints[f"{split}_pixels"] = digest.hexdigest()[:16]
    rows = torch.tensor([i for i, r in enumerate(folder) if r["split"] == split])
    none = [torch.nan] * len(data.classes) if data.multilabel else -1
    images = SimpleNamespace(  # a copy in memory: 50 kB per image at 224
        images=pixels[rows, :1], ids=[r["id"] for r in chosen], groups=[r["group"] for r in chosen],
        labels=torch.tensor([none if r["label"] == -1 else r["label"] for r in chosen]),
        key=fingerprint(digest.hexdigest(), rows.tolist()))
    if drawn:
        images.masks = pixels[rows, 1] > 0
    return images

def list_images(source, classes=None):
    """Return a record for every image, and the names of the classes. Nothing is decoded yet."""
    root = existing_folder(source)
    if source in PHANTOM_SOURCES:
        return list_phantoms(source), PHANTOM_SOURCES[source]
    csvs = known_csvs(root)
    records, names = list_csv(*csvs[0]) if csvs else list_class_folders(root.absolute(), classes)
    for r in records:
        stat = os.stat(r["path"])
        r |= {"bytes": stat.st_size, "changed": (stat.st_mtime_ns, stat.st_ctime_ns)}
    return records, names

def existing_folder(source):
    """Return the folder of a data set, or raise a UserError that says what it should hold."""
    root = Path(source)
    for folder in (root, root / "chest_xray"):  # some archives have this folder inside
        if source in PHANTOM_SOURCES or known_csvs(folder) or (folder / "train").is_dir():
            return folder
    there = ", ".join(sorted(folder.name for folder in root.glob("*/"))[:9]) or "no folders"
    raise UserError(f"No such folder: {root}/train. {root} holds {there}. If these are classes, "
                    f"put their images in {root}/train/CLASS and {root}/test/CLASS. Otherwise name "
                    "another folder, or fetch one: python data.py --download data/chest_xray")

# ---- class folders -------------------------------------------------------------------------------
def record(id, label, folder, path=None, group=None, **more):
    """Return a record. label: a class index, -1 for none, or a list of 0, 1 or NaN (findings).
    kind: the label before it is changed, 0 for findings. chance: wrong if below --wrong-labels."""
    return {"id": id, "label": label, "kind": label if isinstance(label, int) else 0, "path": path,
            "folder": folder, "split": folder, "group": group or id,
            "chance": hash_fraction(f"wrong {id}"), **more}

def list_class_folders(root, classes):
    """List Kermany's set, MURA v1.1, or folders like theirs. Test images are in `test` or else in
    `valid` (MURA). `val` joins the training images, because Kaggle's copy has only 16 there."""
    there = [split for split in ("train", "val", "test", "valid") if (root / split).is_dir()]
    used_as = {"train": "train", "val": "train", "test" if "test" in there else "valid": "test"}
    names = {d.name for split in used_as for d in (root / split).glob("[!._]*/")} - {"UNLABELLED"}
    names = sorted(names, key=lambda name: (name.upper() != "NORMAL", name))
    three = classes == 3 and names == ["NORMAL", "PNEUMONIA"]
    records, left_out = [], defaultdict(list)
    paths = [Path(path) for split in there for path in files_below(root / split, set())]
    for id, path in sorted((path.relative_to(root).as_posix(), path) for path in paths):
        split, class_name, *below = id.split("/")  # train, NORMAL, IM-0001-0001.jpeg
        folder, rest = used_as.get(split), "/".join(below)
        is_known = class_name in names or class_name == "UNLABELLED" and folder == "train"
        patient = find_patient(path, rest) if path.is_file() else None
        if not (folder and is_known and patient is not None):
            pattern = "/".join([*id.split("/")[:-1][:2], f"*{path.suffix.lower()}"])
            if class_name[0] != "_":
                left_out[pattern if path.exists() else "links that lead nowhere"].append(id)
            continue
        label = names.index(class_name) if class_name in names else -1
        if three and label == 1:
            if not (found := re.search("bacteria|virus", rest.lower())):
                raise UserError(f"--classes 3 expects bacteria or virus in {path}. Use --classes 2")
            label = 1 + (found[0] == "virus")
        records.append(record(id, label, folder, str(path), patient))
    for pattern, ids in sorted(left_out.items()):
        print_once(f"left out: {len(ids)} {pattern}. Expected JPEG, PNG or DICOM files below "
                   f"train/CLASS/ or test/CLASS/, not {ids[0]}")
    if (root / "patients.csv").exists():
        read_patients(root / "patients.csv", records)
    if (n := sum(r["id"].startswith("val/") for r in records)) > 16:
        print_once(f"val/: its {n} images join the training images, before validation is split off")
    if n := sum(r["group"] == r["id"] for r in records):
        print_once(f"{n} of {len(records)} images have no known patient. Each counts as a patient")
    if len(names) == 2 and names[0].upper() != "NORMAL":
        print_once(f"positive: {names[1]}. If that is the healthy class, rename its folder NORMAL")
    names = [name.removeprefix("XR_") for name in names]
    return records, ["NORMAL", "BACTERIAL", "VIRAL"] if three else names

def files_below(folder, visited):
    """Yield the paths of all files below a folder. Links are followed, but no folder twice."""
    visited.add(os.path.realpath(folder))
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith(".") or entry.name == "Thumbs.db":
            continue
        if re.search("[\r\n\ud800-\udfff]", entry.name):  # no CSV or terminal could show it
            raise UserError(f"Rename {entry.path!a}. Expected UTF-8 and no line breaks in names")
        if not os.path.isdir(entry.path):  # entry.is_dir() would raise for a link to itself
            yield entry.path
        elif os.path.realpath(entry.path) not in visited:
            yield from files_below(entry.path, visited)

# ---- patients and splits -------------------------------------------------------------------------
def hash_fraction(name):
    """Return a number in [0, 1) that depends on the name only, the same on every machine."""
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:6]) / 2**48

def find_patient(path, name):
    """Return the patient by the DICOM header or the name, "" if unknown, None if it is no image."""
    header = {} if IMAGE_FILE.fullmatch(path.name) else read_dicom(
        path, stop_before_pixels=True, specific_tags=["PatientID"])
    if header is None:
        return None
    found = PATIENT.search(name)
    return str(header.get("PatientID") or "").strip() or (found[0] if found else "")

def read_patients(path, records):
    """Take the patient of every image from a list of the user's own."""
    with explain(f"{path} needs the columns file, patient and one row per image"):
        rows = [(row["file"], row["patient"].strip()) for row in read_csv(path)]
        counts, patients = Counter(file for file, patient in rows if patient), dict(rows)
        if wrong := [r["id"] for r in records if counts[r["id"]] != 1]:
            raise ValueError(f"{len(wrong)} have no patient or several rows, such as {wrong[0]}")
    for r in records:
        r["group"] = patients[r["id"]]

def refuse_shared_files(records):
    """Refuse a file that links make both a training and a test image."""
    seen = {}
    for r in records:
        first = seen.setdefault(os.path.realpath(r["path"]) if r["path"] else r["id"], r)
        if first["folder"] != r["folder"]:
            raise UserError(f"{first['id']} and {r['id']} are the same file. Remove one of the two")

def carve_validation(records, fraction):
    """Move whole patients from train to val until val has that fraction of each class. A network
    could recognise a patient in both. Unlabelled images of a moved patient are not used."""
    patients = defaultdict(list)
    for r in records:
        if r["split"] == "train":
            patients[r["group"]].append(r)
    counts = Counter(r["kind"] for rs in patients.values() for r in rs if r["kind"] >= 0)
    wanted = {kind: max(1, round(fraction * n)) for kind, n in counts.items()} | {-1: 0}
    for group in sorted(patients, key=hash_fraction):
        if any(wanted[r["kind"]] > 0 for r in patients[group]):
            for r in patients[group]:
                r["split"] = "val" if r["kind"] >= 0 else "unused"
                wanted[r["kind"]] -= 1

def keep_per_class(records, per_class, val_fraction):
    """Keep `per_class` images of each class at most, in train plus val (of phantoms, in train)."""
    wanted = {"train": per_class}
    if all(r["folder"] != "val" for r in records):  # phantoms keep their own validation images
        wanted["val"] = min(per_class - 1, max(1, round(val_fraction * per_class)))
        wanted["train"] -= wanted["val"]
    for r in [r for split, n in wanted.items() for r in surplus(records, split, n)]:
        r["split"] = "unused"

def surplus(records, split, n):
    """Yield the images of a split beyond the first n of each class, ordered by a hash of names."""
    seen = Counter()
    for r in sorted(records, key=lambda r: hash_fraction(r["id"])):
        if r["split"] == split and r["kind"] >= 0:
            seen[r["kind"]] += 1
            if seen[r["kind"]] > n:
                yield r

# ---- decoding, the cache, prepare ----------------------------------------------------------------
def read_dicom(path, **options):
    """Return a DICOM file as pydicom reads it, or None for another kind of file."""
    with open(path, "rb") as file:
        if file.read(132)[128:] != b"DICM":
            return None
    try:
        from pydicom import dcmread
    except ImportError as error:
        raise UserError(f"{path} is a DICOM file. To read it: pip install pydicom") from error
    with explain(f"{path} cannot be read. Repair or remove it"):
        return dcmread(path, **options)

def open_image(path):
    """Return a file as a PIL image. A DICOM file becomes the grey levels that its window shows."""
    file = read_dicom(path)
    if file is None:
        return Image.open(path)
    from pydicom.pixels import apply_modality_lut, apply_voi
    if int(file.get("NumberOfFrames") or 1) > 1:
        raise ValueError("it has several frames")
    if file.SamplesPerPixel == 3:
        return Image.fromarray(file.pixel_array)
    greys = {"MONOCHROME1": [255, 0], "MONOCHROME2": [0, 255]}[file.PhotometricInterpretation]
    pixels = apply_modality_lut(file.pixel_array, file)  # rescale slope and intercept
    if file.get("WindowWidth"):  # one window, or the first of several
        centre, width = (np.ravel(value)[0] for value in (file.WindowCenter, file.WindowWidth))
        low, high = centre - width / 2, centre + width / 2 - 1  # by PS3.3 of DICOM, C.11.2.1.2.1
    else:
        pixels = apply_voi(pixels, file)  # a table of greys, if the file has one
        low, high = pixels.min(), pixels.max()
    return Image.fromarray(np.interp(pixels, [low, high], greys).round().astype(np.uint8))

def decode(path, size):
    """Return an image as (1, size, size) uint8: grey, and stretched, so that no lung is cut off."""
    with explain(f"{path} cannot be read. Repair or remove it"), open_image(path) as image:
        image.draft("L", (size, size))  # a JPEG is decoded at 1/2, 1/4 or 1/8 if that is enough
        ImageOps.exif_transpose(image, in_place=True)  # upright, if the file says how
        if image.mode.startswith("I"):  # 16 bits: 65535 becomes 255
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        grey = image.convert("L").resize((size, size), Image.Resampling.BILINEAR)  # antialiased
    return torch.from_numpy(np.array(grey))[None]

def decode_blocks(records, size):
    """Yield the images as arrays (up to 512, 1, size, size)."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # PIL decodes without holding Python's lock
        for start in progress(range(0, len(records), 512), "decoding images, blocks of 512"):
            block = records[start : start + 512]
            yield np.stack([*pool.map(lambda r: decode(r["path"], size), block)])

def cached_array(path, dtype, shape, blocks):
    """Return the tensor that a file holds. If it is missing, write it from its blocks first."""
    if not path.exists():
        with atomic(path) as temporary, open(temporary, "wb") as file:
            np.lib.format.write_array_header_1_0(file, {
                "descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape})
            for block in blocks:
                file.write(np.ascontiguousarray(block))
    with explain(f"{path} is damaged; delete it, and it is made again"):
        rows = np.load(path, mmap_mode="c")  # read from disk row by row: it may exceed memory
        if ((rows.dtype, rows.shape, rows.flags.c_contiguous) != (np.dtype(dtype), shape, True)
                or rows.offset + rows.nbytes != path.stat().st_size):
            raise ValueError(f"expected {dtype} of the shape {shape}")
        return torch.from_numpy(rows)

def prepare(images, device, affines=None):
    """Turn uint8 images (B, 1, H, W) into normalised floats (B, 3, H, W). `affines` (B, 2, 3) are
    the augmentation, in relative coordinates, so that the same affines serve every image size."""
    x = images.to(device, non_blocking=True).float()  # (B, 1, H, W), 0 to 255
    if affines is not None:
        # In float64, because under autocast a float32 grid would be computed with 8 bits.
        grid = F.affine_grid(affines.to(device).double(), x.shape, align_corners=False)
        x = F.grid_sample(x, grid.float(), align_corners=False)
    # Channels are last in memory from the start: convolutions run up to twice as fast on that.
    shift, scale = normalisation(device, MEAN, STD)
    return torch.addcmul(shift, x.permute(0, 2, 3, 1), scale).permute(0, 3, 1, 2)

@functools.cache
def normalisation(device, mean, std):
    """Return shift and scale with (x / 255 - mean) / std = shift + x * scale, copied once."""
    return (-mean / std).to(device), (1 / (255 * std)).to(device)

# ---- two public sets with several findings per image, by their CSVs ------------------------------
CHESTXRAY14 = ["Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule",
               "Pneumonia", "Pneumothorax", "Consolidation", "Edema", "Emphysema", "Fibrosis",
               "Pleural_Thickening", "Hernia"]  # in the order of its authors
CHEXPERT = ["Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema",
            "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion",
            "Pleural Other", "Fracture", "Support Devices"]

def known_csvs(root):
    """Return, per known CSV in a folder, its path, the function that lists it, and its findings."""
    newest_first = sorted(root.glob("Data_Entry_2017*.csv"), reverse=True)  # ..._v2020.csv
    return [*((path, list_chestxray14, CHESTXRAY14) for path in newest_first),
            *((path, list_chexpert, CHEXPERT) for path in root.glob("valid.csv"))]

def list_csv(path, list_rows, findings):
    """Return a record per image that the CSV lists and that exists, and the names of findings."""
    with explain(f"{path} is not the CSV that its authors published; fetch it again"):
        records = list(list_rows(path))
    found = [r for r in records if r["path"] and os.path.isfile(r["path"])]
    if not found:
        raise UserError(f"No image of {path} is below {path.parent}. Unpack them there")
    (id, n), = Counter(r["id"] for r in records).most_common(1)
    if n > 1:
        raise UserError(f"{path} has {n} rows of {id}. Expected one per image; fetch it again")
    if n := len(records) - len(found):
        print_once(f"{n} images of the CSV are not in {path.parent}: left out")
    return found, findings

def files_by_name(root):
    paths = [p for p in files_below(root, set()) if IMAGE_FILE.fullmatch(p)]
    by_name = {os.path.basename(path): path for path in paths}
    if len(by_name) < len(paths):
        raise UserError(f"Two images below {root} have the same name: keep one folder of images")
    return by_name

def list_chestxray14(path):
    """Yield records of ChestX-ray14. Two lists beside its CSV assign images to train or test."""
    paths = files_by_name(path.parent)
    with explain(f"test_list.txt and train_val_list.txt are expected beside {path}; fetch both"):
        splits = {id: split for split, name in (("train", "train_val_list"), ("test", "test_list"))
                  for id in path.with_name(f"{name}.txt").read_text(encoding="utf-8").split()}
    for row in read_csv(path):
        id, found = row["Image Index"], row["Finding Labels"].split("|")
        assert row["Patient ID"] and {*found} <= {*CHESTXRAY14, "No Finding"}, row
        if id not in splits:
            raise UserError(f"{id} is in neither of the two lists beside {path}. Fetch both again")
        yield record(id, [float(name in found) for name in CHESTXRAY14], splits[id], paths.get(id),
                     row["Patient ID"])

def list_chexpert(path):
    """List CheXpert's frontal images: 1.0, 0.0, -1.0 (unknown) or empty (0). Test: valid.csv."""
    values = {"": 0.0, "0.0": 0.0, "1.0": 1.0, "-1.0": torch.nan}
    for name, split in (("train.csv", "train"), ("valid.csv", "test")):
        for row in read_csv(path.with_name(name)):
            if row["Frontal/Lateral"] == "Frontal":
                id = row["Path"]  # its first folder is the set's own name, which may differ here
                yield record(id, [values[row[finding]] for finding in CHEXPERT], split,
                             os.path.join(path.parent, id.split("/", 1)[1]), PATIENT.search(id)[0])

# ---- phantoms: chest X-rays drawn here -----------------------------------------------------------
PHANTOM_SOURCES = {"phantoms": ["NORMAL", "PNEUMONIA"],
                   "findings": ["OPACITY", "LARGE_HEART", "FLUID"]}  # several findings per image
PHANTOMS = {"train": (640, 11), "val": (160, 12), "test": (600, 16)}  # images, seed

def phantoms(n, size, seed):
    """Return n drawn X-rays: images (n, 1, size, size), labels (n,), masks (n, size, size)."""
    labels = torch.arange(n) % 2
    images, masks, _ = draw(n, size, seed, labels[:, None].float())  # half show pneumonia
    return images, labels, masks

def list_phantoms(source):
    records = []
    for split, (n, seed) in PHANTOMS.items():
        shows = (torch.arange(n) % 2).tolist()
        if source == "findings":  # independent of each other
            g = torch.Generator().manual_seed(2000 + seed)
            shows = (torch.rand(n, 3, generator=g) < 0.4).float().tolist()
        chances = torch.rand(n, generator=torch.Generator().manual_seed(1000 + seed)).tolist()
        records += [record(f"phantom-{split}-{i}", shows[i], split, shows=shows[i], bytes=seed,
                           changed=0, chance=chances[i]) for i in range(n)]  # bytes: the seed
    return records

def draw_blocks(records, size):
    """Yield one array (n, 2, size, size): the phantoms of a split, and 255 where opacities are."""
    shows = torch.tensor([r["shows"] for r in records]).float().view(len(records), -1)
    images, masks, _ = draw(len(records), size, records[0]["bytes"], shows)
    yield torch.cat([images, 255 * masks[:, None].to(torch.uint8)], 1).numpy()

def draw(n, size, seed, findings):
    """Return images, masks of opacities and masks of lungs. findings: (n, 1 or 3) of 0 and 1."""
    chests = random_chests(n, seed, findings)
    drawn = [draw_chest({name: value[i] for name, value in chests.items()}, size)
             for i in progress(range(n), "drawing phantoms")]
    images, masks, lungs = (torch.stack(parts) for parts in zip(*drawn, strict=True))
    return images[:, None], masks, lungs

def random_chests(n, seed, findings):
    """Return the shapes of n chests, {name: (n, ...)}, which are the same at every size."""
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
    """Draw one chest: image (size, size) uint8, mask of the opacities, mask of the lungs."""
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

# ---- small helpers that all scripts share --------------------------------------------------------
print_once = functools.cache(print)  # load() is called again at a teacher's size

def cli(main):
    """Call a script's main. A user's mistake prints one line (exit code 1), our bug a traceback."""
    try:
        main()
        sys.stdout.flush()  # here and not at exit, where a broken pipe could not be caught
    except BrokenPipeError:  # such as `| head`, which has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped. Repeat the command (train.py resumes from the last saved epoch)")

@contextmanager
def explain(sentence):
    """Turn whatever a damaged or foreign file raises inside the block into one UserError."""
    try:
        yield
    except (UserError, NameError, ImportError, ZeroDivisionError, MemoryError):
        raise  # a UserError explains itself, and the others show the traceback of a bug of ours
    except Exception as error:
        text = " ".join(str(error).split())[:150] or "no more is known"
        raise UserError(f"{sentence} ({type(error).__name__}: {text})") from error

@contextmanager
def atomic(path):
    """Yield a name to write to. The file is moved to `path` only once it is complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileNotFoundError):  # another process may remove them first
        for part in path.parent.glob(".*.part"):  # of processes that were killed while they wrote
            if time.time() - part.stat().st_mtime > 3600:
                part.unlink()
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

def progress(items, text, total=None):
    """Yield the items and print the progress, every 0.5 s in a terminal, else once per minute."""
    total = len(items) if total is None else total
    start = shown = time.perf_counter()
    every, begin, end = (0.5, "\r\033[K", "") if sys.stdout.isatty() else (60, "", "\n")
    for done, item in enumerate(items):
        now = time.perf_counter()
        if done and now - shown > every:
            shown = now
            minutes, rest = divmod(round((now - start) / done * (total - done)), 60)
            print(f"{begin}{text}  {done}/{total}  {minutes}:{rest:02} left", end=end, flush=True)
        yield item
    print(begin, end="", flush=True)

def read_csv(path):
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    assert rows, f"{path} is empty"
    return rows

def fingerprint(*facts):
    """Return 16 hex digits that change when any of the facts does."""
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:16]

class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show the script's docstring as it is, then every flag with its default."""

# ---- audit, download, the command line -----------------------------------------------------------
def audit(source, classes=None):
    """Count images and patients, and report what would make results on them doubtful."""
    records, names = list_images(source, classes)
    patients = defaultdict(list)  # (split, column): the patient of each image
    for r in records:
        for k, name in [*enumerate(names), (-1, "UNLABELLED")]:
            if r["label"] == k or isinstance(r["label"], list) and k >= 0 and r["label"][k] == 1:
                patients[r["split"], name].append(r["group"])
        patients[r["split"], "all"].append(r["group"])
    columns = [*names, *["UNLABELLED"] * (("train", "UNLABELLED") in patients), "all"]
    print("images (patients)", *(f"{name:>17}" for name in columns), sep="  ")
    for split in [split for split in ("train", "val", "test") if (split, "all") in patients]:
        cells = [f"{len(patients[split, c])} ({len({*patients[split, c]})})" for c in columns]
        print(f"{split:<17}", *(f"{cell:>17}" for cell in cells), sep="  ")
    shared = {*patients["train", "all"]} & {*patients["test", "all"]}
    print("patients in both train and test:", len(shared))
    refuse_shared_files(records)

def download(folder):
    """Fetch, check and unpack the public set. A file with another hash is never unpacked."""
    folder = Path(folder).resolve()
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty. Choose a new folder to unpack into")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (explain(f"{URL} could not be fetched and unpacked; run the command again"),
          TemporaryDirectory(dir=folder.parent) as work):
        torch.hub.download_url_to_file(URL, f"{work}/set.zip", hash_prefix=SHA256)
        shutil.unpack_archive(f"{work}/set.zip", f"{work}/set")  # no absolute paths, no ..
        os.replace(f"{work}/set", folder)
    print(f"unpacked to {folder}; now  python data.py {folder}")

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    p.add_argument("folder", metavar="FOLDER", help="a folder, or: phantoms, findings (built in)")
    p.add_argument("--classes", type=int, choices=[2, 3], help="3: normal, bacterial, viral")
    p.add_argument("--download", action="store_true", help="fetch the public set into a new folder")
    args = p.parse_args(argv)
    if args.download:
        return download(args.folder)
    audit(args.folder, args.classes)

if __name__ == "__main__":
    cli(main)
