"""Judge trained runs on the test films: the only place where the test split is opened.

    python evaluate.py runs/demo/teacher runs/demo/baseline runs/demo/student-T1

One table, a row a run (runs that differ only in their seed share a row: mean and standard deviation),
every figure with a 95 % interval from a bootstrap over patients; then what distillation changed, and a
report per run. Everything also goes into metrics.json inside each run's folder.

Class 1 is the positive one: sensitivity is the share of pneumonias found, specificity the share of
normals left alone. With more classes each is taken against the rest, and the macro mean shown.
"""

import argparse
import json
import re

import numpy as np
import torch

from data import UserError, atomic, device_flag, load, origin, prepare, run
from kd import mean_teacher
from models import checkpoint_file, forward, load_checkpoint

NAMES = ["accuracy", "specificity", "sensitivity", "precision", "f1", "auc", "ece"]
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
    """The metrics of NAMES for R weightings of the films, weights (R, N): a dict of tensors (R,),
    or (R, K) where a film may have several findings.

    All ones gives the point estimates, bootstrap multiplicities their spread: one code for both.
    """
    scores, truth, calls = against_rest(logits, labels, threshold)
    weights = weights.double()
    tp, fp, fn, tn = (
        weights @ ((calls == called) & (truth == is_true)).double()  # (R, K); NaN equals neither
        for called, is_true in ((True, 1), (True, 0), (False, 1), (False, 0))
    )
    out = {
        "accuracy": (tp + tn) / (tp + fp + fn + tn),
        "specificity": tn / (tn + fp),
        "sensitivity": tp / (tp + fn),
        "precision": tp / (tp + fp).clamp(min=1e-12),  # nothing called positive: 0, as is customary
        "f1": 2 * tp / (2 * tp + fp + fn).clamp(min=1e-12),
    }
    known = [~column.isnan() for column in truth.T]
    columns = list(enumerate(known))
    out["auc"] = torch.stack([auc(scores[m, k], truth[m, k], weights[:, m]) for k, m in columns], 1)
    if labels.dim() == 1:  # one label a film: confidence in the class that was called
        out = {name: values.mean(1) for name, values in out.items()}
        probability, called = logits.double().softmax(1).max(1)
        right = called == labels
        if logits.shape[1] > 2:
            out["accuracy"] = weights @ right.double() / weights.sum(1)
        out["ece"] = calibration_error(probability, right, weights)
        return out
    right = (scores > 0.5) == (truth == 1)
    sure = torch.maximum(scores, 1 - scores)
    gaps = [calibration_error(sure[m, k], right[m, k], weights[:, m]) for k, m in columns]
    return {**out, "ece": torch.stack(gaps, 1)}


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
    out = {name: values[name][0].tolist() for name in NAMES}
    return {**out, "confusion": confusion(logits, labels, classes, threshold)}


def report(table, classes):
    """Precision, recall, F1 and support per class from a confusion matrix, as scikit-learn prints them."""
    table = torch.tensor(table, dtype=torch.float64)
    right, support, called = table.diag(), table.sum(1), table.sum(0)
    rows = torch.stack([right / called.clamp(min=1), right / support.clamp(min=1),
                        2 * right / (support + called).clamp(min=1)], dim=1)  # (C, 3)  # fmt: skip
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


# ---- runs -------------------------------------------------------------------------------------------


def read(folder, device, source=None, known=None):
    """A run as a record: its facts, and its logits for the validation and test films (asked once)."""
    known = {} if known is None else known
    key = str(folder)
    if key in known:
        return known[key]
    model, facts = load_checkpoint(folder)
    args = facts["args"]
    films = (source or args["data"], facts["size"], ("val", "test"), args["per_class"], args["classes"])
    films += (args["val_fraction"], args["cache"])
    if films not in known:
        known[films] = load(*films)
    data = known[films]
    if data.classes != facts["classes"]:
        raise UserError(f"{folder} was trained on classes {facts['classes']}, {films[0]} has {data.classes}: "
                        f"give the films it was trained for with --data")  # fmt: skip
    seen = set(facts["train_groups"]) & {*data.val.groups, *data.test.groups}
    if seen:
        raise UserError(f"{folder} was trained on {len(seen)} of the patients that it is to be judged by in "
                        f"{films[0]} ({min(seen)} for one): judge it on other films")
    model.to(device, memory_format=torch.channels_last)
    folder = checkpoint_file(folder).parent
    record = {"name": folder.name, "folder": folder, "facts": facts, "args": args, "data": data}
    for part in ("val", "test"):
        split = getattr(data, part)
        view = lambda index, images=split.images: prepare(images[index], device)  # noqa: E731
        record[part] = predict(model, view, len(split.labels))
    known[key] = record
    return record


def judge(record):
    """All figures at 0.5 and at validation's threshold, with intervals and bootstrap samples."""
    data, logits = record["data"], record["test"]
    thresholds = {"0.5": 0.5}
    if len(data.classes) == 2 and not data.multilabel:
        thresholds["validation"] = youden_threshold(record["val"], data.val.labels)
    weights = bootstrap_weights(data.test.groups)  # the same samples for every run: differences are paired
    record["at"] = {}
    for name, threshold in thresholds.items():
        samples = measure(logits, data.test.labels, weights, threshold)
        record["at"][name] = {
            "threshold": threshold,
            **metrics(logits, data.test.labels, data.classes, threshold),
            "interval": {k: interval(samples[k]).tolist() for k in NAMES},
            "samples": samples,
        }


def agreement(a, b, multilabel):
    """The share of films (or of findings) on which two networks make the same call."""
    calls = [logits > 0 if multilabel else logits.argmax(1) for logits in (a, b)]
    return (calls[0] == calls[1]).double().mean().item()


def write_json(path, content):
    with atomic(path) as part:
        part.write_text(json.dumps(content, indent=1))


def figures(record):
    """What goes into metrics.json: every figure of a run, and where it came from."""
    at = {name: {k: v for k, v in a.items() if k != "samples"} for name, a in record["at"].items()}
    data = record["data"]
    return {
        "test": at,
        "validation": metrics(record["val"], data.val.labels, data.classes),
        "agreement_with_teacher": record.get("agreement"),
        "classes": data.classes,
        "films": len(data.test.labels),
        "patients": len(set(data.test.groups)),
        "trained_by": record["facts"]["provenance"],
        "args": record["args"],
        "epoch": record["facts"]["epoch"],
        "judged_by": origin(),
    }


# ---- tables -----------------------------------------------------------------------------------------


def variant(record):
    """What a run is, apart from its seed and its teacher's: runs of one variant share a row."""
    aside = ("seed", "out", "device", "cache", "teacher")
    plain = {k: v for k, v in record["args"].items() if k not in aside}
    teachers = [re.sub(r"-seed\d+", "", path) for path in record["args"]["teacher"] or []]
    return json.dumps([plain, teachers], sort_keys=True)


def row_name(records):
    name = records[0]["name"] if len(records) == 1 else re.sub(r"-seed\d+", "", records[0]["name"])
    seeds = f", {len(records)} seeds" if len(records) > 1 else ""
    return f"{name} ({records[0]['args']['arch']}{seeds})"


def cell(values, samples):
    """In percent: the mean over the runs, their standard deviation, and the mean's interval over patients."""
    values = 100 * torch.tensor(values, dtype=torch.float64)
    low, high = (100 * interval(torch.stack(samples).mean(0))).tolist()
    spread = f" ± {values.std():.1f}" if len(values) > 1 else ""
    return f"{values.mean():.1f}{spread} [{low:.1f}, {high:.1f}]"


def print_table(header, rows):
    rows = [header, *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    rows.insert(1, ["-" * width for width in widths])
    print()
    for row in rows:
        print("| " + " | ".join(f"{c:<{width}}" for c, width in zip(row, widths, strict=True)) + " |")


def majority_row(data):
    """What a network would reach that calls every film by the commonest class of these films: the floor."""
    counts = data.test.labels.bincount(minlength=len(data.classes))
    logits = torch.zeros(len(data.test.labels), len(data.classes))
    logits[:, counts.argmax()] = 1
    floor = metrics(logits, data.test.labels, data.classes)
    return [f"always {data.classes[counts.argmax()]}", *(f"{100 * floor[k]:.1f}" for k in NAMES[:-1]), ""]


def show(records):
    """The tables: a row a variant, its runs pooled; then what distillation changed; then a report a run."""
    variants = {}
    for record in records:
        variants.setdefault(variant(record), []).append(record)
    data = records[0]["data"]
    for name in records[0]["at"]:
        rows = [majority_row(data)] if name == "0.5" else []
        for same in variants.values():
            at = [record["at"][name] for record in same]
            cells = [cell([a[k] for a in at], [a["samples"][k] for a in at]) for k in NAMES]
            rows.append([row_name(same), *cells])
        plain = f"{len(data.test.labels)} test films, %"
        title = plain if name == "0.5" else "at the threshold best on validation"
        print_table([title, *NAMES], rows)
    print()
    for students in variants.values():
        if "agreement" in students[0]:
            share = sum(s["agreement"] for s in students) / len(students)
            print(f"{row_name(students)} makes its teacher's call on {100 * share:.1f} % of the test films")
        for baselines in variants.values():
            if any(comparable(s, b) for s in students for b in baselines):
                print(f"{row_name(students)} minus {row_name(baselines)}, in points: "
                      + ", ".join(differences(students, baselines)))  # fmt: skip
    for record in records:
        print(f"\n{record['folder']}: best on validation in epoch {record['facts']['epoch']:g}\n")
        print(report(record["at"]["0.5"]["confusion"], data.classes))
        print(f"confusion (rows: truth, columns: call):\n{np.array(record['at']['0.5']['confusion'])}")


def grid(records):
    """Teachers down, students across: train, validation and test accuracy, means over seeds (± of test).

    Training accuracy is what the loop saw in the best epoch: dropout on, weights still moving.
    """
    cells = {}
    for record in records:
        args, facts, data = record["args"], record["facts"], record["data"]
        smooth = f", label smoothing {args['label_smoothing']:g}" if args["label_smoothing"] else ""
        by = " + ".join(facts["taught_by"]) or "no teacher" + smooth
        stopped = f", stopped at {args['stop_at']:g}" if args["stop_at"] else ""
        val = metrics(record["val"], data.val.labels, data.classes)["accuracy"]
        cell = cells.setdefault(by, {}).setdefault(args["arch"] + stopped, [])
        cell.append((facts["train_accuracy"], val, record["at"]["0.5"]["accuracy"]))
    students = sorted({student for row in cells.values() for student in row})

    def show_cell(runs):
        if not runs:
            return ""
        values = 100 * torch.tensor(runs, dtype=torch.float64)
        spread = f" ± {values[:, 2].std():.1f}" if len(runs) > 1 else ""
        return " / ".join(f"{mean:.1f}" for mean in values.mean(0)) + spread

    print_table(["train / val / test accuracy", *students],
                [[by, *(show_cell(row.get(student)) for student in students)] for by, row in cells.items()])


def comparable(student, baseline):
    """The same network given the same films and seed, one with a teacher, one without."""
    same = ("seed", "data", "per_class", "classes", "arch", "size", "finetune", "weights", "epochs")
    a, b = student["args"], baseline["args"]
    return (a["role"], b["role"]) == ("student", "baseline") and all(a[k] == b[k] for k in same)


def differences(students, baselines):
    """Student minus baseline, seed by seed, on the same bootstrap samples."""
    pairs = [(s, b) for s in students for b in baselines if s["args"]["seed"] == b["args"]["seed"]]
    pairs = [(s["at"]["0.5"], b["at"]["0.5"]) for s, b in pairs]
    for k in ("accuracy", "specificity", "sensitivity", "auc"):
        gains = [s[k] - b[k] for s, b in pairs]
        yield f"{k} {cell(gains, [s['samples'][k] - b['samples'][k] for s, b in pairs])}"


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="+", metavar="RUN", help="folders that train.py wrote")
    p.add_argument("--data", help="where the films are, if no longer where they were in training")
    p.add_argument("--grid", action="store_true", help="first a table, teachers down and students across")
    device_flag(p)
    p.add_argument("--json", metavar="FILE", help="every run's metrics in one file, to keep")
    return p.parse_args(argv)


def main(argv=None):
    args = get_args(argv)
    known = {}
    records = [read(folder, args.device, args.data, known) for folder in args.runs]
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
    if args.grid:
        grid(records)
    show(records)
    if args.json:
        write_json(args.json, {str(record["folder"]): figures(record) for record in records})


if __name__ == "__main__":
    run(main)
