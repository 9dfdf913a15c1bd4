"""Draw `docs/sft.png` from the results of `benchmarks/sft.py --json results.json`.

python benchmarks/plot_sft.py results.json docs/sft.png  # needs deltaw[bench]
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLORS = {"deltaw auto": "#1b6e53", "deltaw int8": "#12503c", "deltaw auto, sharing off": "#7fb8a4"}
PEER = "#b9b9c3"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("results", type=Path)
    arguments.add_argument("picture", type=Path)
    arguments.add_argument("--data", default="sarcasm", help="name of the rows to plot")
    args = arguments.parse_args()
    results = json.loads(args.results.read_text())[args.data]
    sizes = sorted({int(key.partition("|")[0]) for key in results})
    sides = list(dict.fromkeys(key.partition("|")[2] for key in results))

    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.4), sharey=True)
    panels = [
        (axes[0], "rows_per_second", 1, "rows per second (more is better)", "{:.1f}"),
        (axes[1], "peak_bytes", 1e9, "peak memory, GB (less is better)", "{:.2f}"),
    ]
    height = 0.8 / len(sizes)
    for axis, key, unit, title, label in panels:
        for side_index, side in enumerate(reversed(sides)):
            for size_index, size in enumerate(reversed(sizes)):
                value = statistics.median(run[key] for run in results[f"{size}|{side}"]) / unit
                position = side_index + (size_index - (len(sizes) - 1) / 2) * height
                axis.barh(position, value, height * 0.92, color=COLORS.get(side, PEER))
                axis.text(value, position, f" {label.format(value)}  ({size})", va="center", fontsize=7.5)
        axis.set_title(title, fontsize=9.5, loc="left")
        axis.set_yticks(range(len(sides)), list(reversed(sides)), fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.22)
    figure.text(0.01, 0.01, "in brackets: rows per optimizer step", fontsize=7.5, color="#555555")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(args.picture, dpi=130)


if __name__ == "__main__":
    main()
