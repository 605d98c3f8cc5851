r"""
A stack of images
=================

*I have a stack: slices, frames, colours.* If the blur acts within a slice, the stack is a batch. If it acts across
slices, as in a microscope, it is a volume, and the convolution has three dimensions.
"""

# %%
# A batch: the same blur in every slice. Leading dimensions are batch dimensions everywhere in lsconv; one plan serves
# them all, and every item has its own certificate and, if a rule chooses, its own damp.

import matplotlib.pyplot as plt
import torch

import lsconv

slices, size = 12, 48
depth, row, column = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in (slices, size, size)), indexing="ij")
scene = torch.zeros(slices, size, size)
for z, r, c, radius in ((-0.3, -0.3, 0.2, 0.45), (0.4, 0.35, -0.3, 0.3), (0.2, -0.5, -0.5, 0.2)):
    scene += ((depth - z) ** 2 + (row - r) ** 2 + (column - c) ** 2 < radius**2).float()

psf = torch.ones(5, 5) / 25
blurred = lsconv.blur_operator(psf, (size, size), boundary="reflect")(scene[:, None])[:, 0]
blurred = blurred + 0.02 * torch.randn(slices, size, size)
solution = lsconv.deconvolve(blurred, psf)
print(solution)
print("damp per slice:", [round(float(damp), 3) for damp in solution.damp])

# %%
# A volume: the blur is longer along the axis of the microscope. The PSF has three axes, and so the last three axes of
# the data are one volume.

axis = torch.arange(-3.0, 4.0)
psf3 = torch.exp(-(axis[:, None, None] ** 2 / 4 + axis[:, None] ** 2 + axis**2) / 1.5)
psf3 /= psf3.sum()
volume = lsconv.blur_operator(psf3, scene.shape, boundary="reflect")(scene[None])[0]
volume = volume + 0.01 * torch.randn(scene.shape)
restored = lsconv.deconvolve(volume, psf3, damp=0.05)
print(restored)

# %%
# One slice, and one cut along the axis of the microscope, where the blur was longest.

# sphinx_gallery_thumbnail_number = 1
figure, axes = plt.subplots(2, 3, figsize=(8, 4), height_ratios=(3, 1))
for (top, bottom), (title, data) in zip(
    axes.T, {"scene": scene, "blurred volume": volume, "restored": restored.x}.items(), strict=True
):
    top.imshow(data[4], vmin=0, vmax=1)
    bottom.imshow(data[:, 17], vmin=0, vmax=1, aspect="auto")
    top.set(title=title, xticks=[], yticks=[])
    bottom.set(xticks=[], yticks=[])
