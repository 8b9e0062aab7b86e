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
from torch.nn.modules.module import register_module_forward_hook
from torchvision.utils import draw_bounding_boxes, make_grid

from data import UserError, decode, device_flag, load_as, origin, parser, prepare, run, write, write_picture
from kd import mean_teacher
from models import checkpoint_file, cost, exported, file_hash, forward, load_checkpoint

NAMES = ["accuracy", "specificity", "sensitivity", "precision", "f1", "auc", "ece", "loss"]  # columns
SEVERAL = ["auc", "ap", "specificity", "sensitivity", "f1", "ece", "loss"]  # with several findings a film
DIFFERENCES = ["accuracy", "specificity", "sensitivity", "auc", "ece"]  # student minus baseline
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
    """scores, truth and calls (0 or 1), each (N, K): K = 1 for two classes, else a column a class."""
    scores, n = logits.double().softmax(1), logits.shape[1]
    truth = F.one_hot(labels, n)
    if n == 2:
        return scores[:, 1:], truth[:, 1:], (scores[:, 1:] > threshold).long()
    return scores, truth, F.one_hot(scores.argmax(1), n)


def each_finding(logits, labels):
    """Every finding by itself, over the films where it is known: sigmoid(z) is the softmax of (0, z)."""
    for z, truth in zip(logits.T, labels.T, strict=True):
        known = ~truth.isnan()
        yield F.pad(z[known, None], (1, 0)), truth[known].long(), known


def measure(logits, labels, weights, threshold=0.5):
    """The metrics for R weightings of the films, weights (R, N): a dict of tensors (R,), or (R, K) where a
    film may have several findings, labels (N, K).

    All ones gives the point estimates, bootstrap multiplicities their spread: one code for both.
    """
    if labels.dim() == 2:
        each = [measure(z, truth, weights[:, known], threshold)
                for z, truth, known in each_finding(logits, labels)]
        return {name: torch.stack([one[name] for one in each], 1) for name in each[0]}
    logits, weights = logits.double(), weights.double()
    scores, truth, calls = against_rest(logits, labels, threshold)
    tp, fp, fn, tn = (
        weights @ ((calls == called) & (truth == is_true)).double()  # (R, K)
        for called, is_true in ((1, 1), (1, 0), (0, 1), (0, 0))
    )
    out = {
        "specificity": tn / (tn + fp),
        "sensitivity": tp / (tp + fn),
        "precision": tp / (tp + fp).clamp(min=1e-12),  # nothing called positive: 0, as is customary
        "f1": (2 * tp / (2 * tp + fp + fn)).where(tp + fn > 0, torch.nan),
        "auc": torch.stack([auc(*column, weights) for column in zip(scores.T, truth.T, strict=True)], 1),
        "ap": torch.stack([average_precision(*column, weights)
                           for column in zip(scores.T, truth.T, strict=True)], 1),
    }
    confidence, called = logits.softmax(1).max(1)
    losses, n = F.cross_entropy(logits, labels, reduction="none"), weights.sum(1)
    return {
        "accuracy": weights @ (calls == truth).all(1).double() / n,
        **{name: value.mean(1) for name, value in out.items()},
        "ece": calibration_error(confidence, called == labels, weights),
        "loss": weights @ losses / n,
    }


def metrics(logits, labels, classes, threshold=0.5):
    """All figures as plain floats and lists: class 1 is positive, macro means where there are more than
    two classes, one value per finding where a film may have several."""
    if not logits.isfinite().all():
        raise UserError("finite logits needed to judge a network, found NaN or infinity: training diverged")
    if labels.dim() == 2:
        each = [metrics(z, truth, ["no", "yes"], threshold) for z, truth, _ in each_finding(logits, labels)]
        return {name: [one[name] for one in each] for name in each[0]}
    values, n = measure(logits, labels, torch.ones(1, len(labels)), threshold), len(classes)
    calls = against_rest(logits, labels, threshold)[2]
    called = calls[:, 0] if n == 2 else calls.argmax(1)
    table = (labels * n + called).bincount(minlength=n**2).view(n, n)  # rows the truth, columns the call
    return {**{name: value.item() for name, value in values.items()}, "confusion": table.tolist()}


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
    """(1 + repeats, N): first all films once, for the figure itself; then how often each film is in each
    sample, when patients are drawn with replacement.

    Films of one child are no independent evidence, so children are drawn, with all their films.
    """
    place = {group: i for i, group in enumerate(sorted(set(groups)))}
    member = torch.tensor([place[group] for group in groups])
    draws = torch.randint(len(place), (repeats, len(place)), generator=torch.Generator().manual_seed(seed))
    drawn = torch.zeros(repeats, len(place), dtype=torch.float64)
    drawn.scatter_add_(1, draws, torch.ones_like(drawn))
    return torch.cat([torch.ones_like(drawn[:1]), drawn])[:, member]


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
    classes = [scores[labels == k].sort().values for k in (0, 1)]
    spared, missed = (torch.searchsorted(s, cuts, right=True).double() / len(s) for s in classes)
    gain = spared - missed  # specificity - (1 - sensitivity)
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
    with torch.no_grad(), register_module_forward_hook(note):
        model(images[:1])
    order = [layer for layer in order if layer is not model and not aside.search(type(layer).__name__)]
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
    try:
        with torch.inference_mode(False), torch.enable_grad(), layer.register_forward_hook(keep):
            # Frozen weights have no gradient: it starts at the film. Nothing is added to any .grad.
            logits, _ = forward(model, images.detach().clone().requires_grad_(True))
            target = torch.as_tensor(target, device=logits.device).expand(len(logits))
            score = logits.gather(1, target[:, None]).sum()
            maps, gradient = caught[0].detach(), torch.autograd.grad(score, caught[0])[0]
    finally:
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
    rows = [[name, cell([weights @ hit.double() / weights.sum(1) for hit in same])]
            for name, same in hits.items()]
    return markdown([f"hottest point on an opacity, {len(chosen)} films", "%"], rows)


def hottest(record, chosen, target, device):
    """True for each chosen film whose heat is greatest inside the mask."""
    test, hits = record["data"].test, []
    for index in chosen.split(64):
        heat = grad_cam(record["model"], prepare(test.images[index], device), target).flatten(1).cpu()
        hits.append(test.masks[index].flatten(1).gather(1, heat.argmax(1, keepdim=True))[:, 0])
    return torch.cat(hits)


def draw_cams(path, runs, titles, targets, device, side=224):
    """A PNG with a row a film: the film, then for each run its heat, and how probable it finds the target.

    runs: name, network, the films at its size and the probabilities that it gives them.
    """
    grey = resized(runs[0][2].float(), (side, side)).expand(-1, 3, -1, -1)
    columns = [[caption(tile, title) for tile, title in zip(grey, titles, strict=True)]]
    red = torch.tensor([255.0, 60, 0]).view(1, 3, 1, 1)
    for name, model, films, says in runs:
        heat = grad_cam(model, prepare(films, device), targets)[:, None].cpu()
        warm = grey + 0.6 * resized(heat, (side, side)) * (red - grey)  # no heat leaves the film as it is
        texts = [f"{name} {100 * p:.0f} %" for p in says.gather(1, targets[:, None])[:, 0]]
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
    labels, says = data.test.labels, [probabilities(r["test"], data.multilabel) for r in records]
    if data.multilabel:
        ill, targets = (labels == 1).any(1), (labels == 1).int().argmax(1)
        wrong = [(((p > 0.5) != (labels == 1)) & ~labels.isnan()).any(1) for p in says]
    else:
        ill, targets = labels >= int(data.classes[0] == "NORMAL"), labels
        wrong = [p.argmax(1) != labels for p in says]
    extent = says[0].gather(1, targets[:, None])[:, 0]
    if hasattr(data.test, "masks"):
        extent = data.test.masks.flatten(1).sum(1).float()
    order = extent.masked_fill(~ill, -1).argsort(descending=True).tolist()
    missed = [i for i in order if torch.stack(wrong).any(0)[i]][:2]
    chosen = [i for i in order if i not in missed][: n - len(missed)] + missed
    titles = [data.classes[targets[i]] if ill[i] or not data.multilabel else "nothing found" for i in chosen]
    titles = [t + (", called wrongly" if i in missed else "") for t, i in zip(titles, chosen, strict=True)]
    runs = [(r["name"], r["model"], r["data"].test.images[chosen], p[chosen])
            for r, p in zip(records, says, strict=True)]
    draw_cams(path, runs, titles, targets[chosen], device)


def read_film(path, folders, cam, device):
    """What every run says of one film that no data set holds, and where it looked for its answer."""
    runs, answers = [], set()
    for folder in folders:
        model, facts = load_checkpoint(folder)
        model.to(device, memory_format=torch.channels_last)
        try:
            film = decode(path, facts["size"])[None]
        except RuntimeError as error:
            why = str(error).splitlines()[0]
            raise UserError(f"a JPEG or PNG needed in {path}, found none ({why}): give another") from None
        logits = predict(model, lambda index, film=film: prepare(film, device), 1)
        says, name = probabilities(logits, facts["multilabel"]), checkpoint_file(folder).parent.name
        text = ", ".join(f"{k} {100 * p:.1f} %" for k, p in zip(facts["classes"], says[0], strict=True))
        print(f"{name}: {text}")
        runs.append((name, model, film, says))
        answers.add(tuple(facts["classes"]))
    if cam and len(answers) > 1:
        raise UserError("one picture needs runs of the same classes, these have others: draw them one by one")
    if cam:
        target = says.argmax(1)
        draw_cams(cam, runs, [facts["classes"][target]], target, device)


# ---- runs -------------------------------------------------------------------------------------------


def refuse_foreign(path, facts, data):
    """A network judges, and is judged by, classes that it knows and patients that it has not learned from."""
    if facts["classes"] != data.classes:
        raise UserError(f"{path} was trained on classes {facts['classes']}, the same classes are needed in "
                        f"{data.source}, found {data.classes}: give the films it was trained for with --data")
    patients = {*data.val.groups, *(data.test.groups if hasattr(data, "test") else ())}
    if seen := set(facts["train_groups"]) & patients:
        raise UserError(f"{path} was trained on {len(seen)} of the patients that it or its student is to be "
                        f"judged by in {data.source} ({min(seen)} for one): give other films, or the --data "
                        f"and --val-fraction that it was trained with")


def read(folder, device, source, known, keep=False):
    """A run as a record: its facts, its logits for the validation and test films (asked once), and, to
    keep it for pictures, the network."""
    key = str(folder)
    if key in known:
        return known[key]
    model, facts = load_checkpoint(folder)
    args = facts["args"]
    source, same = source or args["data"], ("per_class", "classes", "val_fraction", "uncertain")
    films = (facts["size"], source, *(args[flag] for flag in same))
    if films not in known:
        known[films] = load_as(args, facts["size"], ("val", "test"), source)
    data = known[films]
    model.to(device, memory_format=torch.channels_last)

    def ask(split):
        return predict(model, lambda index: prepare(split.images[index], device), len(split.labels))

    folder = checkpoint_file(folder).parent
    known[key] = {"name": folder.name, "folder": folder, "facts": facts, "args": args, "data": data,
                  "val": ask(data.val), "test": ask(data.test), "cost": cost(model, facts["size"]),
                  "model": model if keep else None}
    return known[key]


def judge(record):
    """All figures at 0.5 and at validation's threshold, with intervals and the bootstrap samples behind."""
    data, logits = record["data"], record["test"]
    thresholds = {"0.5": 0.5}
    if len(data.classes) == 2 and not data.multilabel:
        thresholds["validation"] = youden_threshold(record["val"], data.val.labels)
    weights = bootstrap_weights(data.test.groups)  # the same samples for every run: differences are paired
    record |= {"validation": metrics(record["val"], data.val.labels, data.classes), "at": {}, "samples": {}}
    for name, threshold in thresholds.items():
        record["samples"][name] = samples = measure(logits, data.test.labels, weights, threshold)
        record["at"][name] = {
            "threshold": threshold,
            **metrics(logits, data.test.labels, data.classes, threshold),
            "interval": {k: interval(sample[1:]).tolist() for k, sample in samples.items()},
        }


def kept(path):
    """The tables in a file that --json wrote."""
    try:
        return "\n".join(json.loads(Path(path).read_text())["tables"])
    except (OSError, ValueError, LookupError, TypeError):
        raise UserError(f"tables needed in {path}, found none: give a file that --json wrote") from None


def agreement(record, device, known):
    """The share of films (or findings) on which a student makes its teachers' call; None without teachers,
    or where others lie in their place by now."""
    paths, several = record["args"]["teacher"] or [], record["data"].multilabel
    there = [file_hash(checkpoint_file(path)) for path in paths if checkpoint_file(path).exists()]
    if not paths or there != record["facts"]["teachers"]:
        return None
    theirs = [read(path, device, record["data"].source, known) for path in paths]
    for path, teacher in zip(paths, theirs, strict=True):
        refuse_foreign(path, teacher["facts"], record["data"])
    if any(teacher["data"].test.ids != record["data"].test.ids for teacher in theirs):
        return None
    taught = mean_teacher([teacher["test"] for teacher in theirs], record["args"]["T"], several)
    calls = [logits > 0 if several else logits.argmax(1) for logits in (record["test"], taught)]
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
    content = json.loads(json.dumps(content), parse_constant=lambda name: None)  # NaN is Python's alone
    write(path, json.dumps(content, indent=1).encode())


def figures(record, device):
    """What goes into metrics.json: every figure of a run, and where it came from."""
    data, facts = record["data"], record["facts"]
    return {"test": record["at"], "validation": record["validation"], "classes": data.classes,
            "agreement_with_teacher": record["agreement"], "films": len(data.test.labels),
            "patients": len(set(data.test.groups)), "trained_by": facts["provenance"], "args": record["args"],
            "epoch": facts["epoch"], "cost": record["cost"], "judged_by": origin(device)}


# ---- tables -----------------------------------------------------------------------------------------


def variants(records):
    """The runs, those together that differ in their seed and their teacher's alone: they share a row."""
    groups, aside = {}, ("seed", "out", "device", "cache", "tensorboard")
    for record in records:
        plain = {k: v for k, v in record["args"].items() if k not in aside}
        key = re.sub(r"-seed\d+", "", json.dumps(plain, sort_keys=True))
        groups.setdefault(key, []).append(record)
    return list(groups.values())


def row_name(records):
    name = records[0]["name"] if len(records) == 1 else re.sub(r"-seed\d+", "", records[0]["name"])
    seeds = f", {len(records)} seeds" if len(records) > 1 else ""
    return f"{name} ({records[0]['args']['arch']}{seeds})"


def cell(figures, unit=100, digits=1):
    """The mean over the runs, their standard deviation, and the mean's interval over patients; in percent.

    figures: of each run (1 + R,), the figure itself and its bootstrap samples, if there are any; (1 + R, K)
    of several findings, whose mean is shown, those aside that could not be judged.
    """
    runs = unit * torch.stack([f.double().view(len(f), -1).nanmean(1) for f in figures])  # (runs, 1 + R)
    text = f"{runs[:, 0].mean():.{digits}f}" + (f" ± {runs[:, 0].std():.{digits}f}" if len(runs) > 1 else "")
    if runs.shape[1] == 1:
        return text
    low, high = interval(runs[:, 1:].mean(0)).tolist()
    return f"{text} [{low:.{digits}f}, {high:.{digits}f}]"


def pooled(same, threshold, name):
    """The cell of runs that share a row."""
    unit, digits = (1, 3) if name == "loss" else (100, 1)
    return cell([record["samples"][threshold][name] for record in same], unit, digits)


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
        validated = cell([torch.tensor([record["validation"][score]]) for record in same])
        rows.append([row_name(same), validated, *(pooled(same, "0.5", k) for k in names)])
    text += markdown([f"{len(data.test.labels)} test films, %", f"validation {score}", *names], rows)
    if "validation" in records[0]["at"]:  # AUC, calibration and loss know no threshold
        rows = [[row_name(same), *(pooled(same, "validation", k) for k in names[:5])] for same in groups]
        text += markdown(["at the threshold best on validation", *names[:5]], rows)
    if data.multilabel:
        text += findings(groups, data)
    text.append("")
    for students in groups:
        if shares := [s["agreement"] for s in students if s["agreement"] is not None]:
            share = 100 * sum(shares) / len(shares)
            text.append(f"{row_name(students)} makes its teacher's call on {share:.1f} % of the films")
        for baselines in groups:
            # Seed by seed, on the same bootstrap samples.
            pairs = [(s["samples"]["0.5"], b["samples"]["0.5"])
                     for s in students for b in baselines if comparable(s, b)]
            if pairs:
                gains = ", ".join(f"{k} {cell([s[k] - b[k] for s, b in pairs])}" for k in DIFFERENCES)
                text.append(f"{row_name(students)} minus {row_name(baselines)}, in points: {gains}")
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
        truth = data.test.labels[:, k]
        cells = [cell([r["samples"]["0.5"]["auc"][:, k] for r in same]) for same in groups]
        rows.append([finding, f"{int(truth.nansum())} of {int((~truth.isnan()).sum())}", *cells])
    costs = (("parameters, M", "parameters", 1e6), ("multiply-adds, G", "multiply_adds", 1e9))
    for title, key, unit in costs:
        rows.append([title, "", *(f"{same[0]['cost'][key] / unit:.2f}" for same in groups)])
    return markdown(["AUC, %", "positives", *(row_name(same) for same in groups)], rows)


def stopped_at(facts):
    """", stopped at 0.5" for a defective teacher, "" for one that was not stopped."""
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
        parts = [(r["facts"]["train_accuracy"], mean(r["validation"]["accuracy"]),
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
    if shown and (len(args.runs) > 1 or args.data or args.cam or args.image or more):
        p.error("a file of --json is only shown again, by itself: leave the other runs and flags out")
    if args.image and more:
        p.error("--image reads one film and judges nothing: leave --grid, --json and --export out")
    return args


def main(argv=None):
    args, known = get_args(argv), {}
    if args.runs[0].endswith(".json"):
        return print(kept(args.runs[0]))
    if args.image:
        return read_film(args.image, args.runs, args.cam, args.device)
    keep = bool(args.cam or args.export)
    records = [read(folder, args.device, args.data, known, keep) for folder in args.runs]
    if len({record["folder"].resolve() for record in records}) < len(records):
        raise UserError("every run once needed, found one twice: two would look like two seeds")
    if len({(*record["data"].classes, *record["data"].test.ids) for record in records}) > 1:
        raise UserError("one table needs one set of test films and classes, these runs were trained for "
                        "several: judge them in separate calls")
    for record in records:
        refuse_foreign(record["folder"], record["facts"], record["data"])
    runs = {}
    for record in records:
        judge(record)
        record["agreement"] = agreement(record, args.device, known)
        runs[str(record["folder"])] = figures(record, args.device)
        write_json(record["folder"] / "metrics.json", runs[str(record["folder"])])
    text = tables(records, args.grid)
    if args.cam:
        show_cams(args.cam, records, args.device)
        if hasattr(records[0]["data"].test, "masks"):
            text += pointing(records, args.device)
    print("\n".join([*text, *(reports(records) if not records[0]["data"].multilabel else [])]))
    if args.json:
        write_json(args.json, {"tables": text, "runs": runs})
    if args.export:
        export(args.export, records[0])


if __name__ == "__main__":
    run(main)
