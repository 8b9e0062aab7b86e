"""Evaluate runs on the test images. train.py never decodes the test split.

    python evaluate.py runs/demo                             all runs below a folder
    python evaluate.py runs/demo --json results/demo.json    also write the tables and all metrics
    python evaluate.py runs/mine --predict new-images        write probabilities for new images

A row of the table is a run, or the mean ± standard deviation of runs that differ only in the seed.
Below each number is its 95 % interval. The last rows are gains, student minus baseline. Of two
classes, the second is positive. Sensitivity is the accuracy on its images, specificity that on the
others. With more classes, AUC, sensitivity, specificity, precision and F1 are means over the
classes, each against the rest.
"""

import argparse
import csv
import json
import math
import os
import platform
import re
import subprocess
import sys
from itertools import product, zip_longest
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data import (Help, UserError, atomic, cli, decode, explain, files_below, find_patient, load_as,
                  progress)
from models import cost, forward, from_images, load_run, refuse_foreign, run_file, state_of

# Names that comparisons of configs ignore: where things are (hashes in the config identify those
# that matter), what depends on the seed, and, for a gain, everything that belongs to distillation.
PATHS = {"data", "teacher", "weights", "out", "cache", "recipe", "device"}
SEEDS = {"seed", "teacher_weights"}
DISTILLATION = {"role", "T", "alpha", "taught_by", "teacher_weights", "teacher_configs"}
COLUMNS = ["auc", "accuracy", "specificity", "sensitivity", "ece"]
MORE = ["precision", "f1", "loss"]  # with --report

# ---- metrics and the bootstrap -------------------------------------------------------------------
@torch.inference_mode()
def predict(model, source, n, device, batch_size=64):
    """Return the logits (n, C) for the rows 0 to n of a source (models.from_images)."""
    model.eval()
    rows = torch.arange(n, device=device)  # on the device: a copy per batch would stall a GPU
    return torch.cat([forward(model, source(batch))[0].float().cpu()
                      for batch in rows.split(batch_size)])

def auc(scores, truth, weights):
    """Return the weighted area under the ROC curve (R,): how often a positive outscores a negative,
    where ties count half. scores (N,); truth (N,) of 0 and 1; weights (R, N), a row per sample."""
    values, place = scores.unique(return_inverse=True)  # sorted, so a place is a rank with ties
    at = weights.new_zeros(len(weights), len(values))
    negatives = at.index_add(1, place, weights * (truth == 0))
    positives = at.index_add(1, place, weights * (truth == 1))
    below = negatives.cumsum(1) - negatives
    return (positives * (below + negatives / 2)).sum(1) / (positives.sum(1) * negatives.sum(1))

def calibration_error(confidence, correct, weights, bins=15):
    """Return the ECE (R,): |mean confidence - accuracy| per bin, averaged with the bins' sizes."""
    place = (confidence * bins).long().clamp(max=bins - 1)
    gaps = weights * (confidence - correct.double())
    sums = weights.new_zeros(len(weights), bins).index_add(1, place, gaps)
    return sums.abs().sum(1) / weights.sum(1)

def measure(logits, labels, weights, threshold=0.0):
    """Return the metrics for R weightings of the images, weights (R, N), as a dict of tensors (R,),
    or (R, K) for findings, labels (N, K); "confusion" is larger. All weights are 1 for the metrics
    themselves. threshold: the log-odds above which the second of two classes is predicted."""
    if labels.dim() == 2:  # each finding by itself: sigmoid(z) is the second of softmax((0, z))
        each = [measure(F.pad(z[known, None], (1, 0)), truth[known].long(), weights[:, known])
                for z, truth, known in zip(logits.T, labels.T, ~labels.isnan().T, strict=True)]
        return {name: torch.stack([one[name] for one in each], 1) for name in each[0]}
    logits, weights = logits.double(), weights.double()
    n, total, likeliest = logits.shape[1], weights.sum(1), logits.argmax(1)
    calls = (logits[:, 1] - logits[:, 0] > threshold).long() if n == 2 else likeliest
    counts = weights.new_zeros(len(weights), n * n).index_add(1, labels * n + calls, weights)
    confusion = counts.view(-1, n, n)  # (R, C, C), a row per label, a column per call
    right = confusion.diagonal(dim1=1, dim2=2)  # (R, C)
    positive = [1] if n == 2 else list(range(n))  # each one against the rest
    tp = right[:, positive]  # (R, 1) or (R, C)
    fn = confusion.sum(2)[:, positive] - tp
    fp = confusion.sum(1)[:, positive] - tp
    tn = total[:, None] - tp - fn - fp
    # Log-odds rank images as probabilities do, but do not round to 1 where a network is very sure.
    # Equal log-odds may differ by 1e-15, which would split ties, so ten decimals are kept.
    rest = [logits[:, [j for j in range(n) if j != k]].logsumexp(1) for k in positive]
    odds = [(logits[:, k] - r).round(decimals=10) for k, r in zip(positive, rest, strict=True)]
    aucs = [auc(odd, labels == k, weights) for k, odd in zip(positive, odds, strict=True)]
    return {
        "accuracy": right.sum(1) / total,
        "specificity": (tn / (tn + fp)).mean(1), "sensitivity": (tp / (tp + fn)).mean(1),
        # 0 if nothing is predicted positive, as is customary; NaN if there is no positive image.
        "precision": (tp / (tp + fp).clamp(min=1e-12)).where(tp + fn > 0, torch.nan).mean(1),
        "f1": (2 * tp / (2 * tp + fp + fn)).where(tp + fn > 0, torch.nan).mean(1),
        "auc": torch.stack(aucs, 1).mean(1),
        "ece": calibration_error(logits.softmax(1).amax(1), likeliest == labels, weights),
        "loss": weights @ F.cross_entropy(logits, labels, reduction="none") / total,
        "confusion": confusion,
    }

def metrics(logits, labels, threshold=0.0):
    """Return the metrics of all images as plain floats, or lists with a value per finding."""
    if not logits.isfinite().all():
        raise UserError("logits are NaN or infinite: training diverged. Lower --lr or set --clip 1")
    figures = measure(logits, labels, torch.ones(1, len(labels)), threshold)
    figures["confusion"] = figures["confusion"].long()
    return {name: value[0].tolist() for name, value in figures.items()}

def mean(value):
    """Return the mean over findings, ignoring NaN. A single number is returned unchanged."""
    return float(torch.as_tensor(value, dtype=torch.float64).nanmean())

def choose_threshold(logits, labels, rate, share):
    """Return the log-odds above which images are predicted positive, so that `rate` (sensitivity or
    specificity) is at least `share` on these validation images, and the other rate is highest."""
    logits = logits.double() * (1 if rate == "sensitivity" else -1)
    score = logits[:, 1] - logits[:, 0]
    wanted = score[labels == int(rate == "sensitivity")].sort(descending=True).values
    last = wanted[max(math.ceil(share * len(wanted) - 1e-9), 1) - 1]  # the lowest to get right
    others = score[score < last]
    edge = ((last + others.max()) / 2 if len(others) else last - 1).item()
    return edge if rate == "sensitivity" else -edge

def bootstrap_weights(groups, repeats=1000, seed=0):
    """Return weights (1 + repeats, N): a row of ones for the metric itself, then how often each
    image is in a sample. A patient's images are correlated, so patients are drawn, not images."""
    member = torch.from_numpy(np.unique(groups, return_inverse=True)[1])  # (N,): its patient
    n = int(member.max()) + 1
    draws = torch.randint(n, (repeats, n), generator=torch.Generator().manual_seed(seed))
    drawn = torch.zeros(repeats, n, dtype=torch.float64)
    drawn.scatter_add_(1, draws, torch.ones_like(drawn))
    return torch.cat([torch.ones_like(drawn[:1]), drawn])[:, member]

def over_seeds(runs):
    """Return the mean over runs (S, 1 + R) that differ in their seed, and its bootstrap samples, as
    (1 + R,). Seeds are drawn too: another five seeds would have given another mean."""
    shape, generator = (len(runs), runs.shape[1] - 1), torch.Generator().manual_seed(1)
    draws = torch.randint(len(runs), shape, generator=generator)
    return torch.cat([runs[:, :1].mean(0), runs[:, 1:].gather(0, draws).mean(0)])

def interval(samples):
    """Return the ends (2, ...) of the middle 95 % of the samples (R, ...), leaving out NaN."""
    return torch.nanquantile(samples.double(), torch.tensor([0.025, 0.975], dtype=torch.double), 0)

def summary(runs):
    """Return {"mean", "sd", "low", "high"} over S runs that differ in their seed. sd is NaN for one
    run. low and high, the ends of the mean's interval, are left out if there are no samples.
    runs: per run (1 + R,), the metric and its samples, or (1 + R, K) for findings."""
    runs = [torch.as_tensor(run, dtype=torch.double) for run in runs]
    values = torch.stack([run.view(len(run), -1) for run in runs])  # (S, 1 + R, K)
    if values.shape[2] > 1:  # leave out a finding that has no positive image in some sample
        values = values[..., ~values.isnan().any(0).any(0)]
    values = values.mean(2)  # (S, 1 + R)
    sd = values[:, 0].std().item() if len(values) > 1 else math.nan
    figure = {"mean": values[:, 0].mean().item(), "sd": sd}
    if values.shape[1] > 1:
        figure["low"], figure["high"] = interval(over_seeds(values)[1:]).tolist()
    return figure

# ---- runs and the table --------------------------------------------------------------------------
def find_runs(paths):
    """Return the best.pt of every run. A folder stands for all runs below it."""
    found = {path: [run_file(path)] if run_file(path).is_file()
             else sorted(Path(path).rglob("best.pt")) for path in paths}
    missing = ", ".join(path for path, runs in found.items() if not runs)
    if not any(found.values()):
        raise UserError(f"no best.pt in {missing}. Name runs of train.py, or their folder")
    if missing:  # a run that was killed before its first save must not stop runs/demo/*
        print(f"{missing}: left out, because there is no best.pt (yet)")
    return [run for runs in found.values() for run in runs]

def evaluate_run(path, device, source, cache, loaded, wanted=None):
    """Evaluate a run. Return what was found, as a dict. loaded: data sets by key, shared between
    calls. wanted: (rate, share) for which to choose a threshold on validation images, or None."""
    model, facts = load_run(path)
    with explain(f"{path} is not a run of train.py"):
        config, size, state = facts["config"], facts["size"], state_of(facts)
        source = source or config["data"]
        key = size, source, config["per_class"], config["classes"], config["val_fraction"]
    if key not in loaded:
        loaded[key] = load_as(config, size, ("val", "test"), cache, source)
    data = loaded[key]
    refuse_foreign(path.parent, facts, data)
    changed = [k for k in ("val", "val_pixels", "test") if config[k] != data.fingerprints[k]]
    elsewhere = "test" in changed and source != config["data"]
    if elsewhere:
        print(f"{path.parent}: evaluated on {source}, not on the test images of {config['data']}. "
              f"Written as metrics-{Path(source).name}.json, predictions-{Path(source).name}.csv")
    elif changed:
        print(f"{path.parent}: validation or test images of {source} have changed since training")
    device = torch.device(device)
    model.to(device, memory_format=torch.channels_last)  # not returned: 30 networks may not fit
    val, test = (predict(model, from_images(split.images, device), len(split.ids), device)
                 for split in (data.val, data.test))
    if wanted and (data.multilabel or len(data.classes) > 2):
        raise UserError(f"--threshold needs two classes, {source} has {', '.join(data.classes)}")
    threshold = choose_threshold(val, data.val.labels, *wanted) if wanted else 0.0
    figures = metrics(test, data.test.labels, threshold)
    # The samples are the same for every run, so that differences between two runs are paired.
    samples = measure(test, data.test.labels, bootstrap_weights(data.test.groups), threshold)
    figures["interval"] = {k: interval(samples[k][1:]).tolist() for k in COLUMNS + MORE}
    return {"folder": path.parent, "facts": facts, "config": config, "data": data, "state": state,
            "cost": cost(model, size), "val": val, "test": test, "figures": figures,
            "samples": samples, "threshold": threshold,
            "suffix": f"-{Path(source).name}" if elsewhere else "",  # of the files that are written
            "validation": metrics(val, data.val.labels, threshold)}

def compared(config, *more):
    """Return what runs are compared by: their config without PATHS and other sets of names."""
    ignored = PATHS.union(*more)
    return {name: value for name, value in config.items() if name not in ignored}

def differences(config, other, *more):
    """Return {name: (value, other value)} where two configs differ, without PATHS and `more`."""
    a, b = compared(config, *more), compared(other, *more)
    return {name: (a.get(name), b.get(name)) for name in a | b if a.get(name) != b.get(name)}

def variants(records):
    """Return the runs in groups, one group per row. Only the seed differs within a group."""
    groups = {}
    for record in records:
        key = json.dumps([compared(record["config"], SEEDS), record["state"]], sort_keys=True)
        by_seed = groups.setdefault(key, {})
        other = by_seed.setdefault(record["config"]["seed"], record)
        if other is not record:
            raise UserError(f"{other['folder']} and {record['folder']} have the same seed and "
                            f"flags: they would count as two seeds. Leave one out")
    return [list(by_seed.values()) for by_seed in groups.values()]

def is_pair(student, baseline):
    """Return whether student minus baseline is a gain: both runs are finished, have the same seed,
    images and labels, and differ only in distillation."""
    return ((student["config"]["role"], baseline["config"]["role"]) == ("student", "baseline")
            and student["facts"]["last"] is None and baseline["facts"]["last"] is None
            and not differences(student["config"], baseline["config"], DISTILLATION))

def rows_and_gains(groups, score):
    """Return the table's rows, one per group, and its gains as plain values. A gain is computed per
    seed on the same bootstrap samples. `score` is the metric that the best epoch was chosen by."""
    rows, gains = [], []
    for group in groups:
        name = group[0]["folder"].name
        rows.append({
            "title": re.sub(r"-seed\d+", "", name) if len(group) > 1 else name,
            "arch": group[0]["config"]["arch"], "state": group[0]["state"],
            "runs": [str(r["folder"]) for r in group],
            "validation": summary([[r["validation"][score]] for r in group]),
            "train": summary([[r["facts"]["train_accuracy"]] for r in group]),
            "figures": {k: summary([r["samples"][k] for r in group]) for k in COLUMNS + MORE}})
    for (i, students), (j, baselines) in product(enumerate(groups), repeat=2):
        pairs = [(s["samples"], b["samples"]) for s in students for b in baselines if is_pair(s, b)]
        if pairs:
            figures = {k: summary([s[k] - b[k] for s, b in pairs]) for k in COLUMNS + MORE}
            gains.append({"title": rows[i]["title"], "minus": rows[j]["title"],
                          "pairs": len(pairs), "students": len(students), "figures": figures})
    return rows, gains

def cell(figure, column="", sign=""):
    """Return mean ± standard deviation and, in a second line, the interval; all but loss in %."""
    unit, digits = (1, 3) if column == "loss" else (100, 1)
    middle, sd, *ends = (f"{unit * value:{sign}.{digits}f}" for value in figure.values())
    text = middle if math.isnan(figure["sd"]) else f"{middle} ± {sd.lstrip('+')}"
    return f"{text}\n[{' '.join(ends)}]" if ends else text

def table(groups, rows, gains, columns, score):
    """Return lines of text: a row per group, then the gains."""
    lines, n = [], len(groups[0][0]["test"])
    for group, row in zip(groups, rows, strict=True):
        below = f"{row['arch']}, {len(group)} seeds" if len(group) > 1 else row["arch"]
        below += row["state"]
        train = "" if math.isnan(row["train"]["mean"]) else f"\ntrain {cell(row['train'])}"
        lines.append([f"{row['title']}\n  {below}", cell(row["validation"]) + train,
                      *(cell(row["figures"][k], k) for k in columns)])
    for gain in gains:
        some = f", {gain['pairs']} of {gain['students']} seeds" * (gain["pairs"] < gain["students"])
        lines.append([f"{gain['title']}\n  minus {gain['minus']}{some}", "",
                      *(cell(gain["figures"][k], k, "+") for k in columns)])
    return aligned([f"{n} test images, %", f"validation\n{score}", *columns], lines)

def notes(records):
    """Yield the sentences below the table."""
    data, classes = records[0]["data"], records[0]["data"].classes
    if not data.multilabel:
        counts = 100 * data.test.labels.bincount() / len(data.test.labels)
        yield f"always predicting {classes[counts.argmax()]} has accuracy {counts.max():.1f}"
        yield f"positive: {classes[1]}" if len(classes) == 2 else "each class against the rest"
    yield "ece: lower is better"
    for name, r in [(r["folder"].name, r) for r in records]:
        calls = torch.tensor(r["figures"]["confusion"]).sum(-2)  # a number per class
        if not data.multilabel and calls.max() == calls.sum():  # its AUC tells what it has learned
            yield f"{name} predicts {classes[calls.argmax()]} for every image"
        if r["threshold"]:
            p = torch.tensor(r["threshold"]).double().sigmoid()
            yield f"{name} predicts {classes[1]} above a probability of {p:.3g}"
        if r["facts"]["last"] is not None:
            yield f"{name}{r['state']}: left out of the gains"
    if len({r["data"].fingerprints["val"] for r in records}) > 1:
        yield "the runs have different validation images: compare their validation with care"
    if len(commits := {r["facts"]["provenance"]["commit"] for r in records}) > 1:
        yield f"the runs were trained by different commits: {', '.join(sorted(commits))}"
    yield from missing_gains(records)

def missing_gains(records):
    """Yield, for each student without a gain, how it differs from the most similar baseline."""
    for s in [r for r in records if r["config"]["role"] == "student"]:
        alike = [(differences(s["config"], b["config"], DISTILLATION), b["folder"].name)
                 for b in records if b["config"]["role"] == "baseline" and all(
                     b["config"][k] == s["config"][k] for k in ("seed", "arch", "val"))]
        other, name = min(alike, key=lambda pair: len(pair[0]), default=({}, ""))
        if other:
            reasons = ", ".join(f"{k} {a} and {b}" for k, (a, b) in other.items())
            yield f"{s['folder'].name} minus {name} is left out, because they differ in {reasons}"

def findings(groups, rows):
    """Return a table with the AUC of every finding and the size of every network."""
    lines, data = [], groups[0][0]["data"]
    for k, finding in enumerate(data.classes):
        truth = data.test.labels[:, k]
        runs = [[r["samples"]["auc"][:, k] for r in group] for group in groups]
        rare = " (too rare for the mean)" * any(run.isnan().any() for g in runs for run in g)
        lines.append([finding + rare,
                      f"{int(truth.nansum())} of {int((~truth.isnan()).sum())}",
                      *(cell(summary(group)) for group in runs)])
    sizes = [group[0]["cost"]["parameters"] / 1e6 for group in groups]
    lines.append(["parameters, M", "", *(f"{size:.2f}" for size in sizes)])
    return aligned(["AUC, %", "positives", *(row["title"] for row in rows)], lines)

# ---- tables as text, files, where a number came from --------------------------------------------
def aligned(header, rows):
    """Return a table as lines of text, numbers right-aligned. A cell may have several lines."""
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
    with atomic(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])

def write_json(path, content):
    content = json.loads(json.dumps(content), parse_constant=lambda name: None)  # NaN to null
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")

def origin(device):
    """Return where a number came from: command, commit, versions and machine."""
    git = subprocess.run("git describe --always --dirty --abbrev=12", shell=True, text=True,
                         capture_output=True, cwd=Path(__file__).parent)
    commit = git.stdout.strip() or "unknown"  # no repository, or no git on this machine
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return {"command": " ".join(sys.argv), "commit": commit, "torch": str(torch.__version__),
            "device": cpu if "cuda" not in str(device) else torch.cuda.get_device_name(device)}

def usable_device(name):
    """Return the name of a CPU or GPU if torch can use it here (an argparse type)."""
    n = torch.cuda.device_count()
    if name not in (usable := ["cpu", *["cuda"] * (n > 0), *(f"cuda:{i}" for i in range(n))]):
        raise argparse.ArgumentTypeError(f"{name} is not among {', '.join(usable)}")
    return name

# ---- new images, files, the command line ---------------------------------------------------------
def predict_files(args):
    """Write the probabilities of every run for new images, which need no label, to a CSV. A file
    that cannot be read gets a row that says why, and the other files are still scored."""
    runs = {str(path.parent): load_run(path) for path in find_runs(args.runs)}
    classes, device = next(iter(runs.values()))[1]["classes"], torch.device(args.device)
    if other := [name for name, (_, facts) in runs.items() if facts["classes"] != classes]:
        raise UserError(f"{other[0]} has other classes than {', '.join(classes)}: leave it out")
    rows, is_file = [], os.path.isfile(args.predict)
    files = [args.predict] if is_file else [*files_below(args.predict, set())]
    for file in progress(files, "scoring images"):
        p, patient, problem = [], "", ""
        try:
            patient = find_patient(Path(file), Path(file).as_posix())
            for model, facts in runs.values():
                source = from_images(decode(file, facts["size"])[None], device)
                logits = predict(model.to(device), source, 1, device)
                p.append(probabilities(logits, facts["multilabel"])[0])
        except (UserError, OSError) as error:
            p, problem = [], error
        p = [*p, torch.stack(p).mean(0)] if len(p) > 1 else p
        rows.append([file, patient, problem, *(value for one in p for value in one.tolist())])
    names = [f"{name} " for name in (*runs, "mean")] if len(runs) > 1 else [""]
    header = ["file", "patient", "problem", *(name + c for name in names for c in classes)]
    write_csv(args.out, header, rows)
    unread = sum(bool(row[2]) for row in rows)
    print(f"{len(rows) - unread} images scored, {unread} could not be read: {args.out}")

def probabilities(logits, multilabel):  # in float64, because float32 would round many of them to 1
    return logits.double().sigmoid() if multilabel else logits.double().softmax(1)

def write_run(record, device):
    """Write metrics.json and predictions.csv (a row per image). Return what metrics.json holds."""
    data, facts, rows = record["data"], record["facts"], []
    content = {
        "test": record["figures"], "validation": record["validation"], "classes": data.classes,
        "data": data.source, "images": len(data.test.ids), "patients": len({*data.test.groups}),
        "config": record["config"], "state": record["state"], "epoch": facts["epoch"],
        "threshold": record["threshold"], "cost": record["cost"],
        "trained_by": facts["provenance"], "judged_by": origin(device)}
    for name, images, logits in (("validation", data.val, record["val"]),
                                 ("test", data.test, record["test"])):
        labels = images.labels.view(len(logits), -1).tolist()
        p = probabilities(logits, data.multilabel).tolist()
        rows += [[id, name, patient, *label, *values] for id, patient, label, values in zip(
            images.ids, images.groups, labels, p, strict=True)]
    header = [f"label {name}" for name in data.classes] if data.multilabel else ["label"]
    header = ["image", "split", "patient", *header, *data.classes]
    folder, suffix = record["folder"], record["suffix"]
    with explain(f"metrics.json or predictions.csv of {folder} could not be written"):
        write_json(folder / f"metrics{suffix}.json", content)
        write_csv(folder / f"predictions{suffix}.csv", header, rows)
    return content

def rate_and_share(text):
    """Parse sensitivity=0.95 or specificity=0.9, an argparse type."""
    rate, _, share = text.partition("=")
    if rate not in ("sensitivity", "specificity") or not 0 < float(share or 0) <= 1:
        raise argparse.ArgumentTypeError(f"{text}: expected sensitivity=0.95 or specificity=0.9")
    return rate, float(share)

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    p.add_argument("runs", nargs="+", metavar="RUN", help="runs of train.py, or folders of runs")
    p.add_argument("--data", help="folder of the images if it moved, or of others to evaluate on")
    p.add_argument("--threshold", type=rate_and_share, metavar="RATE=SHARE",
                   help="sensitivity=0.95: choose the threshold on validation images for this rate")
    p.add_argument("--predict", metavar="FOLDER", help="write probabilities for a folder or a file")
    p.add_argument("--out", default="predictions.csv", help="where --predict writes its CSV")
    p.add_argument("--report", action="store_true", help="also precision, F1 and loss")
    p.add_argument("--json", metavar="FILE", help="write the tables and all metrics to this file")
    p.add_argument("--device", type=usable_device, help="cpu, cuda or cuda:N",
                   default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--cache", default="cache", help="decoded images and logits; may be deleted")
    args, loaded = p.parse_args(argv), {}
    if args.predict:
        return predict_files(args)
    records = [evaluate_run(path, args.device, args.data, args.cache, loaded, args.threshold)
               for path in find_runs(args.runs)]
    data = records[0]["data"]
    if len({(*r["data"].classes, r["data"].fingerprints["test"]) for r in records}) > 1:
        raise UserError("the runs have different test images or classes: evaluate them separately")
    groups, score = variants(records), "auc" if data.multilabel else "accuracy"
    rows, gains = rows_and_gains(groups, score)
    text = table(groups, rows, gains, COLUMNS + MORE * args.report, score)
    text += findings(groups, rows) if data.multilabel else []
    text += ["", *notes(records)]
    print("\n".join(text), flush=True)  # before any file is written: the disk may be full
    runs = {str(r["folder"]): write_run(r, args.device) for r in records}
    if args.json:
        with explain(f"{args.json} could not be written"):
            write_json(args.json, {"tables": text, "rows": rows, "gains": gains, "runs": runs})
    print("\nwritten: metrics and predictions in each run folder"
          + (f", {args.json}" if args.json else "; --json FILE keeps the tables"))

if __name__ == "__main__":
    cli(main)
