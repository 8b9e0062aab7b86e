"""Draw figures/labels.svg from results/labels.json: what AlexNet reaches with so many labels a
class, alone and with a teacher's answers to all images.

    python figures/labels.py

A point is the mean over seeds, its bar the 95 % interval of that mean by Student's t. Both lines
are judged on the same patients: drawn anew, these would move both together.
"""

import json
import sys
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from evaluate import svg_line, svg_text, write_svg  # noqa: E402

T_QUANTILE = {3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 %, by the number of seeds
LABELS = ["10", "30", "100", "300", "all"]
# The lines: what the runs are called (with all labels too), and how they are drawn.
ALONE = dict(few="alone", all="alexnet", words="on those labels alone", fill="#fff",
             dash='stroke-dasharray="5 3"')
TAUGHT = dict(few="taught", all="T1", words="with a teacher", dash="", fill="#000")
PANELS = [("auc", "validation"), ("auc", "test"), ("accuracy", "validation"), ("accuracy", "test")]
LOWEST = {"auc": 85, "accuracy": 70}


def points(runs, line, figure, split):
    """[(mean, half of its interval), ...], one a number of labels."""
    for n in LABELS:
        name = line["all"] if n == "all" else f"{line['few']}-{n}"
        each = [100 * run[split][figure] for folder, run in runs.items()
                if Path(folder).name.startswith(f"{name}-seed")]
        yield mean(each), T_QUANTILE[len(each)] * stdev(each) / len(each) ** 0.5


def panel(runs, figure, split, left, top):
    low = LOWEST[figure]

    def y(value):
        return top + 170 * (100 - value) / (100 - low)

    shapes = [svg_text(left, top - 14, f"{figure.replace('auc', 'AUC')}, % ({split})")]
    for value in range(low, 101, 5):
        shapes += [svg_text(left - 6, y(value) + 4, value, "end"),
                   svg_line([(left, y(value)), (left + 320, y(value))], 'stroke-width="0.4"')]
    for shift, line in ((0, ALONE), (6, TAUGHT)):
        x = [left + 30 + 65 * i + shift for i in range(len(LABELS))]
        marks = list(points(runs, line, figure, split))
        middles = [(a, y(m)) for a, (m, _) in zip(x, marks, strict=True)]
        shapes.append(svg_line(middles, line["dash"]))
        for a, (m, half) in zip(x, marks, strict=True):
            shapes += [svg_line([(a, y(m - half)), (a, y(m + half))], 'stroke-width="2"'),
                       f'<circle cx="{a}" cy="{y(m):.1f}" r="4" fill="{line["fill"]}" '
                       f'stroke="#000"/>']
        if (figure, split) == PANELS[0]:
            shapes.append(svg_text(x[0] + 14, y(marks[0][0]) + 20, line["words"]))
    return shapes + [svg_text(left + 33 + 65 * i, top + 188, n, "middle")
                     for i, n in enumerate(LABELS)]


def main():
    runs = json.loads((ROOT / "results/labels.json").read_text())["runs"]
    words = "labels a class (all: 1,207 normal, 3,486 with pneumonia)"
    shapes = [svg_text(420, 500, words, "middle")]
    for i, (figure, split) in enumerate(PANELS):
        shapes += panel(runs, figure, split, 55 + 410 * (i % 2), 40 + 235 * (i // 2))
    write_svg(ROOT / "figures/labels.svg", 515, shapes)


if __name__ == "__main__":
    main()
