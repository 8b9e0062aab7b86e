"""Evaluate runs on the test images. No other script opens the test split.

    python evaluate.py runs/demo                             all runs below a folder
    python evaluate.py runs/demo/teacher runs/demo/student-T1 --report
    python evaluate.py runs/demo --json results/demo.json    also keep the tables and all figures
    python evaluate.py runs/mine --predict new-images        classify images that have no label

A row of the table is a run, or several runs that differ only in their seed: mean and standard
deviation. Below a figure is its 95 % interval. The last rows are gains, student minus baseline.
Class 1 is the positive one: sensitivity is the share of its images that are called positive,
specificity the share of the others that are not. With more classes, each one is taken against the
rest, and the figures are averaged.

The file goes from metrics and the bootstrap over runs, rows and gains, the table, and reports to
new images, text and files, and the command line.
"""

import argparse
import csv
import json
import math
import platform
import re
import subprocess
import sys
from itertools import product, zip_longest
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data import Help, UserError, atomic, cli, explain, load_as, mean
from models import (cost, forward, from_images, load_run, refuse_foreign, run_file, state_of)

# Which entries of a config are not compared: paths, whose contents have hashes in it, and what
# changes no figure; where runs differ in their seed, also what follows from it; for a gain,
# whatever distillation consists of.
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
    rows = torch.arange(n, device=device)  # made there: copying each batch would make a GPU wait
    return torch.cat([forward(model, source(batch))[0].float().cpu()
                      for batch in rows.split(batch_size)])

def auc(scores, truth, weights):
    """Weighted area under the ROC curve (R,): how often a positive outscores a negative; ties count
    half. scores (N,), truth (N,) in {0, 1}, weights (R, N): one row a bootstrap sample."""
    values, place = scores.unique(return_inverse=True)  # sorted, so a place is a rank with ties
    at = weights.new_zeros(len(weights), len(values))
    negatives = at.index_add(1, place, weights * (truth == 0))
    positives = at.index_add(1, place, weights * (truth == 1))
    below = negatives.cumsum(1) - negatives
    return (positives * (below + negatives / 2)).sum(1) / (positives.sum(1) * negatives.sum(1))

def calibration_error(confidence, correct, weights, bins=15):
    """Expected calibration error (R,): |confidence minus share of correct calls|, over the bins."""
    place = (confidence * bins).long().clamp(max=bins - 1)
    gaps = weights * (confidence - correct.double())
    sums = weights.new_zeros(len(weights), bins).index_add(1, place, gaps)
    return sums.abs().sum(1) / weights.sum(1)

def measure(logits, labels, weights):
    """The metrics for R weightings of the images, weights (R, N): a dict of tensors (R,), or (R, K)
    where an image may have several findings, labels (N, K). All ones give the figure itself,
    bootstrap multiplicities its spread: one code for both."""
    if labels.dim() == 2:  # each finding by itself: sigmoid(z) is the second of softmax((0, z))
        each = [measure(F.pad(z[known, None], (1, 0)), truth[known].long(), weights[:, known])
                for z, truth, known in zip(logits.T, labels.T, ~labels.isnan().T, strict=True)]
        return {name: torch.stack([one[name] for one in each], 1) for name in each[0]}
    logits, weights = logits.double(), weights.double()
    n, total, calls = logits.shape[1], weights.sum(1), logits.argmax(1)
    counts = weights.new_zeros(len(weights), n * n).index_add(1, labels * n + calls, weights)
    confusion = counts.view(-1, n, n)  # (R, C, C), rows the truth, columns the call
    right = confusion.diagonal(dim1=1, dim2=2)  # (R, C)
    positive = [1] if n == 2 else list(range(n))  # each of them against the rest
    tp = right[:, positive]  # (R, 1) or (R, C)
    fn = confusion.sum(2)[:, positive] - tp
    fp = confusion.sum(1)[:, positive] - tp
    tn = total[:, None] - tp - fn - fp
    # Log-odds rank images as probabilities do, but do not round to 1 where a network is very sure.
    # Equal ones may differ by 1e-15, which would split ties: ten decimals are kept.
    rest = [logits[:, [j for j in range(n) if j != k]].logsumexp(1) for k in positive]
    odds = [(logits[:, k] - r).round(decimals=10) for k, r in zip(positive, rest, strict=True)]
    aucs = [auc(odd, labels == k, weights) for k, odd in zip(positive, odds, strict=True)]
    return {
        "accuracy": right.sum(1) / total,
        "specificity": (tn / (tn + fp)).mean(1), "sensitivity": (tp / (tp + fn)).mean(1),
        # Nothing called positive: 0, as is customary; no positive to be found: not a number.
        "precision": (tp / (tp + fp).clamp(min=1e-12)).where(tp + fn > 0, torch.nan).mean(1),
        "f1": (2 * tp / (2 * tp + fp + fn)).where(tp + fn > 0, torch.nan).mean(1),
        "auc": torch.stack(aucs, 1).mean(1),
        "ece": calibration_error(logits.softmax(1).amax(1), calls == labels, weights),
        "loss": weights @ F.cross_entropy(logits, labels, reduction="none") / total,
        "confusion": confusion,
    }

def metrics(logits, labels, classes):
    """The metrics of all images as plain floats and lists: of findings a value each."""
    if not logits.isfinite().all():
        raise UserError(f"logits of {', '.join(classes)} are NaN or infinite: training diverged")
    figures = measure(logits, labels, torch.ones(1, len(labels)))
    figures["confusion"] = figures["confusion"].long()
    return {name: value[0].tolist() for name, value in figures.items()}

def bootstrap_weights(groups, repeats=1000, seed=0):
    """(1 + repeats, N): first ones, for the figure itself; then how often each image is in each
    sample. A patient's images are correlated, so patients are drawn, with all their images."""
    member = torch.from_numpy(np.unique(groups, return_inverse=True)[1])  # (N,): whose it is
    n = int(member.max()) + 1
    draws = torch.randint(n, (repeats, n), generator=torch.Generator().manual_seed(seed))
    drawn = torch.zeros(repeats, n, dtype=torch.float64)
    drawn.scatter_add_(1, draws, torch.ones_like(drawn))
    return torch.cat([torch.ones_like(drawn[:1]), drawn])[:, member]

def over_seeds(runs):
    """(1 + R,): the mean over runs (S, 1 + R) that differ in their seed, and its bootstrap samples.
    For each the seeds too are drawn with replacement: another five seeds would have given another
    mean. With fewer than five seeds even this is too narrow."""
    shape, generator = (len(runs), runs.shape[1] - 1), torch.Generator().manual_seed(1)
    draws = torch.randint(len(runs), shape, generator=generator)
    return torch.cat([runs[:, :1].mean(0), runs[:, 1:].gather(0, draws).mean(0)])

def interval(samples):
    """The middle 95 % of the bootstrap samples (R, ...), leaving out those of one class."""
    return torch.nanquantile(samples.double(), torch.tensor([0.025, 0.975], dtype=torch.double), 0)

def summary(runs):
    """{"mean", "sd", "low", "high"} over runs (S) that differ in their seed; sd is NaN for one run,
    low and high are the ends of the mean's interval, left out where there are no samples. runs: of
    each (1 + R,), the figure and its bootstrap samples; (1 + R, K) of findings."""
    runs = [torch.as_tensor(run, dtype=torch.double) for run in runs]
    values = torch.stack([run.view(len(run), -1) for run in runs])  # (S, 1 + R, K)
    if values.shape[2] > 1:  # a finding that a sample leaves without a positive is left out of all
        values = values[..., ~values.isnan().any(0).any(0)]
    values = values.mean(2)  # (S, 1 + R)
    sd = values[:, 0].std().item() if len(values) > 1 else math.nan
    figure = {"mean": values[:, 0].mean().item(), "sd": sd}
    if values.shape[1] > 1:
        figure["low"], figure["high"] = interval(over_seeds(values)[1:]).tolist()
    return figure

# ---- runs and the table --------------------------------------------------------------------------
def find_runs(paths):
    """The best.pt of every run; a folder of runs stands for the runs in it."""
    found, missing = [], []
    for path in paths:
        best = run_file(path)
        runs = [best] if best.is_file() else sorted(Path(path).glob("*/best.pt"))
        found += runs
        missing += [] if runs else [path]
    if not found:
        raise UserError(f"no best.pt in {', '.join(paths)}. Name runs of train.py, or their folder")
    if missing:  # a run that was killed before its first save must not stop runs/demo/*
        print(f"no best.pt, or not yet, in {', '.join(missing)}: left out")
    return found

def judge(path, device, source, cache, loaded):
    """Return a run as a record. loaded: data sets at hand, so that runs of one size share one."""
    model, facts = load_run(path)
    with explain(f"{path} is not a run of train.py"):
        config, size, state = facts["config"], facts["size"], state_of(facts)
        source = source or config["data"]
        key = size, source, config["per_class"], config["classes"], config["val_fraction"]
    if key not in loaded:
        loaded[key] = load_as(config, size, ("val", "test"), cache, source)
    data = loaded[key]
    refuse_foreign(path.parent, facts, data)
    if any(config[k] != data.fingerprints[k] for k in ("val", "val_pixels", "test")):
        print(f"{path.parent}: validation or test images of {source} have changed since training")
    device = torch.device(device)
    model.to(device, memory_format=torch.channels_last)  # and not kept: 30 runs may not fit
    val, test = (predict(model, from_images(split.images, device), len(split.ids), device)
                 for split in (data.val, data.test))
    figures = metrics(test, data.test.labels, data.classes)
    # The same samples for every run: differences between two runs are paired.
    samples = measure(test, data.test.labels, bootstrap_weights(data.test.groups))
    figures["interval"] = {k: interval(samples[k][1:]).tolist() for k in COLUMNS + MORE}
    return {"folder": path.parent, "facts": facts, "config": config, "data": data, "state": state,
            "cost": cost(model, size), "test": test, "figures": figures, "samples": samples,
            "validation": metrics(val, data.val.labels, data.classes),
            "p": test.double().sigmoid() if data.multilabel else test.double().softmax(1)}

def compared(config, *more):
    """Return what runs are compared by: their config without PATHS and other sets of names."""
    ignored = PATHS.union(*more)
    return {name: value for name, value in config.items() if name not in ignored}

def differences(config, other, *more):
    """Return {name: (value, other value)} where two configs differ, without PATHS and `more`."""
    a, b = compared(config, *more), compared(other, *more)
    return {name: (a.get(name), b.get(name)) for name in a | b if a.get(name) != b.get(name)}

def variants(records):
    """Return the runs in groups, one per row: their configs are equal except for the seeds."""
    groups = {}
    for record in records:
        key = json.dumps(compared(record["config"], SEEDS), sort_keys=True)
        by_seed = groups.setdefault(key, {})
        other = by_seed.setdefault(record["config"]["seed"], record)
        if other is not record:
            raise UserError(f"{other['folder']} and {record['folder']} have the same seed and "
                            f"flags: they would count as two seeds. Leave one out")
    return [list(by_seed.values()) for by_seed in groups.values()]

def rows_and_gains(groups, score):
    """The table as plain values: a row for each group; and what distillation changed, students
    minus baselines, seed by seed on the same samples. `score` chose the epochs."""
    rows, gains = [], []
    for group in groups:
        name = group[0]["folder"].name
        rows.append({
            "title": re.sub(r"-seed\d+", "", name) if len(group) > 1 else name,
            "arch": group[0]["config"]["arch"], "runs": [str(r["folder"]) for r in group],
            "validation": summary([[r["validation"][score]] for r in group]),
            "figures": {k: summary([r["samples"][k] for r in group]) for k in COLUMNS + MORE}})
    for (i, students), (j, baselines) in product(enumerate(groups), repeat=2):
        pairs = [(s["samples"], b["samples"]) for s in students for b in baselines
                 if (s["config"]["role"], b["config"]["role"]) == ("student", "baseline")
                 and compared(s["config"], DISTILLATION) == compared(b["config"], DISTILLATION)]
        if pairs:
            figures = {k: summary([s[k] - b[k] for s, b in pairs]) for k in COLUMNS + MORE}
            gains.append({"title": rows[i]["title"], "minus": rows[j]["title"],
                          "pairs": len(pairs), "students": len(students), "figures": figures})
    return rows, gains

def short(name, width=34):
    """A name of at most `width` letters: an ellipsis stands for the middle of a longer one."""
    return name if len(name) <= width else f"{name[: (width - 1) // 2]}…{name[-(width // 2) :]}"

def cell(figure, column="", sign=""):
    """Mean ± standard deviation, and in a second line the interval; in percent but the loss."""
    unit, digits = (1, 3) if column == "loss" else (100, 1)
    middle, sd, *ends = (f"{unit * value:{sign}.{digits}f}" for value in figure.values())
    text = middle if math.isnan(figure["sd"]) else f"{middle} ± {sd.lstrip('+')}"
    return f"{text}\n[{' '.join(ends)}]" if ends else text

def floor_row(data, columns):
    """What a network would reach that always says the same: the commonest class, or no finding."""
    logits, title = torch.zeros(len(data.test.labels), len(data.classes)), "always the same"
    if not data.multilabel:
        commonest = data.test.labels.bincount().argmax()
        logits[:, commonest], title = 1, f"always {data.classes[commonest]}"
    floor = metrics(logits, data.test.labels, data.classes)
    return [title, "", *("" if k in ("ece", "loss") else f"{100 * mean(floor[k]):.1f}"
                         for k in columns)]

def table(groups, rows, gains, columns, score):
    """Lines of text: always the same, a row for each group, then what distillation changed."""
    data = groups[0][0]["data"]
    lines, n = [floor_row(data, columns)], len(data.test.labels)
    for group, row in zip(groups, rows, strict=True):
        below = f"{row['arch']}, {len(group)} seeds" if len(group) > 1 else row["arch"]
        below += "".join(r["state"] for r in group)
        lines.append([f"{short(row['title'])}\n  {below}", cell(row["validation"]),
                      *(cell(row["figures"][k], k) for k in columns)])
    for gain in gains:
        some = f", {gain['pairs']} of {gain['students']}" * (gain["pairs"] < gain["students"])
        lines.append([f"{short(gain['title'])}\n  minus {short(gain['minus'], 26)}{some}", "",
                      *(cell(gain["figures"][k], k, "+") for k in columns)])
    return aligned([f"{n} test images, %", f"validation\n{score}", *columns], lines)

def notes(records):
    """The sentences below the table."""
    multilabel, classes = records[0]["data"].multilabel, records[0]["data"].classes
    if len(classes) == 2 and not multilabel:
        yield f"positive: {classes[1]}"
    yield "ece: lower is better"
    for r in records if not multilabel else []:
        calls = {k for row in r["figures"]["confusion"] for k, n in enumerate(row) if n}
        if len(calls) == 1:  # its AUC tells whether it has learned nothing, or lacks a threshold
            yield f"{r['folder'].name} says {classes[calls.pop()]} of every image"
    n = min(len(r["data"].val.labels) for r in records)
    if n < 50 and not multilabel:
        yield f"{n} validation images: their accuracy moves in steps of {100 / n:.1f} points"

# ---- grids and reports ---------------------------------------------------------------------------
def grid(groups):
    """Teachers down, students across: train, validation and test accuracy, means over seeds (± of
    test). Training accuracy is the loop's own: dropout on, weights still moving."""
    cells = {}
    for group in groups:
        config, smoothing = group[0]["config"], group[0]["config"]["label_smoothing"]
        smooth = f", label smoothing {smoothing:g}" if smoothing else ""
        teacher = " + ".join(config["taught_by"]) or "no teacher" + smooth
        values = 100 * torch.tensor([
            (r["facts"]["train_accuracy"], mean(r["validation"]["accuracy"]),
             mean(r["figures"]["accuracy"])) for r in group], dtype=torch.float64)  # (S, 3)
        text = " / ".join("n/a" if value.isnan() else f"{value:.1f}" for value in values.mean(0))
        text += f" ± {values[:, 2].std():.1f}" if len(group) > 1 else ""
        setting = f"T {config['T']:g}, alpha {config['alpha']:g}"  # a cell may hold several
        text = f"{setting if config['role'] == 'student' else config['role']}: {text}"
        student = config["arch"] + group[0]["state"]
        row = cells.setdefault(teacher, {})
        row[student] = f"{row[student]}\n{text}" if student in row else text
    students = sorted({student for row in cells.values() for student in row})
    return aligned(["train / val / test accuracy", *students],
                   [[teacher, *(row.get(student, "") for student in students)]
                    for teacher, row in cells.items()])

def report(confusion, classes):
    """Precision, recall, F1 and support of each class, their means; below, the confusion matrix."""
    counts = torch.tensor(confusion, dtype=torch.float64)  # rows the truth, columns the call
    right, support, calls = counts.diag(), counts.sum(1), counts.sum(0)
    values = torch.stack([right / calls.clamp(min=1), right / support.clamp(min=1),
                          2 * right / (support + calls).clamp(min=1)])  # (3, C)
    means = torch.stack([values.mean(1), (values * support).sum(1) / support.sum()], 1)
    rows = zip([*classes, "macro avg", "weighted avg"], torch.cat([values, means], 1).T,
               [*support, support.sum(), support.sum()], strict=True)
    text = aligned(["", "precision", "recall", "f1-score", "support"],
                   [[name, *(f"{v:.2f}" for v in three), f"{n:.0f}"] for name, three, n in rows])
    return text + aligned(["images called", *classes], [
        [name, *map(str, row)] for name, row in zip(classes, confusion, strict=True)])

def findings(groups, rows):
    """The AUC of every finding, and what each network is made of."""
    lines, data = [], groups[0][0]["data"]
    for k, finding in enumerate(data.classes):
        truth = data.test.labels[:, k]
        runs = [[r["samples"]["auc"][:, k] for r in group] for group in groups]
        rare = any(run.isnan().any() for group in runs for run in group)
        lines.append([finding + " (too rare for the mean)" * rare,
                      f"{int(truth.nansum())} of {int((~truth.isnan()).sum())}",
                      *(cell(summary(group)) for group in runs)])
    sizes = [group[0]["cost"]["parameters"] / 1e6 for group in groups]
    lines.append(["parameters, M", "", *(f"{size:.2f}" for size in sizes)])
    return aligned(["AUC, %", "positives", *(short(row["title"]) for row in rows)], lines)

# ---- tables as text, files, where a number came from --------------------------------------------
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
    with atomic(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])

def write_json(path, content):
    content = json.loads(json.dumps(content), parse_constant=lambda name: None)  # JSON has no NaN
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")

def origin(device):
    """What a number came from: command, commit, versions and machine."""
    git = subprocess.run("git describe --always --dirty --abbrev=12", shell=True, text=True,
                         capture_output=True, cwd=Path(__file__).parent)
    commit = git.stdout.strip() or "unknown"  # no repository, or no git on this machine
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return {"command": " ".join(sys.argv), "commit": commit, "torch": str(torch.__version__),
            "device": cpu if "cuda" not in str(device) else torch.cuda.get_device_name(device)}

def usable_device(name):
    """An argparse type: the name of a CPU or GPU that torch can use here."""
    n = torch.cuda.device_count()
    if name not in ["cpu", *["cuda"] * (n > 0), *(f"cuda:{i}" for i in range(n))]:
        raise argparse.ArgumentTypeError(f"{name} is no device of this machine. Expected cpu, or "
                                         f"cuda or cuda:N where there is a GPU")
    return name

# ---- the command line ----------------------------------------------------------------------------
def write_run(record, device):
    """metrics.json, which is returned, and predictions.csv, a line an image."""
    data, facts, n = record["data"], record["facts"], len(record["test"])
    content = {
        "test": record["figures"], "validation": record["validation"], "classes": data.classes,
        "data": data.source, "images": n, "patients": len(set(data.test.groups)),
        "config": record["config"], "epoch": facts["epoch"], "cost": record["cost"],
        "trained_by": facts["provenance"], "judged_by": origin(device)}
    header = [f"label {name}" for name in data.classes] if data.multilabel else ["label"]
    cells = [data.test.ids, data.test.groups, *data.test.labels.view(n, -1).T.tolist(),
             *record["p"].T.tolist()]  # from float64: in float32 many would be 1
    header = ["image", "patient", *header, *data.classes]
    with explain(f"metrics.json or predictions.csv of {record['folder']} could not be written"):
        write_json(record["folder"] / "metrics.json", content)
        write_csv(record["folder"] / "predictions.csv", header, zip(*cells, strict=True))
    return content

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    p.add_argument("runs", nargs="+", metavar="RUN", help="runs of train.py, or folders of runs")
    p.add_argument("--data", help="where the images are now, if they were moved after training")
    p.add_argument("--report", action="store_true", help="more columns, and a report by class")
    p.add_argument("--grid", action="store_true", help="a table, teachers down and students across")
    p.add_argument("--json", metavar="FILE", help="the tables and every run's figures in one file")
    p.add_argument("--device", type=usable_device, help="cpu, cuda or cuda:N",
                   default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--cache", default="cache", help="folder of decoded images; may be deleted")
    args, loaded = p.parse_args(argv), {}
    checkpoints = find_runs(args.runs)
    records = [judge(path, args.device, args.data, args.cache, loaded) for path in checkpoints]
    data = records[0]["data"]
    if len({(*r["data"].classes, r["data"].fingerprints["test"]) for r in records}) > 1:
        raise UserError("different test images or classes: judge these runs in separate calls")
    groups, score = variants(records), "auc" if data.multilabel else "accuracy"
    rows, gains = rows_and_gains(groups, score)
    text = grid(groups) if args.grid else []
    for columns in (COLUMNS, MORE) if args.report else (COLUMNS,):
        text += table(groups, rows, gains, columns, score)
    text += findings(groups, rows) if data.multilabel else []
    text += ["", *notes(records)]
    for r in records if args.report and not data.multilabel else []:
        text += [f"\n{r['folder']}: best on validation in epoch {r['facts']['epoch']}",
                 *report(r["figures"]["confusion"], data.classes)]
    print("\n".join(text), flush=True)  # before any file is written: the disk may be full
    runs = {str(r["folder"]): write_run(r, args.device) for r in records}
    if args.json:
        with explain(f"{args.json} could not be written"):
            write_json(args.json, {"tables": text, "rows": rows, "gains": gains, "runs": runs})
    print("\nwritten: metrics.json and predictions.csv in each run's folder"
          + (f", {args.json}" if args.json else "; --json FILE keeps the tables"))

if __name__ == "__main__":
    cli(main)
