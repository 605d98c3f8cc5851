"""The padding modes of an operator, as what each one reads around an image."""

import matplotlib.pyplot as plt
import skimage
import torch

import lsconv

image = torch.from_numpy(skimage.data.astronaut()).float().mean(-1)[None] / 255
image = torch.nn.functional.avg_pool2d(image, 4)[:, :96, 20:116]
width = 32
figure, axes = plt.subplots(1, 5, figsize=(10, 2.5), constrained_layout=True)
for ax, mode in zip(axes, ("valid", "zeros", "circular", "reflect", "replicate"), strict=True):
    if mode == "valid":
        seen = torch.nn.functional.pad(image, (width,) * 4, value=torch.nan)
        ax.set_title("padding=0 (valid)")
    else:
        seen = lsconv.Pad(image.shape, (width, width), mode)(image)
        ax.set_title(f'"{mode}"')
    ax.imshow(seen[0], cmap="gray", vmin=0, vmax=1)
    ax.add_patch(plt.Rectangle((width - 0.5, width - 0.5), 96, 96, fill=False, edgecolor="C1", lw=1.5))
    ax.set(xticks=[], yticks=[])
