"""Judge trained runs on the test films: the only place where the test split is opened.

    python evaluate.py runs/demo/teacher runs/demo/baseline runs/demo/student-T1
    python evaluate.py runs/demo/* --json results/demo.json       and kept: the tables, every figure
    python evaluate.py results/demo.json                          what was kept, printed again
    python evaluate.py runs/demo/student-T1 --export student.pt2  one run, to be used without this code

One table, a row a run (runs that differ only in their seed share a row: mean and standard deviation),
every figure with a 95 % interval from a bootstrap over patients; then what distillation changed, and a
report per run. Everything also goes into metrics.json inside each run's folder.

Class 1 is the positive one: sensitivity is the share of pneumonias found, specificity the share of
normals left alone. With more classes each is taken against the rest, and the macro mean shown.
"""

import io
import json
import math
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torchvision.utils import draw_bounding_boxes, make_grid

from data import UserError, decode, device_flag, load_as, origin, parser, prepare, run, write, write_picture
from kd import mean_teacher
from models import checkpoint_file, cost, exported, forward, load_checkpoint

NAMES = ["accuracy", "specificity", "sensitivity", "precision", "f1", "auc", "ece", "loss"]  # columns
SEVERAL = ["auc", "ap", "specificity", "sensitivity", "f1", "ece", "loss"]  # with several findings a film
BINS = 15  # of the calibration error
REPEATS = 1000  # of the bootstrap


# ---- metrics: all of them from weighted counts ------------------------------------------------------


@torch.inference_mode()
def predict(model, view, n, batch_size=64):
    """Logits (n, C) of all n films, in order; view(index) is what the model reads."""
    model.eval()
    parts = [forward(model, view(index))[0].float().cpu() for index in torch.arange(n).split(batch_size)]
    return torch.cat(parts)


def auc(scores, truth, weights):
    """Weighted area under the ROC curve (R,): the chance that a positive outscores a negative.

    scores (N,), truth (N,) in {0, 1}, weights (R, N): one row a bootstrap sample. Ties count half.
    """
    values, place = scores.unique(return_inverse=True)  # sorted, so a place is a rank with ties
    at = weights.new_zeros(len(weights), len(values))
    negatives = at.index_add(1, place, weights * (truth == 0))
    positives = at.index_add(1, place, weights * (truth == 1))
    below = negatives.cumsum(1) - negatives
    return (positives * (below + negatives / 2)).sum(1) / (positives.sum(1) * negatives.sum(1))


def average_precision(scores, truth, weights):
    """Weighted mean (R,) of the precision at each positive, from the highest score down; ties share one."""
    values, place = scores.unique(return_inverse=True)
    at = weights.new_zeros(len(weights), len(values))
    called = at.index_add(1, place, weights).flip(1).cumsum(1)
    positives = at.index_add(1, place, weights * (truth == 1)).flip(1)
    precision = positives.cumsum(1) / called.clamp(min=1e-12)
    return (precision * positives).sum(1) / positives.sum(1)


def calibration_error(confidence, correct, weights):
    """Expected calibration error (R,): |stated minus true share of right answers|, over 15 bins."""
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    gap = weights.new_zeros(len(weights), BINS).index_add(1, bins, weights * (confidence - correct.double()))
    return gap.abs().sum(1) / weights.sum(1)


def against_rest(logits, labels, threshold=0.5):
    """scores (N, K), truth (N, K) and calls (N, K): K = 1 for two classes, else one column a class."""
    logits = logits.double()
    if labels.dim() == 2:  # several findings a film; NaN where a label is unknown
        scores = logits.sigmoid()
        return scores, labels.double(), scores > threshold
    scores = logits.softmax(1)
    if logits.shape[1] == 2:
        return scores[:, 1:], labels[:, None].double(), scores[:, 1:] > threshold
    classes = torch.arange(logits.shape[1])
    calls = scores.argmax(1, keepdim=True) == classes
    return scores, (labels[:, None] == classes).double(), calls


def measure(logits, labels, weights, threshold=0.5):
    """The metrics for R weightings of the films, weights (R, N): a dict of tensors (R,),
    or (R, K) where a film may have several findings.

    All ones gives the point estimates, bootstrap multiplicities their spread: one code for both.
    """
    logits, weights = logits.double(), weights.double()
    scores, truth, calls = against_rest(logits, labels, threshold)
    tp, fp, fn, tn = (
        weights @ ((calls == called) & (truth == is_true)).double()  # (R, K); NaN equals neither
        for called, is_true in ((True, 1), (True, 0), (False, 1), (False, 0))
    )
    out = {
        "accuracy": (tp + tn) / (tp + fp + fn + tn),
        "specificity": tn / (tn + fp),
        "sensitivity": tp / (tp + fn),
        "precision": tp / (tp + fp).clamp(min=1e-12),  # nothing called positive: 0, as is customary
        "f1": (2 * tp / (2 * tp + fp + fn)).where(tp + fn > 0, torch.nan),
    }
    ranked = [(scores[m, k], truth[m, k], weights[:, m]) for k, m in enumerate(~truth.isnan().T)]
    out["auc"] = torch.stack([auc(*column) for column in ranked], 1)
    out["ap"] = torch.stack([average_precision(*column) for column in ranked], 1)
    if labels.dim() == 1:  # one label a film: how sure of the class that was called, (N, 1)
        sure, called = logits.softmax(1).max(1, keepdim=True)
        right, losses = called == labels[:, None], F.cross_entropy(logits, labels, reduction="none")[:, None]
        if logits.shape[1] > 2:
            out["accuracy"] = weights @ right.double() / weights.sum(1, keepdim=True)
    else:  # (N, K)
        sure, right = torch.maximum(scores, 1 - scores), (scores > 0.5) == (truth == 1)
        losses = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    known = ~losses.isnan()
    told = [(sure[m, k], right[m, k], weights[:, m]) for k, m in enumerate(known.T)]
    out["ece"] = torch.stack([calibration_error(*column) for column in told], 1)
    out["loss"] = weights @ losses.nan_to_num() / (weights @ known.double())
    return {name: values.mean(1) for name, values in out.items()} if labels.dim() == 1 else out


def confusion(logits, labels, classes, threshold=0.5):
    """Counts of films, rows the truth, columns the call; a 2 x 2 table per finding where multi-label."""
    _, truth, calls = against_rest(logits, labels, threshold)
    if labels.dim() == 2:
        return [
            [[int(((t == is_true) & (c == called)).sum()) for called in (False, True)] for is_true in (0, 1)]
            for t, c in zip(truth.T, calls.T, strict=True)
        ]
    called = calls[:, 0].long() if len(classes) == 2 else calls.long().argmax(1)
    pairs = labels * len(classes) + called
    return pairs.bincount(minlength=len(classes) ** 2).view(len(classes), len(classes)).tolist()


def metrics(logits, labels, classes, threshold=0.5):
    """All figures as plain floats and lists: class 1 is positive, macro means where there are more than
    two classes, one value per finding where a film may have several."""
    if not logits.isfinite().all():
        raise UserError("finite logits needed to judge a network, found NaN or infinity: training diverged")
    values = measure(logits, labels, torch.ones(1, len(labels)), threshold)
    out = {name: value[0].tolist() for name, value in values.items()}
    return {**out, "confusion": confusion(logits, labels, classes, threshold)}


def report(table, classes):
    """Precision, recall, F1 and support per class from a confusion matrix, as scikit-learn prints them."""
    table = torch.tensor(table, dtype=torch.float64)
    right, support, called = table.diag(), table.sum(1), table.sum(0)
    rows = torch.stack([right / called.clamp(min=1), right / support.clamp(min=1),
                        2 * right / (support + called).clamp(min=1)], dim=1)  # (C, 3)
    n, width = int(support.sum()), max(len("weighted avg"), *(len(name) for name in classes))
    averages = {"macro avg": rows.mean(0), "weighted avg": (rows * support[:, None]).sum(0) / n}

    def line(name, values, count):
        return f"{name:>{width}} " + "".join(f"{v:>10.2f}" for v in values) + f"{count:>10}\n"

    titles = ("precision", "recall", "f1-score", "support")
    text = " " * width + " " + "".join(f"{title:>10}" for title in titles) + "\n\n"
    for name, values, count in zip(classes, rows.tolist(), support.long().tolist(), strict=True):
        text += line(name, values, count)
    text += f"\n{'accuracy':>{width}} {'':>20}{right.sum() / n:>10.2f}{n:>10}\n"
    return text + "".join(line(name, values.tolist(), n) for name, values in averages.items())


def bootstrap_weights(groups, repeats=REPEATS, seed=0):
    """(repeats, N): how often each film is in each sample, when patients are drawn with replacement.

    Films of one child are no independent evidence, so children are drawn, with all their films.
    """
    place = {group: i for i, group in enumerate(sorted(set(groups)))}
    member = torch.tensor([place[group] for group in groups])
    draws = torch.randint(len(place), (repeats, len(place)), generator=torch.Generator().manual_seed(seed))
    drawn = torch.zeros(repeats, len(place), dtype=torch.float64)
    return drawn.scatter_add_(1, draws, torch.ones_like(drawn))[:, member]


def interval(samples):
    """The middle 95 % of the bootstrap samples (R, ...); samples without both classes count for nothing."""
    return torch.nanquantile(samples.double(), torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)


def youden_threshold(logits, labels):
    """The threshold with the largest sensitivity + specificity on these films (validation, never test).

    It lies midway between two scores; of equally good ones the closest to 0.5 is taken.
    """
    scores = logits.double().softmax(1)[:, 1]
    values = scores.unique()
    cuts = torch.cat([(values[1:] + values[:-1]) / 2, torch.tensor([0.5], dtype=torch.float64)])
    calls = scores > cuts[:, None]  # (cuts, N)
    gain = calls[:, labels == 1].double().mean(1) - calls[:, labels == 0].double().mean(1)
    best = cuts[gain > gain.max() - 1e-9]
    return float(best[(best - 0.5).abs().argmin()])


# ---- Grad-CAM: where a network looked ----------------------------------------------------------------


def last_maps(model, images):
    """The last layer whose output still has a place for every part of the film, pooling left aside.

    In a ViT what follows the last attention reaches only the class token, so the layer before that is
    taken; a Swin folds its tokens back into maps by itself.
    """
    if isinstance(model, torchvision.models.VisionTransformer):
        return model.encoder.layers[-1].ln_1
    order = []

    def note(layer, _, out):
        if isinstance(out, torch.Tensor) and out.dim() == 4 and out[0, 0].numel() > 1:
            order.append(layer)

    aside = re.compile("Pool|Drop|Identity|Sequential")  # a Sequential is as good as its last layer
    hooks = [m.register_forward_hook(note) for m in model.modules()
             if m is not model and not aside.search(type(m).__name__)]
    try:
        with torch.no_grad():
            model(images[:1])
    finally:
        for hook in hooks:
            hook.remove()
    if not order:
        raise UserError("maps needed for Grad-CAM, found none in this network: name a layer")
    return order[-1]


def raw_cam(model, images, target, layer=None):
    """sum_k a_k A_k (N, h, w): maps A of a layer, each weighed by the mean gradient of the target's logit."""
    caught = []

    def keep(module, inputs, out):
        caught.append(out)
        return out.clone()  # an in-place ReLU that follows changes the copy, not what was kept

    was_training = model.training
    model.eval()
    layer = layer or last_maps(model, images)
    hook = layer.register_forward_hook(keep)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            # Frozen weights have no gradient: it starts at the film. Nothing is added to any .grad.
            logits, _ = forward(model, images.detach().clone().requires_grad_(True))
            target = torch.as_tensor(target, device=logits.device).expand(len(logits))
            score = logits.gather(1, target[:, None]).sum()
            maps, gradient = caught[0].detach(), torch.autograd.grad(score, caught[0])[0]
    finally:
        hook.remove()
        model.train(was_training)
    if maps.dim() == 3:  # a ViT's tokens: one for the class, then the patches row by row
        side = math.isqrt(maps.shape[1] - 1)
        maps, gradient = (t[:, 1:].mT.unflatten(2, (side, side)) for t in (maps, gradient))
    return (gradient.mean((2, 3), keepdim=True) * maps).sum(1)


def grad_cam(model, images, target, layer=None):
    """Grad-CAM (Selvaraju et al. 2017): heat (N, H, W) in [0, 1] over what speaks for the target.

    images (N, 3, H, W) as the model reads them; target: a class, or one a film (N,). Where nothing speaks
    for it, the heat is 0 everywhere.
    """
    heat = raw_cam(model, images, target, layer).clamp(min=0)[:, None]
    heat = resized(heat, images.shape[-2:])[:, 0]
    return heat / heat.amax((1, 2), keepdim=True).clamp(min=1e-12)


def resized(images, size):
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False)


# ---- pictures of it ---------------------------------------------------------------------------------


def pointing(records, device):
    """The pointing game: how often the hottest point of a Grad-CAM lies on an opacity, where there is one."""
    test, target = records[0]["data"].test, 0 if records[0]["data"].multilabel else 1
    chosen = test.masks.flatten(1).any(1).nonzero()[:, 0]
    weights = bootstrap_weights([test.groups[i] for i in chosen])
    chance = test.masks[chosen].flatten(1).sum(1) / test.lungs[chosen].flatten(1).sum(1)
    hits = {"a random point in the lungs": [chance]}
    for same in variants(records):
        shape = raw_cam(same[0]["model"], prepare(same[0]["data"].test.images[:1], device), target).shape[1:]
        name = f"{row_name(same)}, maps of {shape[0]} x {shape[1]}"
        hits[name] = [hottest(record, chosen, target, device) for record in same]
    rows = []
    for name, same in hits.items():
        samples = [weights @ hit.double() / weights.sum(1) for hit in same]
        rows.append([name, cell([hit.double().mean() for hit in same], samples)])
    return markdown([f"hottest point on an opacity, {len(chosen)} films", "%"], rows)


def hottest(record, chosen, target, device):
    """True for each chosen film whose heat is greatest inside the mask."""
    test, hits = record["data"].test, []
    for index in chosen.split(64):
        heat = grad_cam(record["model"], prepare(test.images[index], device), target).flatten(1).cpu()
        hits.append(test.masks[index].flatten(1).gather(1, heat.argmax(1, keepdim=True))[:, 0])
    return torch.cat(hits)


def draw_cams(path, runs, films, titles, targets, device, side=224):
    """A PNG with a row a film: the film, then for each run its heat, and how probable it finds the target.

    runs: (name, model, multilabel); films: for every run the same ones, at its own size.
    """
    grey = resized(films[0].float(), (side, side)).expand(-1, 3, -1, -1)
    columns = [[caption(tile, title) for tile, title in zip(grey, titles, strict=True)]]
    red = torch.tensor([255.0, 60, 0]).view(1, 3, 1, 1)
    for (name, model, multilabel), images in zip(runs, films, strict=True):
        x = prepare(images, device)
        heat = resized(grad_cam(model, x, targets.to(device))[:, None].cpu(), (side, side))
        says = probabilities(predict(model, lambda index, x=x: x[index], len(x)), multilabel)
        texts = [f"{name} {100 * p:.0f} %" for p in says.gather(1, targets[:, None])[:, 0]]
        warm = grey + 0.6 * heat * (red - grey)  # where there is no heat the film stays as it is
        columns.append([caption(tile, text) for tile, text in zip(warm, texts, strict=True)])
    tiles = [tile for row in zip(*columns, strict=True) for tile in row]
    write_picture(path, make_grid(tiles, nrow=len(columns), padding=3))
    print(f"Grad-CAM of {len(targets)} films: {path}")


def caption(tile, text):
    side = tile.shape[-1] - 1
    return draw_bounding_boxes(tile.byte(), torch.tensor([[0, 0, side, side]]), [text], colors="white")


def probabilities(logits, multilabel):
    return logits.sigmoid() if multilabel else logits.softmax(1)


def show_cams(path, records, device, n=6):
    """Test films with a finding, the largest first where its extent is known and else the surest of the first
    run; the last two are films that some run calls wrongly."""
    data = records[0]["data"]
    labels = data.test.labels if data.multilabel else F.one_hot(data.test.labels, len(data.classes))[:, 1:]
    calls = [probabilities(record["test"], data.multilabel) for record in records]
    if data.multilabel:
        wrong = [((p > 0.5) != (labels == 1)).any(1) for p in calls]
    else:
        wrong = [p.argmax(1) != data.test.labels for p in calls]
    targets = (labels == 1).int().argmax(1) + (0 if data.multilabel else 1)
    extent = calls[0].gather(1, targets[:, None])[:, 0]
    if hasattr(data.test, "masks"):
        extent = data.test.masks.flatten(1).sum(1).float()
    order = extent.masked_fill(~(labels == 1).any(1), -1).argsort(descending=True).tolist()
    missed = [i for i in order if torch.stack(wrong).any(0)[i]][:2]
    chosen = [i for i in order if i not in missed][: n - len(missed)] + missed
    titles = [data.classes[targets[i]] if (labels[i] == 1).any() else "nothing found" for i in chosen]
    titles = [t + (", called wrongly" if i in missed else "") for t, i in zip(titles, chosen, strict=True)]
    runs = [(record["name"], record["model"], data.multilabel) for record in records]
    films = [record["data"].test.images[chosen] for record in records]
    draw_cams(path, runs, films, titles, targets[chosen], device)


def read_film(path, folders, cam, device):
    """What every run says of one film that no data set holds, and where it looked for its answer."""
    runs, films = [], []
    for folder in folders:
        model, facts = load_checkpoint(folder)
        model.to(device, memory_format=torch.channels_last)
        try:
            films.append(decode(path, facts["size"])[None])
        except RuntimeError as error:
            why = str(error).splitlines()[0]
            raise UserError(f"a JPEG or PNG needed in {path}, found none ({why}): give another") from None
        runs.append((checkpoint_file(folder).parent.name, model, facts["multilabel"]))
        logits = predict(model, lambda index, film=films[-1]: prepare(film, device), 1)
        says = probabilities(logits, facts["multilabel"])[0].tolist()
        text = ", ".join(f"{name} {100 * p:.1f} %" for name, p in zip(facts["classes"], says, strict=True))
        print(f"{runs[-1][0]}: {text}")
    if cam:
        target = torch.tensor([says.index(max(says))])
        draw_cams(cam, runs, films, [facts["classes"][target]], target, device)


# ---- runs -------------------------------------------------------------------------------------------


def read(folder, device, source, known, keep=False):
    """A run as a record: its facts, its logits for the validation and test films (asked once), and, to
    keep it for pictures, the network."""
    key = str(folder)
    if key in known:
        return known[key]
    model, facts = load_checkpoint(folder)
    args = facts["args"]
    same = ("data", "per_class", "classes", "val_fraction", "uncertain")
    films = (facts["size"], *(args[flag] for flag in same))
    if films not in known:
        known[films] = load_as(args, facts["size"], ("val", "test"), source)
    data = known[films]
    if data.classes != facts["classes"]:
        raise UserError(f"{folder} was trained on classes {facts['classes']}, {data.source} has "
                        f"{data.classes}: give the films it was trained for with --data")
    seen = set(facts["train_groups"]) & {*data.val.groups, *data.test.groups}
    if seen:
        raise UserError(f"{folder} was trained on {len(seen)} of the patients that it is to be judged by in "
                        f"{data.source} ({min(seen)} for one): judge it on other films")
    model.to(device, memory_format=torch.channels_last)
    folder = checkpoint_file(folder).parent
    record = {"name": folder.name, "folder": folder, "facts": facts, "args": args, "data": data}
    for part in ("val", "test"):
        split = getattr(data, part)
        view = lambda index, images=split.images: prepare(images[index], device)  # noqa: E731
        record[part] = predict(model, view, len(split.labels))
    record |= {"cost": cost(model, facts["size"]), "model": model if keep else None}
    known[key] = record
    return record


def judge(record):
    """All figures at 0.5 and at validation's threshold, with intervals and bootstrap samples."""
    data, logits = record["data"], record["test"]
    thresholds = {"0.5": 0.5}
    if len(data.classes) == 2 and not data.multilabel:
        thresholds["validation"] = youden_threshold(record["val"], data.val.labels)
    weights = bootstrap_weights(data.test.groups)  # the same samples for every run: differences are paired
    record["validation"] = metrics(record["val"], data.val.labels, data.classes)
    record["at"] = {}
    for name, threshold in thresholds.items():
        samples = measure(logits, data.test.labels, weights, threshold)
        record["at"][name] = {
            "threshold": threshold,
            **metrics(logits, data.test.labels, data.classes, threshold),
            "interval": {k: interval(sample).tolist() for k, sample in samples.items()},
            "samples": samples,
        }


def kept(path):
    """The tables in a file that --json wrote."""
    try:
        return json.loads(Path(path).read_text())["tables"]
    except (OSError, ValueError, LookupError, TypeError):
        raise UserError(f"tables needed in {path}, found none: give a file that --json wrote") from None


def agreement(a, b, multilabel):
    """The share of films (or of findings) on which two networks make the same call."""
    calls = [logits > 0 if multilabel else logits.argmax(1) for logits in (a, b)]
    return (calls[0] == calls[1]).double().mean().item()


def export(path, record):
    """A run as one file: a program from films in bytes to logits, and what there is to know of it."""
    data, at = record["data"], record["at"]
    side = record["facts"]["size"]
    about = {
        "films": f"uint8 (any number, 1, {side}, {side}): grey, the whole film squashed to it smoothly",
        "classes": data.classes,
        "probabilities": "sigmoid of the logits" if data.multilabel else "softmax of the logits",
        **record["facts"]["provenance"],
    }
    if "validation" in at:  # of two classes; of more, the most probable is called
        about["threshold"] = at["validation"]["threshold"]
    program = exported(record["model"].cpu(), side)
    file = io.BytesIO()  # in memory first: on a full disk torch would end the process, without a word
    torch.export.save(program, file, extra_files={"about.json": json.dumps(about, indent=1)})
    write(path, file.getbuffer())
    print(f"exported {record['folder']} to {path}, with {', '.join(about)} in its about.json")


def write_json(path, content):
    write(path, json.dumps(content, indent=1).encode())


def figures(record):
    """What goes into metrics.json: every figure of a run, and where it came from."""
    at = {name: {k: v for k, v in a.items() if k != "samples"} for name, a in record["at"].items()}
    data = record["data"]
    return {
        "test": at,
        "validation": record["validation"],
        "agreement_with_teacher": record.get("agreement"),
        "classes": data.classes,
        "films": len(data.test.labels),
        "patients": len(set(data.test.groups)),
        "trained_by": record["facts"]["provenance"],
        "args": record["args"],
        "epoch": record["facts"]["epoch"],
        "cost": record["cost"],
        "judged_by": origin(),
    }


# ---- tables -----------------------------------------------------------------------------------------


def variants(records):
    """The runs, those together that differ in their seed and their teacher's alone: they share a row."""
    groups = {}
    for record in records:
        aside = ("seed", "out", "device", "cache", "teacher", "tensorboard")
        plain = {k: v for k, v in record["args"].items() if k not in aside}
        teachers = [re.sub(r"-seed\d+", "", path) for path in record["args"]["teacher"] or []]
        groups.setdefault(json.dumps([plain, teachers], sort_keys=True), []).append(record)
    return list(groups.values())


def row_name(records):
    name = records[0]["name"] if len(records) == 1 else re.sub(r"-seed\d+", "", records[0]["name"])
    seeds = f", {len(records)} seeds" if len(records) > 1 else ""
    return f"{name} ({records[0]['args']['arch']}{seeds})"


def cell(values, samples=None, unit=100, digits=1):
    """The mean over the runs, their standard deviation, and the mean's interval over patients; in percent."""
    values = unit * torch.tensor(values, dtype=torch.float64)
    if values.dim() == 2:  # several findings: their mean, those aside that could not be judged
        values = values.nanmean(1)
    text = f"{values.mean():.{digits}f}" + (f" ± {values.std():.{digits}f}" if len(values) > 1 else "")
    if samples is None:
        return text
    samples = torch.stack(samples).mean(0)
    low, high = (unit * interval(samples if samples.dim() == 1 else samples.nanmean(1))).tolist()
    return f"{text} [{low:.{digits}f}, {high:.{digits}f}]"


def pooled(same, threshold, name):
    """The cell of runs that share a row."""
    at = [record["at"][threshold] for record in same]
    unit = (1, 3) if name == "loss" else (100, 1)
    return cell([a[name] for a in at], [a["samples"][name] for a in at], *unit)


def mean(value):
    """Of a film's findings, those aside that could not be judged; of a single figure that figure."""
    return float(torch.as_tensor(value, dtype=torch.float64).nanmean())


def markdown(header, rows):
    """A table as lines of text, which a README can take as they are."""
    rows = [header, *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    rows.insert(1, ["-" * width for width in widths])
    lines = [" | ".join(f"{c:<{width}}" for c, width in zip(row, widths, strict=True)) for row in rows]
    return ["", *(f"| {line} |" for line in lines)]


def floor_row(data, names):
    """What a network would reach that says the same of every film: the commonest class, or no finding."""
    logits, title = torch.zeros(len(data.test.labels), len(data.classes)), "always the same"
    if not data.multilabel:
        commonest = data.test.labels.bincount().argmax()
        logits[:, commonest], title = 1, f"always {data.classes[commonest]}"
    floor = metrics(logits, data.test.labels, data.classes)
    return [title, "", *("" if k in ("ece", "loss") else f"{100 * mean(floor[k]):.1f}" for k in names)]


def tables(records, with_grid=False):
    """Lines of text: a row a variant, its runs pooled; then what distillation changed."""
    data, groups = records[0]["data"], variants(records)
    names, score = (SEVERAL, "auc") if data.multilabel else (NAMES, "accuracy")
    text, rows = grid(groups) if with_grid else [], [floor_row(data, names)]
    for same in groups:
        validated = cell([record["validation"][score] for record in same])
        rows.append([row_name(same), validated, *(pooled(same, "0.5", k) for k in names)])
    text += markdown([f"{len(data.test.labels)} test films, %", f"validation {score}", *names], rows)
    if "validation" in records[0]["at"]:  # AUC, calibration and loss know no threshold
        rows = [[row_name(same), *(pooled(same, "validation", k) for k in names[:5])] for same in groups]
        text += markdown(["at the threshold best on validation", *names[:5]], rows)
    if data.multilabel:
        text += findings(groups, data)
    text.append("")
    for students in groups:
        if "agreement" in students[0]:
            share = sum(s["agreement"] for s in students) / len(students)
            text.append(f"{row_name(students)} makes its teacher's call on {100 * share:.1f} % of the films")
        for baselines in groups:
            if any(comparable(s, b) for s in students for b in baselines):
                text.append(f"{row_name(students)} minus {row_name(baselines)}, in points: "
                            + ", ".join(differences(students, baselines)))
    return text


def reports(records):
    """Lines of text: every run's figures by class."""
    for record in records:
        counts = record["at"]["0.5"]["confusion"]
        yield f"\n{record['folder']}: best on validation in epoch {record['facts']['epoch']:g}\n"
        yield report(counts, record["data"].classes)
        yield f"confusion (rows: truth, columns: call):\n{np.array(counts)}"


def findings(groups, data):
    """The AUC of every finding, and what each network is made of."""
    rows = []
    for k, finding in enumerate(data.classes):
        truth, cells = data.test.labels[:, k], []
        for same in groups:
            at = [record["at"]["0.5"] for record in same]
            cells.append(cell([a["auc"][k] for a in at], [a["samples"]["auc"][:, k] for a in at]))
        rows.append([finding, f"{int(truth.nansum())} of {int((~truth.isnan()).sum())}", *cells])
    costs = (("parameters, M", "parameters", 1e6), ("multiply-adds, G", "multiply_adds", 1e9))
    for title, key, unit in costs:
        rows.append([title, "", *(f"{same[0]['cost'][key] / unit:.2f}" for same in groups)])
    return markdown(["AUC, %", "positives", *(row_name(same) for same in groups)], rows)


def stopped_at(facts):
    """", stopped at 0.5" for a defective teacher, "" for one that was trained to the end."""
    stop_at = facts["args"]["stop_at"]
    return f", stopped at {stop_at:g}" if stop_at and mean(facts["validation"]["accuracy"]) > stop_at else ""


def grid(groups):
    """Teachers down, students across: train, validation and test accuracy, means over seeds (± of test).

    Training accuracy is what the loop saw in the best epoch: dropout on, weights still moving.
    """
    cells = {}
    for same in groups:
        args, facts = same[0]["args"], same[0]["facts"]
        smooth = f", label smoothing {args['label_smoothing']:g}" if args["label_smoothing"] else ""
        by = " + ".join(facts["taught_by"]) or "no teacher" + smooth
        parts = [(r["facts"]["train_accuracy"], mean(r["facts"]["validation"]["accuracy"]),
                  mean(r["at"]["0.5"]["accuracy"])) for r in same]
        values = 100 * torch.tensor(parts, dtype=torch.float64)
        text = " / ".join(f"{value:.1f}" for value in values.mean(0))
        text += f" ± {values[:, 2].std():.1f}" if len(same) > 1 else ""
        row = cells.setdefault(by, {})
        student = args["arch"] + stopped_at(facts)
        row[student] = f"{row[student]}; {text}" if student in row else text  # runs that differ in a flag
    students = sorted({student for row in cells.values() for student in row})
    return markdown(["train / val / test accuracy", *students],
                    [[by, *(row.get(student, "") for student in students)] for by, row in cells.items()])


def comparable(student, baseline):
    """The same network given the same films and seed, one with a teacher, one without."""
    same = ("seed", "data", "per_class", "classes", "arch", "size", "finetune", "weights", "epochs", "input",
            "uncertain", "augment")
    a, b = student["args"], baseline["args"]
    return (a["role"], b["role"]) == ("student", "baseline") and all(a[k] == b[k] for k in same)


def differences(students, baselines):
    """Student minus baseline, seed by seed, on the same bootstrap samples."""
    pairs = [(s, b) for s in students for b in baselines if s["args"]["seed"] == b["args"]["seed"]]
    pairs = [(s["at"]["0.5"], b["at"]["0.5"]) for s, b in pairs]
    for k in ("accuracy", "specificity", "sensitivity", "auc", "ece"):
        gains = [(torch.tensor(s[k]) - torch.tensor(b[k])).tolist() for s, b in pairs]
        yield f"{k} {cell(gains, [s['samples'][k] - b['samples'][k] for s, b in pairs])}"


def get_args(argv=None):
    p = parser("evaluate.py RUN [RUN ...]", __doc__)
    g = p.add_argument_group("which runs, on which films")
    g.add_argument("runs", nargs="+", metavar="RUN", help="folders that train.py wrote, or a file of --json")
    g.add_argument("--data", help="where the films are, if no longer where they were in training")
    device_flag(g)
    g = p.add_argument_group("what else is to be seen")
    g.add_argument("--grid", action="store_true", help="first a table, teachers down and students across")
    g.add_argument("--cam", metavar="FILE.png", help="Grad-CAM: a row a film, a column a run")
    g.add_argument("--image", metavar="FILM", help="read this film (JPEG or PNG) and nothing else")
    g = p.add_argument_group("what is to be kept")
    g.add_argument("--json", metavar="FILE", help="the tables and every run's figures in one file")
    g.add_argument("--export", metavar="FILE.pt2", help="the one RUN as a program that torch alone can run")
    args = p.parse_args(argv)
    if args.export and len(args.runs) > 1:
        p.error(f"--export takes one run, got {len(args.runs)}: export them one by one")
    more = args.grid or args.json or args.export
    shown = any(run.endswith(".json") for run in args.runs)
    if shown and (len(args.runs) > 1 or args.cam or args.image or more):
        p.error("a file of --json is only shown again, by itself: leave the other runs and flags out")
    if args.image and more:
        p.error("--image reads one film and judges nothing: leave --grid, --json and --export out")
    return args


def main(argv=None):
    args, known = get_args(argv), {}
    if args.runs[0].endswith(".json"):
        return print("\n".join(kept(args.runs[0])))
    if args.image:
        return read_film(args.image, args.runs, args.cam, args.device)
    keep = bool(args.cam or args.export)
    records = [read(folder, args.device, args.data, known, keep) for folder in args.runs]
    if len({(*record["data"].classes, *record["data"].test.ids) for record in records}) > 1:
        raise UserError("one table needs one set of test films and classes, these runs were trained for "
                        "several: judge them in separate calls")
    for record in records:
        judge(record)
        teachers = record["args"]["teacher"] or []
        if teachers and all(checkpoint_file(path).exists() for path in teachers):
            theirs = [read(path, args.device, args.data, known) for path in teachers]
            if all(teacher["data"].test.ids == record["data"].test.ids for teacher in theirs):
                several, logits = record["data"].multilabel, [teacher["test"] for teacher in theirs]
                taught = mean_teacher(logits, record["args"]["T"], several)
                record["agreement"] = agreement(record["test"], taught, several)
        write_json(record["folder"] / "metrics.json", figures(record))
    text = tables(records, args.grid)
    if args.cam:
        show_cams(args.cam, records, args.device)
        if hasattr(records[0]["data"].test, "masks"):
            text += pointing(records, args.device)
    print("\n".join([*text, *(reports(records) if not records[0]["data"].multilabel else [])]))
    if args.json:
        runs = {str(record["folder"]): figures(record) for record in records}
        write_json(args.json, {"tables": text, "runs": runs})
    if args.export:
        export(args.export, records[0])


if __name__ == "__main__":
    run(main)
