r"""
What a wrong boundary does
==========================

*Does it matter what the solver assumes beyond the edges?* It does, everywhere: the error of a wrong assumption does not
stay at the edges, and the smaller the damping, the further it runs into the picture.
"""

# %%
# A part of a photograph, blurred by a motion of 11 pixels. There is next to no noise, so that all that is wrong comes
# from the boundary.

import skimage
import torch

import lsconv

coffee = torch.from_numpy(skimage.data.coffee()).double().mean(-1) / 255
scene = torch.nn.functional.avg_pool2d(coffee[None], 2)[:, 40:138, 90:188]
psf = torch.zeros(11, 11, dtype=torch.float64)
psf[range(11), range(10, -1, -1)] = 1 / 11

A = lsconv.blur_operator(psf, (88, 88))  # 98 pixels of scene give 88 of picture
blurred = A(scene) + 0.001 * torch.randn(1, 88, 88, dtype=torch.float64)
truth = scene[:, 5:-5, 5:-5]

# %%
# The same damping under each assumption. "unknown", the default, estimates the part of the scene beyond the picture
# that the blur has mixed into it; the others make it up.

assumptions = ("periodic", "zero", "reflect", "unknown")
answers = {b: lsconv.deconvolve(blurred[0], psf, boundary=b, damp=0.02).x for b in assumptions}

import matplotlib.pyplot as plt

# sphinx_gallery_thumbnail_number = 1
figure, axes = plt.subplots(2, 4, figsize=(9, 4.9))
for (top, bottom), (name, x) in zip(axes.T, answers.items(), strict=True):
    error = (x - truth[0]).abs()
    top.imshow(x, vmin=0, vmax=1)
    bottom.imshow(error, vmin=0, vmax=0.2, cmap="magma")
    top.set(title=f'"{name}"', xticks=[], yticks=[])
    bottom.set(title=f"error, rms {error.square().mean().sqrt():.3f}", xticks=[], yticks=[])

# %%
# In the middle of the picture, far from every edge, the assumption still decides:

for name, x in answers.items():
    middle = (x - truth[0])[29:59, 29:59].square().mean().sqrt()
    print(f"{name:9} rms error of the middle 30×30 pixels: {middle:.4f}")
