"""Draw the figures of the pages. This script alone needs matplotlib: pip install matplotlib

    python figures/plots.py table results/demo.json figures/demo.svg       a file of evaluate --json
    python figures/plots.py curves figures/demo-curves.svg runs/demo/*     folders of train.py
    python figures/plots.py labels results/labels.json figures/labels.svg  a file of evaluate --json
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
from matplotlib import rcParams
from matplotlib.figure import Figure

T_975 = [0, 0, 12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]  # Student's t, by n
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
        titles = [f"{e['title']}\n{e.get('arch') or 'minus ' + e['minus']}" for e in entries]
        axes[0].set_yticks(range(len(entries)), titles)
        axes[0].set_ylim(len(entries) - 0.5, -0.7)  # the first row on top
    return fig


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
    """AUC and accuracy by the number of labels: means over seeds, 95 % intervals by Student's t."""
    runs, lines = content["runs"], {}  # lines: {who teaches: {labels of each class: [run, ...]}}
    for run in runs.values():
        args, who = run["args"], "on those labels alone"
        n = np.inf if args["labels_per_class"] is None else args["labels_per_class"]
        if args["role"] == "student" and args["alpha"] > 0:
            folders = {str(Path(t)).removesuffix("/best.pt") for t in args["teacher"]} & runs.keys()
            few = n in [runs[folder]["args"]["labels_per_class"] for folder in folders]
            who = f"with a teacher of {'the same' if few else 'all'} labels, alpha {args['alpha']}"
        if args["role"] != "teacher":
            lines.setdefault(who, {}).setdefault(n, []).append(run)
    counts = sorted(set().union(*lines.values()))
    fig = Figure((8.75, 5.8))
    for axes, column in zip(fig.subplots(2, 2, sharey="row"), ("auc", "accuracy"), strict=True):
        for ax, split in zip(axes, ("validation", "test"), strict=True):
            ax.set_title(f"{column.replace('auc', 'AUC')}, % ({split})")
            ax.set_xlabel("labels of each class")
            ax.set_xticks(range(len(counts)), ["all" if n == np.inf else n for n in counts])
            for k, (who, line) in enumerate(sorted(lines.items())):
                values = [100 * np.array([r[split][column] for r in line[n]]) for n in sorted(line)]
                bars = [T_975[len(v)] * v.std() / max(len(v) - 1, 1) ** 0.5 for v in values]
                places = [counts.index(n) + 0.1 * k for n in sorted(line)]  # bars side by side
                ax.errorbar(places, [v.mean() for v in values], bars, label=who,
                            fmt=["k--o", "k-o", "k:s", "k-.^"][k], mfc="w" if k == 0 else "k")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return fig


if __name__ == "__main__":
    try:
        match sys.argv[1:]:
            case ["curves", out, *folders] if folders:
                fig = curves(folders)
            case ["table" | "labels" as kind, source, out]:
                fig = {"table": table, "labels": labels}[kind](json.loads(Path(source).read_text()))
            case _:
                sys.exit(__doc__)
        fig.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    except OSError as error:
        sys.exit(str(error))
