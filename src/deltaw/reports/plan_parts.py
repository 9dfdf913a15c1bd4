"""The parts of a plan as they are shown: names, words and colors. Knows no terminal and no picture."""

from __future__ import annotations

# In the order in which they are stacked, with a color for the terminal and one for the picture (both from a
# palette that color-blind readers can tell apart).
PARTS = (
    ("weights", "the model's weights", "blue", "#0072b2"),
    ("trained", "trained parameters", "cyan", "#56b4e9"),
    ("gradients", "gradients", "yellow", "#f0e442"),
    ("optimizer", "optimizer state", "bright_red", "#d55e00"),
    ("activations", "activations kept", "green", "#009e73"),
    ("logits", "logits", "magenta", "#cc79a7"),
    ("batch", "batch", "bright_black", "#999999"),
    ("workspace", "workspace", "bright_yellow", "#e69f00"),
    ("process", "process, rows, kernels", "white", "#dddddd"),
)
