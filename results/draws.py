"""Make folders with other labelled images: python results/draws.py FOLDER DRAW [DRAW ...]

data/draw-DRAW holds links to the images of FOLDER. In the folders of its classes are the validation
images and a few other images, drawn with the seed DRAW. The rest are in train/UNLABELLED. Train
with `--labels-per-class 10` and the printed `--val-fraction`. Then ten images per class have a
label, and the validation images are those of FOLDER. Draw 0 keeps the ten that this flag keeps in
FOLDER.
"""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import data

N = 10  # labels per class


def validation_share(labels):
    """Return the --val-fraction that makes images with these labels the validation images, and how
    many more images this needs per class: at least N. --labels-per-class hides labels above N."""
    counts = labels.bincount().tolist()
    share = min(n / (n + N) for n in counts)
    return round(share, 4), [round(n / share) - n for n in counts]


def link(source, draw):
    images, root = data.load(source, 8), Path(f"data/draw-{draw}")
    share, more = validation_share(images.val.labels)
    with_label = set(images.val.ids)
    for label, n in enumerate(more):
        ids = [images.train.ids[i] for i in (images.train.labels == label).nonzero()]
        ids.sort(key=data.hash_fraction)
        with_label.update(random.Random(draw).sample(ids, n) if draw else ids[:n])
    links = {root / "test": Path(source, "test")}
    for id in images.train.ids + images.val.ids:
        _, name, file = id.split("/")
        folder = name if id in with_label else "UNLABELLED"
        links[root / "train" / folder / file] = Path(source, id)
    for place, file in links.items():
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists():
            place.symlink_to(file.resolve())
    print(f"{root}: --labels-per-class {N} --val-fraction {share}")


if __name__ == "__main__":
    for draw in map(int, sys.argv[2:]):
        link(sys.argv[1], draw)
