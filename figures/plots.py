"""Draw the figures of the pages. This script alone needs matplotlib: pip install matplotlib

    python figures/plots.py table results/demo.json figures/demo.svg       a file of evaluate --json
    python figures/plots.py curves curves.svg runs/demo/*                  folders of train.py
    python figures/plots.py labels results/labels.json figures/labels.svg  a file of evaluate --json
    python figures/plots.py costs results/small.json figures/small.svg     or several such files
    python figures/plots.py cams cams.png RUN [RUN ...]           Grad-CAM of a few test images
    python figures/plots.py mistakes mistakes.png RUN [RUN ...]   Grad-CAM of the worst mistakes
    python figures/plots.py roc roc.svg RUN [RUN ...]             what evaluate.py wrote there
"""

import json
import re
import sys
from collections import Counter
from itertools import zip_longest
from pathlib import Path

import numpy as np
from matplotlib import rcParams
from matplotlib.figure import Figure
sys.path.insert(0, str(Path(__file__).parents[1]))  # for functions that import our scripts

T_975 = [0, 0, 12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]  # Student's t, by n
T_975 += [1.96 + 2.372 / n + 2.823 / n**2 for n in range(10, 1000)]  # an expansion, to 0.1 %
rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "ids that stay", "axes.grid": True,
                 "axes.grid.axis": "y", "grid.color": "0.85", "figure.constrained_layout.use": 1})

def table(content):
    """AUC and accuracy of every row with their 95 % intervals; below, what distillation changed."""
    blocks = [entries for entries in (content["rows"], content["gains"]) if entries]
    heights = [len(entries) + 1 for entries in blocks]
    fig = Figure((8.75, 0.5 * sum(heights)))  # in inches: 840 pixels wide
    grid = fig.subplots(len(blocks), 2, squeeze=False, sharey="row", height_ratios=heights)
    for axes, entries, unit in zip(grid, blocks, ("%", "points gained"), strict=False):
        for ax, column in zip(axes, ("auc", "accuracy"), strict=True):
            ax.set_title(f"{column.replace('auc', 'AUC')}, {unit}")
            if unit != "%":
                ax.axvline(0, color="0.6", linestyle=":", zorder=0)
            for y, figures in enumerate(entry["figures"][column] for entry in entries):
                x, low, high = (100 * np.array(figures[k], float) for k in ("mean", "low", "high"))
                ax.plot([low, high], [y, y], "k-", x, y, "ko")  # null is NaN by now: not drawn
                ax.text(x, y - 0.2, f"{x:.1f}", ha="center", backgroundcolor="w", zorder=1)
        axes[0].set_yticks(range(len(entries)), [f"{in_words(e['title'])}\n" + (
            e.get("arch") or f"minus {in_words(e['minus'])}") for e in entries])
        axes[0].set_ylim(len(entries) - 0.5, -0.7)  # the first row on top
    return fig

def in_words(name):
    """Turn the name of a run folder, such as student-T4-all-labels, into words if it has a role."""
    role, *parts = re.split(r"-(?=T\d|alpha|seed|\d|all-)", name)
    role = "self-distilled student" if role in ("self", "self-distilled") else role
    parts = [re.sub(r"(?<=[Tad])(?=\d)", " ", p.replace("-", " ")) for p in parts if p != "T1"]
    return ", ".join([role, *parts]) if re.search("(teacher|baseline|student)$", role) else name

def curves(folders):
    """Accuracy by epoch: a panel for each row of the table, its runs' folders equal but -seedN."""
    panels, ax = {}, None
    for folder in folders:
        history = np.genfromtxt(Path(folder, "history.csv"), delimiter=",", names=True, ndmin=1)
        panels.setdefault(re.sub(r"-seed\d+", "", Path(folder).name), []).append(history)
    height = -(-len(panels) // 3)
    fig = Figure((8.75, 2.2 * height + 0.4))
    fig.suptitle("accuracy by epoch, %; solid: validation, dashed: training")
    for i, (name, histories) in enumerate(panels.items(), 1):
        ax = fig.add_subplot(height, 3, i, title=name, sharey=ax)
        for history in histories:
            ax.plot(history["epoch"], 100 * history["train_accuracy"], ".--", color="0.5")
            ax.plot(history["epoch"], 100 * history["val_accuracy"], "k.-", linewidth=1)
    return fig

def labels(content):
    """Test AUC (over findings: the mean) by the number of labels, 95 % intervals by Student's t."""
    runs, lines = content["runs"], {}  # lines: {what is trained: {labels per class: [AUC, ...]}}
    for config, auc in [(run["config"], run["test"]["auc"]) for run in runs.values()]:
        folders = {str(Path(t)).removesuffix("/best.pt") for t in config["teacher"] or []}
        teachers = [runs[f]["config"] for f in folders & runs.keys()]  # those that are known
        which = "all" if all(t["labels_per_class"] is None for t in teachers) else "fewer"
        who = f"student, teacher trained on {which} labels"
        if any(t["role"] == "baseline" for t in teachers):
            who = "self-distilled student (teacher: the baseline)"
        who += f", alpha {config['alpha']}" * (config["alpha"] != 0.9)
        who = who if config["role"] == "student" and config["alpha"] > 0 else "baseline"
        n = np.inf if config["labels_per_class"] is None else config["labels_per_class"]
        if config["role"] != "teacher":
            lines.setdefault(who, {}).setdefault(n, []).append(np.nanmean(np.array(auc, float)))
    counts = sorted(set().union(*lines.values()))
    ax = (fig := Figure((8.75, 4.2))).subplots()
    ax.set(xlabel="labels per class", title="test AUC, %, and 95 % interval of its mean over seeds")
    ax.set_xticks(range(len(counts)), ["all" if n == np.inf else n for n in counts])
    for k, (who, line) in enumerate(sorted(lines.items())):
        places = [counts.index(n) + 0.05 * k for n in sorted(line)]  # bars side by side
        values = [100 * np.array(line[n]) for n in sorted(line)]
        bars = [T_975[min(len(v), 999)] * v.std() / max(len(v) - 1, 1) ** 0.5 for v in values]
        ax.errorbar(places, [v.mean() for v in values], bars, label=who, fmt="os^Dv"[k % 5] + "-")
    fig.legend(loc="outside upper center", ncols=2)
    return fig

def costs(*contents):
    """Test AUC of every row by the multiply-adds of its network, with 95 % intervals."""
    rows = [(row, c["runs"][row["runs"][0]]) for c in contents for row in c["rows"]]
    ticks = {run["cost"]["multiply_adds"] / 1e6: row["arch"] for row, run in rows}
    number, places, kinds = Counter(row["arch"] for row, _ in rows), Counter(), {}
    for row, run in rows:
        arch, auc, kind = row["arch"], row["figures"]["auc"], run["config"]["role"]
        kind = in_words(row["title"].replace(f"-{arch}", "")) if kind != "teacher" else kind
        x = run["cost"]["multiply_adds"] / 1e6 * 1.04 ** (places[arch] - (number[arch] - 1) / 2)
        places[arch] += 1  # rows of one network stand side by side
        kinds.setdefault(kind, []).append([x, *(100 * auc[k] for k in ("mean", "low", "high"))])
    ax = (fig := Figure((8.75, 4.8))).subplots()
    ax.set(xscale="log", xlabel="million multiply-adds", title="test AUC, %, and 95 % interval")
    names = [f"{x:.0f}\n{arch}".replace("_v", "\nv") for x, arch in ticks.items()]
    ax.set_xticks([*ticks], names, fontsize="small")
    for k, (kind, points) in enumerate(kinds.items()):
        x, y, low, high = np.array(points).T
        ax.errorbar(x, y, [y - low, high - y], label=kind, fmt="os^Dv*PXh"[k % 9])
    fig.legend(loc="outside upper center", ncols=3)
    return fig

def cams(folders, only_mistakes=False):
    """Draw Grad-CAM of test images, a row per image and a column per run; None if there are none.
    Heat lies over what raises the score of an image's true class, whatever class is predicted."""
    from data import UserError, prepare
    from models import grad_cam
    runs = [(Path(folder).name, *run) for folder in folders if (run := load(folder))]
    if not runs:
        return print("no run can be drawn, so nothing is written")
    data = runs[0][2]
    if any((d.classes, d.test.ids) != (data.classes, data.test.ids) for _, _, d, _ in runs):
        raise UserError("different test images or classes: draw these runs in separate calls")
    targets, calls, sure = judge(data.test.labels.numpy(), np.stack([p for *_, p in runs]))
    chosen = choose(targets, calls, sure, data.test.groups, only_mistakes)
    if not chosen:
        return print("the drawn runs make no mistake, so nothing is written")
    names = [*data.classes, *(f"no {name}" for name in data.classes)]
    fig = Figure((2.4 * (1 + len(runs)), 2.7 * len(chosen)))
    grid = fig.subplots(len(chosen), 1 + len(runs), squeeze=False,
                        subplot_kw={"xticks": [], "yticks": []})
    for ax, i in zip(grid[:, 0], chosen, strict=True):
        ax.imshow(data.test.images[i, 0].numpy(), cmap="gray", vmin=0, vmax=255)
        ax.set_xlabel(names[targets[i]])
        if hasattr(data.test, "masks") and data.test.masks[i].any():  # a phantom's opacities
            ax.contour(data.test.masks[i].numpy(), levels=[0.5], colors="#ff5a00", linewidths=1)
    for column, (name, model, own, _), call, p in zip(grid.T[1:], runs, calls, sure, strict=True):
        images = own.test.images[chosen]  # of the size that this run was trained on
        x = prepare(images, next(model.parameters()).device)
        heats = grad_cam(model, x, targets[chosen].tolist()).cpu().numpy()
        column[0].set_title(name, fontsize="small")
        for ax, i, image, heat in zip(column, chosen, images, heats, strict=True):
            ax.imshow(image[0].numpy(), cmap="gray", vmin=0, vmax=255)
            ax.imshow(heat, cmap="autumn", alpha=0.6 * heat)
            ax.set_xlabel(f"{names[call[i]]} {100 * p[i]:.0f} %",
                          color="k" if call[i] == targets[i] else "tab:red")
    print("image", "label", *(name for name, *_ in runs), sep="  ")
    for i, axes in zip(chosen, grid, strict=True):
        print(data.test.ids[i], *(ax.get_xlabel() for ax in axes), sep="  ")
    return fig

def load(folder):
    """Return network, data and test probabilities (N, C) of a run; None if its maps are coarse."""
    import torch
    from data import load_as, prepare
    from evaluate import predict, probabilities
    from models import from_images, last_maps, load_run, refuse_foreign
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, facts = load_run(folder)
    data = load_as(facts["config"], facts["size"], ("val", "test"), facts["config"]["cache"])
    refuse_foreign(folder, facts, data)
    if (maps := last_maps(model.to(device), prepare(data.test.images[:1], device))[1]) < 7:
        return print(f"{folder} is not drawn. Maps of {maps} x {maps} are coarse: raise its --size")
    logits = predict(model, from_images(data.test.images, device), len(data.test.ids), device)
    return model, data, probabilities(logits, data.multilabel).numpy()

def judge(labels, p):
    """Return the class whose heat is drawn (N,), each run's calls (R, N) and their probabilities.
    p: (R, N, C). labels: (N,), or (N, C) findings. A call of C + k means "no finding k"."""
    if labels.ndim == 1:
        return labels, p.argmax(2), p.max(2)
    targets = np.where((labels == 1).any(1), (labels == 1).argmax(1), -1)  # the first that it shows
    p = p[:, np.arange(len(targets)), targets]
    return targets, targets + labels.shape[1] * (p <= 0.5), np.maximum(p, 1 - p)

def choose(targets, calls, sure, patients, only_mistakes=False):
    """Return the rows to draw, one per patient: up to 3 mistakes, the most confident on top, then
    images that all runs call correctly, of each class in turn. Or else up to 12 mistakes."""
    missed = (calls != targets).any(0).tolist()
    confidence = np.where(missed, (sure * (calls != targets)).max(0), sure.mean(0))
    surest = {}  # of each patient one mistake and one image that is called correctly
    for i in np.argsort(-confidence, kind="stable").tolist():
        if targets[i] >= 0:
            surest.setdefault((missed[i], patients[i]), i)
    mistakes = [i for i in surest.values() if missed[i]][: 12 if only_mistakes else 3]
    taken = {patients[i] for i in mistakes}
    right = [i for (miss, patient), i in surest.items() if not miss and patient not in taken]
    by_class = [[i for i in right if targets[i] == k] for k in np.unique(targets)]
    in_turn = [i for turn in zip_longest(*by_class) for i in turn if i is not None]
    return mistakes if only_mistakes else (mistakes + in_turn)[:6]

def roc(folders):
    """Draw ROC curves of several runs, and how well their probabilities match what is found."""
    from data import UserError, explain, read_csv
    left, right = (fig := Figure((8.75, 4.6))).subplots(1, 2)
    for folder in folders:
        path = Path(folder, "predictions.csv")
        with explain(f"{path} is missing or damaged. Run evaluate.py on {folder} first"):
            rows = [row for row in read_csv(path) if row.get("split", "test") == "test"]
            classes = [k for k in rows[0] if k not in ("image", "patient", "label", "split")]
            if len(classes) != 2:  # several findings also have several columns "label ..."
                raise UserError(f"roc expects two classes, but {path} has others")
            values = [[float(row[k]) for k in ("label", *classes)] for row in rows]
        truth, q, p = np.array(values).T  # q: the probability of class 0
        odds = (np.log(p.clip(1e-320)) - np.log(q.clip(1e-320))).round(10)  # ties as evaluate.py's
        place = np.unique(-odds, return_inverse=True)[1]  # 0 for the image most surely positive
        found = np.append(0, np.bincount(place, truth).cumsum()) / truth.sum()
        alarms = np.append(0, np.bincount(place, 1 - truth).cumsum()) / (1 - truth).sum()
        auc = (np.diff(alarms) * (found[1:] + found[:-1]) / 2).sum()  # ties count half
        left.plot(alarms, found, label=f"{Path(folder).name}, AUC {100 * auc:.1f} %")
        bins = np.unique((15 * p).astype(int).clip(max=14), return_inverse=True)[1]  # none empty
        told, share = (np.bincount(bins, values) / np.bincount(bins) for values in (p, truth))
        right.plot(told, share, "o-", markersize=4)
    left.set(title="ROC curve", xlabel="1 - specificity", ylabel="sensitivity")
    right.set(title="reliability", xlabel="mean probability", ylabel=f"share of {classes[1]}")
    for ax in (left, right):
        ax.plot([0, 1], [0, 1], ":", color="0.6")
    left.legend(loc="lower right", fontsize="small")
    return fig

if __name__ == "__main__":
    try:
        match sys.argv[1:]:
            case ["curves" | "roc" as kind, out, *folders] if folders:
                fig = {"curves": curves, "roc": roc}[kind](folders)
            case ["cams" | "mistakes" as kind, out, *folders] if folders:
                fig = cams(folders, only_mistakes=kind == "mistakes")
            case ["table" | "labels" as kind, source, out] if not out.endswith(".json"):
                fig = {"table": table, "labels": labels}[kind](json.loads(Path(source).read_text()))
            case ["costs", *sources, out] if sources and not out.endswith(".json"):
                fig = costs(*(json.loads(Path(source).read_text()) for source in sources))
            case _:
                sys.exit(__doc__)
        if fig:
            format = "png" if out.endswith(".png") else "svg"
            fig.savefig(out, format=format, metadata={"Date": None, "Creator": None})
    except (OSError, getattr(sys.modules.get("data"), "UserError", OSError)) as error:
        sys.exit(str(error))  # a mistake of the user
