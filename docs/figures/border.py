"""The border of a periodic grid, for convolutions of an image with a kernel of 5×5 under three paddings."""

import matplotlib.pyplot as plt
from matplotlib.patches import Patch, Rectangle

# of each the size of the image, the size of the grid, how many cells of it are no border, and what the border lacks
cases = {
    "no padding": (24, 24, 20, "outputs"),
    "padding 4": (20, 24, 20, "inputs"),
    'padding 2, "same"': (20, 22, 20, "inputs or outputs"),
}
figure, axes = plt.subplots(1, 3, figsize=(9, 3.9), constrained_layout=True)
for ax, (title, (size, grid, inside, lacks)) in zip(axes, cases.items(), strict=True):
    width = grid - inside
    ax.add_patch(Rectangle((0, 0), inside, inside, color="0.85"))
    ax.add_patch(Rectangle((0, inside), grid, width, color="C1", alpha=0.8))
    ax.add_patch(Rectangle((inside, 0), width, inside, color="C0", alpha=0.8))
    for cell in range(grid + 1):
        ax.plot([cell, cell], [0, grid], color="w", lw=0.6)
        ax.plot([0, grid], [cell, cell], color="w", lw=0.6)
    ax.text(inside / 2, inside / 2, f"image {size}×{size}\ngrid {grid}×{grid}", ha="center", va="center")
    ax.set(xlim=(0, 24), ylim=(24, 0), aspect="equal", xticks=[], yticks=[], title=title)
    ax.set_xlabel(f"border: cells that are no {lacks}", fontsize=9)
    ax.spines[:].set_visible(False)
legend = {"C1": "H, the rows", "C0": "V', what is left of the columns"}
figure.legend(
    handles=[Patch(color=color, alpha=0.8, label=label) for color, label in legend.items()],
    loc="outside lower center",
    ncols=2,
)
