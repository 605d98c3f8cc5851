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

# %%
# A camera's own faults
# ---------------------
# A dead column, a hot cluster, and a lamp that the camera shows at 255 and no more. As it is, the deconvolution takes
# the three for light. Inpainted first, the column and the cluster are gone, but the lamp is a guess, and the light that
# the blur has spread around it becomes rings. lsconv leaves the dead and the hot pixels out, and takes a saturated one
# as a lower bound. The errors do not count the saturated pixels.

import numpy as np

psf = lsconv.psf.gaussian(2.0)
A = lsconv.blur_operator(psf.double(), (160, 160))
margin = (A.in_shape[-1] - 160) // 2
photograph = skimage.data.camera().astype(np.float64)[60 : 60 + A.in_shape[1], 150 : 150 + A.in_shape[2]]
photograph[margin + 26 : margin + 36, margin + 120 : margin + 130] = 500  # the lamp
light = A(torch.from_numpy(photograph)[None])[0].numpy()
image = np.clip(np.rint(light + np.random.default_rng(0).normal(0, 1, light.shape)), 0, 255)

bad = np.zeros(image.shape, dtype=bool)
bad[:, 40] = bad[100:104, 110:115] = True
image[:, 40], image[100:104, 110:115] = 0, 255
saturated = (image >= 255) & ~bad

naive = lsconv.deconvolve(image, psf, damp=0.03)
inpainted = skimage.restoration.inpaint_biharmonic(image, bad | saturated)
guessed = lsconv.deconvolve(inpainted, psf, damp=0.03)
right = lsconv.deconvolve(image, psf, damp=0.03, observed=~bad, saturated=255, one_sided=True)
lamp = right.x[26:36, 120:130].mean()
print(f"the lamp: truly 500, inpainted {guessed.x[26:36, 120:130].mean():.0f}, by lsconv {lamp:.0f}")

figure, axes = plt.subplots(2, 2, figsize=(6.4, 6.8))
images = {"photograph": image, "naive": naive.x, "inpainted, then restored": guessed.x, "lsconv": right.x}
inside = photograph[margin : margin + 160, margin : margin + 160]
around = np.zeros(image.shape, dtype=bool)
around[14:48, 108:142] = True
for ax, (title, shown) in zip(axes.flat, images.items(), strict=True):
    ax.imshow(shown, vmin=0, vmax=255)
    error, near = (np.sqrt(np.mean((shown - inside)[there & ~saturated] ** 2)) for there in (around | True, around))
    ax.set(title=title, xticks=[], yticks=[], xlabel=f"rms error {error:.1f}, around the lamp {near:.1f}")
