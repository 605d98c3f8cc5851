r"""
Missing pixels
==============

*Some of my pixels are dead, saturated or covered. Do I have to fill them first?* No: leave them out of the data. The
answer has values there too, from what the blur has carried into the pixels around.
"""

# %%
# A twelfth of the pixels is dead, and a bar covers some more. They hold NaN, and nothing reads them.

import matplotlib.pyplot as plt
import skimage
import torch

import lsconv

scene = torch.from_numpy(skimage.data.camera()).double()[None] / 255
scene = torch.nn.functional.avg_pool2d(scene, 4)[:, :100, 20:120]
psf = torch.ones(5, 5, dtype=torch.float64) / 25
A = lsconv.blur_operator(psf, (96, 96))
y = A(scene) + 0.005 * torch.randn(A.out_shape, dtype=torch.float64)
measured = torch.rand(A.out_shape) > 1 / 12
measured[:, 50:54] = False
y = torch.where(measured, y, torch.nan)

# %%
# ``observed=`` takes the missing rows out of the problem. What stands there is not read, so NaN does no harm; neither
# the residual nor a rule for damp counts them.

solution = lsconv.tikhonov(A, y, 0.05, L=lsconv.Gradient(A.in_shape), observed=measured)
print(solution)

# %%
# :func:`lsconv.deconvolve` takes NaN for missing pixels by itself, and says so.

import warnings

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    restored = lsconv.deconvolve(y[0], psf, damp=0.05)
print(caught[0].message)

# %%
# Filling the holes first, here with the mean, puts an error into the data that the deconvolution amplifies.

filled = torch.where(measured, y, torch.nanmean(y))
wrong = lsconv.deconvolve(filled[0], psf, damp=0.05)

# sphinx_gallery_thumbnail_number = 1
figure, axes = plt.subplots(2, 2, figsize=(6.4, 6.8))
images = {"scene": scene[0, 2:-2, 2:-2], "measured": y[0], "filled, then restored": wrong.x, "left out": restored.x}
for ax, (title, image) in zip(axes.flat, images.items(), strict=True):
    ax.imshow(image, vmin=0, vmax=1)
    ax.set(title=title, xticks=[], yticks=[])
    if title not in ("scene", "measured"):
        error = (image - images["scene"]).square().mean().sqrt()
        ax.set_xlabel(f"rms error {error:.3f}")
