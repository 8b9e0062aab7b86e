"""Judge trained runs on the test images: the only place where the test split is opened.

    python evaluate.py runs/demo/teacher runs/demo/baseline runs/demo/student-T1
    python evaluate.py runs/demo/* --json results/demo.json     and kept: the tables, every figure
    python evaluate.py runs/demo/* --report                     more columns, a report by class
    python evaluate.py runs/demo/* --plot demo.svg              the table as a picture

One table, a row a run; runs that differ only in their seed share one, mean and standard deviation.
Below every figure stands its 95 % interval; the last rows are what distillation changed. Every
figure also goes into metrics.json in the run's folder, every answer into predictions.csv.

Class 1 is the positive one: sensitivity is the share of its images that are found, specificity the
share of the others left alone. With more classes each is taken against the rest, then averaged.
"""

import argparse
import html
import json
import math
import re
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torchvision.utils import make_grid

from data import (Help, UserError, aligned, atomic, decode, explain, load_as, mean, origin, outline,
                  prepare, read_csv, run, usable_device, write_csv, write_picture)
from kd import mean_teacher
from models import (as_read, cost, forward, grad_cam, last_maps, load_checkpoint, refuse_foreign,
                    run_file, stopped_at, unfinished)

COLUMNS = ["auc", "accuracy", "specificity", "sensitivity", "ece"]
MORE = ["precision", "f1", "loss"]  # with --report
BINS = 15  # of the calibration error
REPEATS = 1000  # of the bootstrap
MAPS = 7  # Grad-CAM's maps need so many places a side, or they say little of where


# ---- metrics: all of them from weighted counts ---------------------------------------------------


@torch.inference_mode()
def predict(model, table, device, batch_size=64):
    """Logits (N, C) for every row of a table: images, or features where only the end is a model."""
    model.eval()
    parts = [forward(model, prepare(table[rows.to(table.device)], device))[0].float().cpu()
             for rows in torch.arange(len(table)).split(batch_size)]
    return torch.cat(parts)


def auc(scores, truth, weights):
    """Weighted area under the ROC curve (R,): how often a positive outscores a negative.

    scores (N,), truth (N,) in {0, 1}, weights (R, N): one row a bootstrap sample. Ties count half.
    """
    values, place = scores.unique(return_inverse=True)  # sorted, so a place is a rank with ties
    at = weights.new_zeros(len(weights), len(values))
    negatives = at.index_add(1, place, weights * (truth == 0))
    positives = at.index_add(1, place, weights * (truth == 1))
    below = negatives.cumsum(1) - negatives
    return (positives * (below + negatives / 2)).sum(1) / (positives.sum(1) * negatives.sum(1))


def calibration_error(confidence, correct, weights):
    """Expected calibration error (R,): |stated minus true share of right answers|, over 15 bins."""
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    gaps = weights * (confidence - correct.double())
    sums = weights.new_zeros(len(weights), BINS).index_add(1, bins, gaps)
    return sums.abs().sum(1) / weights.sum(1)


def against_rest(logits, labels):
    """scores, truth and calls (0 or 1), each (N, K): K = 1 for two classes, else one a class.

    A score is the log-odds of a class, which ranks images as its probability does, but does not
    round to 1 where the network is very sure.
    """
    n = logits.shape[1]
    others = logits[:, None].repeat(1, n, 1).masked_fill(torch.eye(n, dtype=torch.bool), -math.inf)
    scores = logits - others.logsumexp(2)
    truth, calls = F.one_hot(labels, n), F.one_hot(logits.argmax(1), n)
    return (t[:, 1:] if n == 2 else t for t in (scores, truth, calls))


def each_finding(logits, labels):
    """Every finding by itself, as two classes: sigmoid(z) is the second of softmax((0, z)).

    Yields logits (n, 2), labels (n,) and where the label is known (N,).
    """
    for z, truth in zip(logits.T, labels.T, strict=True):
        known = ~truth.isnan()
        yield F.pad(z[known, None], (1, 0)), truth[known].long(), known


def measure(logits, labels, weights):
    """The metrics for R weightings of the images, weights (R, N): a dict of tensors (R,), or (R, K)
    where an image may have several findings, labels (N, K).

    All ones give the figure itself, bootstrap multiplicities its spread: one code for both.
    """
    if labels.dim() == 2:
        each = [measure(z, truth, weights[:, known])
                for z, truth, known in each_finding(logits, labels)]
        return {name: torch.stack([one[name] for one in each], 1) for name in each[0]}
    logits, weights = logits.double(), weights.double()
    scores, truth, calls = against_rest(logits, labels)
    tp = weights @ ((calls == 1) & (truth == 1)).double()  # (R, K)
    fp = weights @ ((calls == 1) & (truth == 0)).double()
    fn = weights @ ((calls == 0) & (truth == 1)).double()
    tn = weights @ ((calls == 0) & (truth == 0)).double()
    by_class = {
        "specificity": tn / (tn + fp),
        "sensitivity": tp / (tp + fn),
        # Nothing called positive: 0, as is customary; no positive to be found: not a number.
        "precision": (tp / (tp + fp).clamp(min=1e-12)).where(tp + fn > 0, torch.nan),
        "f1": (2 * tp / (2 * tp + fp + fn)).where(tp + fn > 0, torch.nan),
        "auc": torch.stack([auc(scores[:, k], truth[:, k], weights)
                            for k in range(scores.shape[1])], 1),
    }
    confidence, called = logits.softmax(1).max(1)
    total = weights.sum(1)
    return {
        "accuracy": weights @ (called == labels).double() / total,
        **{name: value.mean(1) for name, value in by_class.items()},
        "ece": calibration_error(confidence, called == labels, weights),
        "loss": weights @ F.cross_entropy(logits, labels, reduction="none") / total,
    }


def metrics(logits, labels, classes):
    """All figures as plain floats and lists: class 1 is positive, macro means where there are more
    than two classes, one value per finding where an image may have several."""
    if not logits.isfinite().all():
        raise UserError("the network's answers are NaN or infinite: its training diverged")
    if labels.dim() == 2:
        each = [metrics(z, truth, ["no", "yes"]) for z, truth, _ in each_finding(logits, labels)]
        return {name: [one[name] for one in each] for name in each[0]}
    values, n = measure(logits, labels, torch.ones(1, len(labels))), len(classes)
    pairs = (labels * n + logits.argmax(1)).bincount(minlength=n**2)
    return {**{name: value.item() for name, value in values.items()},
            "confusion": pairs.view(n, n).tolist()}  # rows the truth, columns the call


def report(confusion, classes):
    """Precision, recall, F1 and support of each class, their means, and the confusion matrix."""
    counts = torch.tensor(confusion, dtype=torch.float64)  # rows the truth, columns the call
    right, support, called = counts.diag(), counts.sum(1), counts.sum(0)
    values = torch.stack([right / called.clamp(min=1), right / support.clamp(min=1),
                          2 * right / (support + called).clamp(min=1)], dim=1)  # (C, 3)
    weighted = (values * support[:, None]).sum(0) / support.sum()
    rows = [[name, *(f"{v:.2f}" for v in values[k]), f"{support[k]:.0f}",
             *(f"{n:.0f}" for n in counts[k])] for k, name in enumerate(classes)]
    for name, means in (("macro avg", values.mean(0)), ("weighted avg", weighted)):
        rows.append([name, *(f"{v:.2f}" for v in means), f"{support.sum():.0f}",
                     *("" for _ in classes)])
    return aligned(["", "precision", "recall", "f1-score", "support",
                    *(f"called {name}" for name in classes)], rows)


def bootstrap_weights(groups, repeats=REPEATS, seed=0):
    """(1 + repeats, N): first all images once, for the figure itself; then how often each image is
    in each sample, when patients are drawn with replacement.

    A patient's images are correlated, so patients are drawn, with all their images.
    """
    place = {group: i for i, group in enumerate(sorted(set(groups)))}
    member = torch.tensor([place[group] for group in groups])
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(place), (repeats, len(place)), generator=generator)
    drawn = torch.zeros(repeats, len(place), dtype=torch.float64)
    drawn.scatter_add_(1, draws, torch.ones_like(drawn))
    return torch.cat([torch.ones_like(drawn[:1]), drawn])[:, member]


def over_seeds(runs):
    """(1 + R,): the mean over runs (S, 1 + R) that differ in their seed, and its bootstrap samples.

    In each sample the seeds too are drawn with replacement: another five seeds would have given
    another mean. With fewer than five seeds even this is too narrow.
    """
    seeds, samples = len(runs), runs.shape[1] - 1
    generator = torch.Generator().manual_seed(1)
    draws = torch.randint(seeds, (seeds, samples), generator=generator)
    return torch.cat([runs[:, :1].mean(0), runs[:, 1:].gather(0, draws).mean(0)])


def interval(samples):
    """The middle 95 % of the bootstrap samples (R, ...), leaving out those of one class."""
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    return torch.nanquantile(samples.double(), ends, dim=0)


# ---- Grad-CAM as pictures ------------------------------------------------------------------------


def probabilities(logits, multilabel):
    return logits.sigmoid() if multilabel else logits.softmax(1)


def show_cams(path, records, device, n=6):
    """Grad-CAM of n test images that show something: one a patient, the classes in turn, those
    first of which the first run is surest. The last two are images that some run calls wrongly."""
    data = records[0]["data"]
    labels, says = data.test.labels, [probabilities(r["test"], data.multilabel) for r in records]
    if data.multilabel:  # of several findings the first
        shows, targets = (labels == 1).any(1), (labels == 1).int().argmax(1)
    else:
        shows, targets = labels >= int(data.classes[0].upper() == "NORMAL"), labels
    shares = [p.gather(1, targets[:, None])[:, 0] for p in says]
    wrong = [share <= 0.5 if data.multilabel else p.argmax(1) != targets
             for share, p in zip(shares, says, strict=True)]
    turns, patients, candidates = Counter(), set(), []
    for i in shares[0].argsort(descending=True).tolist():
        if shows[i] and data.test.groups[i] not in patients:
            patients.add(data.test.groups[i])
            turns[int(targets[i])] += 1
            candidates.append((turns[int(targets[i])], i))
    if not candidates:
        raise UserError("--cam found no test image that shows anything")
    order = [i for _, i in sorted(candidates, key=lambda pair: pair[0])]
    missed = [i for i in order if torch.stack(wrong).any(0)[i]][:2]
    chosen = [i for i in order if i not in missed][: n - len(missed)] + missed
    runs = [(r["name"], load_checkpoint(r["folder"])[0].to(device), r["data"].test.images[chosen],
             targets[chosen], [f"{100 * p:.0f} %" for p in share[chosen]], missing[chosen])
            for r, share, missing in zip(records, shares, wrong, strict=True)]
    masks = getattr(data.test, "masks", None)  # of phantoms, the opacities
    draw_cams(path, [data.classes[targets[i]] for i in chosen], runs, device,
              masks if masks is None else masks[chosen])


def draw_cams(path, titles, runs, device, masks=None, side=224):
    """A PNG with a row an image: the image, then for each run its heat, and what it says.

    runs: of each its name, its network, the images at its size, (N,) the classes whose heat is
    drawn, (N,) texts, and (N,) whether its call is wrong, which is crossed. masks: (N, H, W), what
    is to be outlined in the images of the first run.
    """
    plain = runs[0][2].expand(-1, 3, -1, -1)
    plain = resize(plain if masks is None else outline(plain, masks), side)
    columns = [[caption(tile, title) for tile, title in zip(plain, titles, strict=True)]]
    grey, yellow = resize(runs[0][2], side), torch.tensor([255.0, 200, 0]).view(1, 3, 1, 1)
    for name, model, images, targets, texts, wrong in runs:
        x = prepare(images, device)
        maps = last_maps(model, as_read(model, x))[1]
        if maps < MAPS:
            print(f"no Grad-CAM of {name}: its last maps are {maps} x {maps}, and less than {MAPS} "
                  f"x {MAPS} say little of where. Train it at a larger --size")
            continue
        heat = resize(grad_cam(model, x, targets.to(device))[:, None].cpu(), side)
        # No heat leaves the image as it is. Yellow is brighter than tissue, also on grey paper.
        warm = grey + 0.6 * heat * (yellow - grey)
        columns.append([caption(*each) for each in zip(
            warm, [f"{name} {text}" for text in texts], wrong.tolist(), strict=True)])
    if len(columns) > 1:
        tiles = [tile for row in zip(*columns, strict=True) for tile in row]
        write_picture(path, make_grid(tiles, nrow=len(columns), padding=3))
        print(f"Grad-CAM of {len(titles)} image{'s' * (len(titles) > 1)}: {path}")


def resize(images, side):
    return F.interpolate(images.float(), (side, side), mode="bilinear")


def caption(tile, text, crossed=False):
    """tile (3, H, W), its text in white on black, broken where the tile ends."""
    picture = Image.fromarray(tile.byte().permute(1, 2, 0).numpy())
    draw, side = ImageDraw.Draw(picture), picture.width
    text = "\n".join(textwrap.wrap(text, side // 7))
    *_, right, bottom = draw.multiline_textbbox((4, 3), text)
    draw.rectangle((0, 0, right + 4, bottom + 4), fill="black")
    draw.multiline_text((4, 3), text, fill="white")
    if crossed:
        for ends in ((-28, -28, -8, -8), (-28, -8, -8, -28)):
            for width, colour in ((7, "black"), (3, "white")):
                draw.line([side + end for end in ends], colour, width)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def read_image(path, folders, cam, device):
    """What every run says of one image that no data set holds, and where it looked."""
    runs = []
    for folder in folders:
        model, facts = load_checkpoint(folder)
        model.to(device, memory_format=torch.channels_last)
        with explain(f"{folder} is not a checkpoint of this project"):
            classes, multilabel = facts["classes"], facts["multilabel"]
        with explain(f"{path} is not a readable JPEG or PNG"):
            image = decode(path, facts["size"])[None]
        says = probabilities(predict(model, image, device), multilabel)
        name = run_file(folder).parent.name
        pairs = zip(classes, says[0], strict=True)
        print(f"{name}: " + ", ".join(f"{k} {100 * p:.1f} %" for k, p in pairs))
        call = says.argmax(1)  # each run's own call, and the heat that speaks for it
        text = f"{classes[call]} {100 * says[0, call].item():.0f} %"
        runs.append((name, model, image, call, [text], torch.tensor([False])))
    if cam:
        draw_cams(cam, [Path(path).name], runs, device)


# ---- runs ----------------------------------------------------------------------------------------


def judge(folder, device, source, cache, loaded):
    """A run as a record: its facts, logits, figures, and their bootstrap samples. loaded: the data
    sets at hand, so that runs of one size share one."""
    model, facts = load_checkpoint(folder)
    args, source = facts["args"], source or facts["args"]["data"]
    choice = ("per_class", "classes", "val_fraction")
    key = (facts["size"], source, *(args[flag] for flag in choice))
    if key not in loaded:
        loaded[key] = load_as(args, facts["size"], ("val", "test"), cache, source)
    data = loaded[key]
    refuse_foreign(folder, facts, data)
    if source == args["data"] and facts["images"][1] != data.val.fingerprint:
        print(f"{folder}: {source} has changed since. Validation is not what chose its epoch, and "
              f"images that were moved from train to test are not known again")
    model.to(device, memory_format=torch.channels_last)  # and not kept: 30 runs may not fit
    val, test = (predict(model, split.images, device) for split in (data.val, data.test))
    figures = metrics(test, data.test.labels, data.classes)
    # The same samples for every run: differences between two runs are paired.
    samples = measure(test, data.test.labels, bootstrap_weights(data.test.groups))
    figures["interval"] = {name: interval(v[1:]).tolist() for name, v in samples.items()}
    folder = run_file(folder).parent
    return {
        "name": folder.name, "folder": folder, "facts": facts, "args": args, "data": data,
        "cost": cost(model, facts["size"]), "test": test, "samples": samples,
        "validation": metrics(val, data.val.labels, data.classes),
        "figures": figures,
    }


def write_predictions(path, data, logits):
    """A line an image, for any other program: who it is, its label, each class's probability."""
    labels = data.test.labels.view(len(logits), -1)
    titles = [f"label {name}" for name in data.classes] if data.multilabel else ["label"]
    columns = [data.test.ids, data.test.groups, *labels.T.tolist(),
               *probabilities(logits.double(), data.multilabel).T.tolist()]  # of float32 many are 1
    write_csv(path, ["image", "patient", *titles, *data.classes], zip(*columns, strict=True))


def write_json(path, content):
    content = json.loads(json.dumps(content), parse_constant=lambda name: None)  # JSON has no NaN
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1))


def kept(record, device):
    """What goes into metrics.json: every figure of a run, and where it came from."""
    data, facts = record["data"], record["facts"]
    return {"test": record["figures"], "validation": record["validation"], "classes": data.classes,
            "data": data.source, "images": len(data.test.labels),
            "patients": len(set(data.test.groups)), "args": record["args"],
            "epoch": facts["epoch"], "cost": record["cost"],
            "trained_by": facts["provenance"], "judged_by": origin(device)}


# ---- tables --------------------------------------------------------------------------------------

# Flags that change no figure.
MACHINE = ("out", "recipe", "device", "no_amp", "cache", "tensorboard")
TRAINED_ON = ("images", "processes")  # facts that say more than the flags do


def variants(records):
    """The runs, those together that differ in their seed and their teacher's alone: they share a
    row."""
    groups = {}
    for record in records:
        same = {k: v for k, v in record["args"].items() if k not in (*MACHINE, "seed")}
        same |= {k: record["facts"][k] for k in TRAINED_ON}
        key = re.sub(r"-seed\d+", "", json.dumps(same, sort_keys=True))
        groups.setdefault(key, []).append(record)
    for same in groups.values():
        by_seed = {}
        for record in same:
            other = by_seed.setdefault(record["args"]["seed"], record)
            if other is not record:
                raise UserError(f"{other['folder']} and {record['folder']} have the same seed and "
                                f"flags: they would count as two seeds. Leave one out")
    return list(groups.values())


def comparable(student, baseline):
    """The same network, images, seed and training, one with a teacher and one without."""
    def training(run):
        free = (*MACHINE, "role", "teacher", "T", "alpha")
        flags = {k: v for k, v in run["args"].items() if k not in free}
        # Validation images tell the state of the folder; training images depend on hidden labels.
        return flags, run["facts"]["images"][1], run["facts"]["processes"]

    roles = student["args"]["role"], baseline["args"]["role"]
    return roles == ("student", "baseline") and training(student) == training(baseline)


def row_name(records):
    return re.sub(r"-seed\d+", "", records[0]["name"]) if len(records) > 1 else records[0]["name"]


def row_title(records):
    """The name of a row; below it the network, the number of seeds, and what has not ended."""
    seeds = f", {len(records)} seeds" if len(records) > 1 else ""
    more = "".join(unfinished(r["folder"], r["facts"]) for r in records)
    return f"{row_name(records)}\n  {records[0]['args']['arch']}{seeds}{more}"


def spread(figures):
    """The mean over runs, their standard deviation (NaN of one), both ends of the mean's interval.

    figures: of each run (1 + R,), the figure and its bootstrap samples; (1 + R, K) of findings.
    """
    runs = torch.stack([f.double().view(len(f), -1) for f in figures])  # (S, 1 + R, K)
    if runs.shape[2] > 1:  # a finding that some sample leaves without a positive is left out of all
        runs = runs[..., ~runs.isnan().any(0).any(0)]
    runs = runs.mean(2)  # (S, 1 + R)
    deviation = runs[:, 0].std().item() if len(runs) > 1 else math.nan
    samples = over_seeds(runs)[1:]
    ends = interval(samples).tolist() if len(samples) else [math.nan, math.nan]
    return [runs[:, 0].mean().item(), deviation, *ends]


def cell(figures, column="", sign=""):
    """Mean ± standard deviation, and in a second line the interval; all in percent but the loss."""
    unit, digits = (1, 3) if column == "loss" else (100, 1)
    middle, deviation, low, high = (f"{unit * v:{sign}.{digits}f}" for v in spread(figures))
    text = middle if len(figures) == 1 else f"{middle} ± {deviation.lstrip('+')}"
    return f"{text}\n[{low} {high}]" if len(figures[0]) > 1 else text


def floor_row(data, columns):
    """What a network would reach that always says the same: the commonest class, or no finding."""
    logits, title = torch.zeros(len(data.test.labels), len(data.classes)), "always the same"
    if not data.multilabel:
        commonest = data.test.labels.bincount().argmax()
        logits[:, commonest], title = 1, f"always {data.classes[commonest]}"
    floor = metrics(logits, data.test.labels, data.classes)
    return [title, "", *("" if k in ("ece", "loss") else f"{100 * mean(floor[k]):.1f}"
                         for k in columns)]


def gains(groups):
    """What distillation changed: of every row of students with baselines its title and {column:
    differences}, seed by seed on the same bootstrap samples."""
    rows = []
    for students in groups:
        for baselines in groups:
            pairs = [(s["samples"], b["samples"]) for s in students for b in baselines
                     if comparable(s, b)]
            if pairs:
                some = f", {len(pairs)} of {len(students)}" if len(pairs) < len(students) else ""
                rows.append((f"{row_name(students)}\n  minus {row_name(baselines)}{some}",
                             {k: [s[k] - b[k] for s, b in pairs] for k in pairs[0][0]}))
    return rows


def tables(records, with_grid=False, with_report=False):
    """Lines of text: a row a variant, then what distillation changed."""
    data, groups = records[0]["data"], variants(records)
    columns, score = COLUMNS + MORE * with_report, "auc" if data.multilabel else "accuracy"
    rows = [floor_row(data, columns)]
    for same in groups:
        validated = cell([torch.tensor([r["validation"][score]]) for r in same])
        rows.append([row_title(same), validated, *(cell([r["samples"][k] for r in same], k)
                                                   for k in columns)])
    rows += [[title, "", *(cell(change[k], k, "+") for k in columns)]
             for title, change in gains(groups)]
    text = grid(groups) if with_grid else []
    text += aligned([f"{len(data.test.labels)} test images, %", f"validation\n{score}", *columns],
                    rows)
    text.append("")
    if data.multilabel:
        text += findings(groups, data)
    elif len(data.classes) == 2:
        text.append(f"positive: {data.classes[1]}")
    for students in groups:
        text += agreement(students, records)
    return text


def agreement(students, records):
    """The share of images (or findings) on which students call what their teachers call, where
    those are among the runs."""
    shares, several = [], students[0]["data"].multilabel
    for student in students:
        teachers = [r for r in records if r["facts"]["sha256"] in student["facts"]["teachers"]]
        if teachers and len(teachers) == len(student["facts"]["teachers"]):
            taught = mean_teacher([r["test"] for r in teachers], student["args"]["T"], several)
            calls = [z > 0 if several else z.argmax(1) for z in (student["test"], taught)]
            shares.append((calls[0] == calls[1]).double().mean().item())
    if len(shares) < len(students):
        return []
    share, what = 100 * sum(shares) / len(shares), "findings" if several else "images"
    return [f"{row_name(students)} agrees with its teacher on {share:.1f} % of the {what}"]


def findings(groups, data):
    """The AUC of every finding, and what each network is made of."""
    rows = []
    for k, finding in enumerate(data.classes):
        truth = data.test.labels[:, k]
        cells = [cell([r["samples"]["auc"][:, k] for r in same]) for same in groups]
        rows.append([finding, f"{int(truth.nansum())} of {int((~truth.isnan()).sum())}", *cells])
    for title, key, unit in (("parameters, M", "parameters", 1e6),
                             ("multiply-adds, G", "multiply_adds", 1e9)):
        rows.append([title, "", *(f"{same[0]['cost'][key] / unit:.2f}" for same in groups)])
    text = aligned(["AUC, %", "positives", *map(row_title, groups)], rows)
    lost = torch.stack([r["samples"]["auc"].isnan().any(0) for same in groups for r in same]).any(0)
    if lost.any():
        names = ", ".join(name for name, out in zip(data.classes, lost, strict=True) if out)
        text += ["", f"left out of the mean AUC, too few positives for the bootstrap: {names}"]
    return [*text, ""]


def grid(groups):
    """Teachers down, students across: train, validation and test accuracy, means over seeds (± of
    test). Training accuracy is the loop's own: dropout on, weights still moving."""
    cells = {}
    for same in groups:
        args, facts = same[0]["args"], same[0]["facts"]
        smooth = f", label smoothing {args['label_smoothing']:g}" if args["label_smoothing"] else ""
        by = " + ".join(facts["taught_by"]) or "no teacher" + smooth
        parts = [(r["facts"]["train_accuracy"], mean(r["validation"]["accuracy"]),
                  mean(r["figures"]["accuracy"])) for r in same]
        values = 100 * torch.tensor(parts, dtype=torch.float64)
        text = " / ".join(f"{value:.1f}" for value in values.mean(0))
        text += f" ± {values[:, 2].std():.1f}" if len(same) > 1 else ""
        row, student = cells.setdefault(by, {}), args["arch"] + stopped_at(facts)
        row[student] = f"{row[student]}; {text}" if student in row else text
    students = sorted({student for row in cells.values() for student in row})
    return aligned(["train / val / test accuracy", *students],
                    [[by, *(row.get(student, "") for student in students)]
                     for by, row in cells.items()])


def reports(records):
    """Lines of text: every run's figures by class."""
    for r in records:
        yield f"\n{r['folder']}: best on validation in epoch {r['facts']['epoch']}"
        yield from report(r["figures"]["confusion"], r["data"].classes)


# ---- pictures of the table and of the histories: SVG, which is text ------------------------------


def plot(path, groups):
    """A row a variant, its AUC and accuracy as dots with 95 % intervals; below, what distillation
    changed, and the line of no change."""
    rows = [(row_title(same), {k: [r["samples"][k] for r in same] for k in COLUMNS})
            for same in groups]
    shapes, top = [], 10
    for block, what in ((rows, "%"), (gains(groups), "points gained")):
        for i, (title, _) in enumerate(block):
            for k, line in enumerate(title.split("\n")):
                shapes.append(svg_text(10, top + 50 + 36 * i + 14 * k, line[:32]))
        for column, left in (("auc", 250), ("accuracy", 560)) if block else ():
            spreads = [[100 * value for value in spread(figures[column])] for _, figures in block]
            heading = f"{column.replace('auc', 'AUC')}, {what}"
            shapes.append(svg_text(left + 120, top + 16, heading, "middle"))
            shapes += dots(spreads, left, top + 30, ticks=[0] if block is not rows else [])
        top += 36 * len(block) + 80 if block else 0
    write_svg(path, top, shapes)


def dots(spreads, left, top, ticks):
    """A dot and its interval for each of the spreads, above a scale from `left` to left + 240."""
    ends = [end for *_, low, high in spreads for end in (low, high) if end == end] + ticks or [0]
    low, high = math.floor(min(ends)), math.ceil(max(ends))
    bottom = top + 36 * len(spreads) + 10

    def x(value):
        return left + 240 * (value - low) / max(high - low, 1)

    shapes = [svg_line([(x(low), bottom), (x(high), bottom)])]
    for tick in {low, high, *ticks}:
        shapes += [svg_line([(x(tick), bottom), (x(tick), bottom - 5 if tick else top)]),
                   svg_text(x(tick), bottom + 16, tick, "middle")]
    for i, (middle, _, *both) in enumerate(spreads):
        y = top + 24 + 36 * i
        shapes += [svg_line([(x(end), y) for end in both], 'stroke-width="2"'),
                   f'<circle cx="{x(middle):.1f}" cy="{y}" r="5"/>',
                   svg_text(x(middle), y - 9, f"{middle:.1f}", "middle")]
    return shapes


def plot_curves(path, groups):
    """Accuracy by epoch, a panel a variant and a pair of lines a seed."""
    names = {"train_accuracy": 'stroke-dasharray="5 3"', "val_accuracy": ""}
    with explain("a history.csv is damaged, so leave out --curves"):
        curves = [[[float(row[name]) for row in read_csv(r["folder"] / "history.csv")]
                   for r in same for name in names] for same in groups]  # two a seed
    low = math.floor(9.9 * min(min(curve) for panel in curves for curve in panel)) / 10
    shapes = [svg_text(10, 20, "accuracy by epoch, %. Dashed: training images with a label. "
                               "Solid: validation")]
    for i, panel in enumerate(curves):
        left, top = 45 + 270 * (i % 3), 60 + 210 * (i // 3)
        epochs = max(len(curve) for curve in panel)

        def at(epoch, value, left=left, top=top, epochs=epochs):
            return left + 220 * epoch / max(epochs - 1, 1), top + 150 * (1 - value) / (1 - low)

        for value in (low, (1 + low) / 2, 1):
            x, y = at(0, value)
            shapes += [svg_text(x - 5, y + 4, f"{100 * value:.0f}", "end"),
                       svg_line([(x, y), (x + 220, y)], 'stroke-width="0.4"')]
        shapes += [svg_text(left, top - 10, row_name(groups[i])[:32]), svg_text(left, top + 168, 1),
                   svg_text(left + 220, top + 168, epochs, "end")]
        for k, curve in enumerate(panel):
            style = list(names.values())[k % 2]
            shapes.append(svg_line([at(*point) for point in enumerate(curve)], style))
    write_svg(path, 210 * ((len(groups) + 2) // 3) + 50, shapes)


def svg_text(x, y, words, anchor="start"):
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{html.escape(str(words))}</text>'


def svg_line(points, style=""):
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{points}" {style}/>'


def write_svg(path, height, shapes):
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 840 {height}" font-size="13" '
            f'font-family="sans-serif"><rect width="840" height="{height}" fill="#fff"/>'
            f'<style>polyline {{fill: none; stroke: #000}}</style>')
    with atomic(path) as temporary:
        temporary.write_text("\n".join([head, *shapes, "</svg>"]) + "\n")
    print(f"picture: {path}")


def get_args(argv=None):
    p = argparse.ArgumentParser(usage="python evaluate.py RUN [RUN ...] [FLAGS]",
                                description=__doc__, formatter_class=Help, allow_abbrev=False)
    g = p.add_argument_group("which runs, on which images")
    g.add_argument("runs", nargs="+", metavar="RUN", help="folders that train.py wrote")
    g.add_argument("--data", help="where the images are now, if they were moved after training")
    g.add_argument("--device", type=usable_device, help="cpu, cuda or cuda:N",
                   default="cuda" if torch.cuda.is_available() else "cpu")
    g.add_argument("--cache", default="cache", help="folder of decoded images; may be deleted")
    g = p.add_argument_group("what else is shown")
    g.add_argument("--report", action="store_true", help="more columns, and a report by class")
    g.add_argument("--grid", action="store_true", help="a table, teachers down and students across")
    g.add_argument("--plot", metavar="FILE.svg", help="a picture: a row a run, AUC and accuracy")
    g.add_argument("--curves", metavar="FILE.svg", help="a picture: training and validation curves")
    g.add_argument("--cam", metavar="FILE.png", help="Grad-CAM: a row an image, a column a run")
    g.add_argument("--image", metavar="FILE", help="read this JPEG or PNG and nothing else")
    g = p.add_argument_group("what is kept")
    g.add_argument("--json", metavar="FILE", help="the tables and every run's figures in one file")
    args = p.parse_args(argv)
    judging = (args.report, args.grid, args.json, args.data, args.plot, args.curves)
    if args.image and any(judging):
        p.error("--image reads one image and judges nothing: of the other flags only --cam goes "
                "with it")
    for flag, path in (("--plot", args.plot), ("--curves", args.curves)):
        if path and not path.endswith(".svg"):
            p.error(f"{flag} writes an SVG: its name must end in .svg, not {path}")
    if args.cam and args.cam == args.image:
        p.error("--cam would overwrite the --image: name another file")
    return args


def main(argv=None):
    args = get_args(argv)
    if args.image:
        return read_image(args.image, args.runs, args.cam, args.device)
    # A run that was killed before its first save must not stop `runs/demo/*`.
    ready = [folder for folder in args.runs if run_file(folder).is_file()] or args.runs
    for folder in args.runs:
        if folder not in ready:
            print(f"{folder} has no best.pt, or not yet: left out")
    records, loaded = [], {}
    for folder in ready:
        with explain(f"{folder} cannot be judged"):
            records.append(judge(folder, args.device, args.data, args.cache, loaded))
    if len({r["folder"] for r in records}) < len(records):
        raise UserError("two of these runs lie in one folder, and would share its metrics.json: "
                        "judge them in separate calls")
    if len({(*r["data"].classes, *r["data"].test.ids) for r in records}) > 1:
        raise UserError("these runs were trained for different test images or classes: judge them "
                        "in separate calls")
    text, runs = tables(records, args.grid, args.report), {}
    for record in records:
        runs[str(record["folder"])] = kept(record, args.device)
        write_json(record["folder"] / "metrics.json", runs[str(record["folder"])])
        write_predictions(record["folder"] / "predictions.csv", record["data"], record["test"])
    if args.report and not records[0]["data"].multilabel:
        text += reports(records)
    print("\n".join(text))
    if args.plot:
        plot(args.plot, variants(records))
    if args.curves:
        plot_curves(args.curves, variants(records))
    if args.cam:
        show_cams(args.cam, records, args.device)
    if args.json:
        write_json(args.json, {"tables": text, "runs": runs})


if __name__ == "__main__":
    run(main)
