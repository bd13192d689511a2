"""Draws the pictures of these pages: python docs/make_pictures.py"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Rectangle

from bmsn_zoo import Layout, SearchSpace
from bmsn_zoo.assignment import assign

HERE = Path(__file__).parent / "pictures"
COLORS = ["#3b6ea8", "#d08c2b", "#3f8f5b", "#a8475f"]
plt.rcParams.update({"svg.hashsalt": "bmsn_zoo", "svg.fonttype": "none", "font.size": 9})


def save(figure: plt.Figure, name: str) -> None:
    figure.savefig(HERE / f"{name}.svg", bbox_inches="tight", metadata={"Date": None}, facecolor="white")
    plt.close(figure)


def layouts() -> None:
    """Each unit a box as high as its feature map."""
    space = SearchSpace("bmsn_resnet20")
    figure, rows = plt.subplots(1, 3, figsize=(8, 1.8), sharey=True)
    for axis, text in zip(rows, ("2-4-4", "4-3-3", "6-2-2"), strict=True):
        layout = Layout.parse(text)
        sides = layout.resolutions(32)
        for unit, side in enumerate(sides):
            color = COLORS[sorted(set(sides), reverse=True).index(side)]
            axis.add_patch(Rectangle((unit + 0.1, (32 - side) / 2), 0.8, side, color=color))
        axis.set(xlim=(0, 10), ylim=(-1, 33), yticks=[], xticks=[])
        axis.set_title(f"{text}: {space.macs(layout, 32) / 1e6:.1f} M", fontsize=9)
        axis.set_frame_on(False)
    save(figure, "layouts")


def assignment() -> None:
    """Scores of four groups of layouts, each a little better under a supernet of its own."""
    space = SearchSpace("bmsn_resnet20")
    generator = torch.Generator().manual_seed(0)
    group = torch.tensor([layout.units_per_scale[0] for layout in space]).float()
    centres = torch.tensor([1.5, 2.5, 4.0, 6.0])
    scores = 0.7 - 0.01 * (group[:, None] - centres).abs() + 0.004 * torch.randn(36, 4, generator=generator)
    scores[:, 3] += 0.02  # ahead everywhere; balance takes that away
    figure, axes = plt.subplots(1, 3, figsize=(8, 3.4), sharey=True)
    for axis, sharpness in zip(axes, (1, 50, 300), strict=True):
        rows = assign(scores.clamp(0, 1), sharpness)
        axis.imshow(rows, aspect="auto", vmin=0, vmax=1, cmap="Blues")
        axis.set(title=f"sharpness {sharpness}", xlabel="supernet", xticks=range(4))
    axes[0].set(ylabel="layout", yticks=range(0, 36, 5), yticklabels=[str(space[i]) for i in range(0, 36, 5)])
    save(figure, "assignment")


def tree() -> None:
    """A line is one run of a unit; layouts share it until one of them downsamples."""
    space = SearchSpace("bmsn_resnet20")
    figure, axis = plt.subplots(figsize=(8, 4.2))
    place = {layout: index for index, layout in enumerate(space)}

    def draw(unit: int, members: list[Layout], level: int) -> float:
        height = sum(place[layout] for layout in members) / len(members)
        if unit == 10:
            axis.text(10.1, height, str(members[0]), va="center", fontsize=6)
            return height
        for flag in (1, 0):
            below = [layout for layout in members if layout.flags[unit] == flag]
            if below:
                end = draw(unit + 1, below, level + flag)
                axis.plot([unit, unit + 1], [height, end], color=COLORS[level + flag], linewidth=1.2 - 0.25 * level)
        return height

    draw(0, list(space), 0)
    axis.invert_yaxis()
    axis.set(xlabel="unit", xticks=range(11), yticks=[], xlim=(0, 11))
    for level, label in enumerate(("full resolution", "half", "a quarter")):
        axis.plot([], [], color=COLORS[level], label=label)
    axis.legend(loc="lower left", frameon=False)
    axis.set_frame_on(False)
    save(figure, "tree")


if __name__ == "__main__":
    layouts()
    assignment()
    tree()
