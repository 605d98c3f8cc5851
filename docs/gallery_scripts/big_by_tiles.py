r"""
A big image by tiles
====================

*An image does not fit in memory: is it enough to restore it tile by tile and to blend the seams?* The inverse of a blur
reaches as far as its damping is small. Where it reaches beyond the overlap the tiles are wrong, seams or not, and no
tile can tell. :class:`lsconv.tiled.Plan` takes the tiles as a preconditioner of the whole problem, and gives the answer
of the whole with the certificate of the whole.
"""

# %%
# A photograph under a box of 9×9 pixels, as of pixels that are binned, with little noise. It would fit in memory, so
# that there is a reference.

import skimage
import torch

import lsconv

torch.manual_seed(0)
scene = torch.from_numpy(skimage.data.camera()).double()[60:340, 80:360] / 255
psf = torch.full((9, 9), 1 / 81, dtype=torch.float64)
A = lsconv.Conv2d(psf[None, None], scene.shape)
blurred = A(scene[None]) + 0.001 * torch.randn(A.out_shape, dtype=torch.float64)
damp = 0.01
whole = lsconv.lstsq(A, blurred, damp=damp).x[0]

# %%
# Tiles of 93 pixels, each with 24 more on every side of which it keeps nothing: this is the first pass of a plan, and
# what most programs do. Then the same tiles as a preconditioner, until the certificate of the whole holds.

import warnings

plan = lsconv.tiled.Plan(psf, scene.shape, damp=damp, tile=93, overlap=24)
print(plan)

with warnings.catch_warnings():
    warnings.simplefilter("ignore", lsconv.ConvergenceWarning)
    one_pass = plan.solve(blurred[0], max_iter=0)
solution = plan.solve(blurred[0])
print(one_pass)
print(solution)

# %%
# The error of the pass is as large as the noise that the damping lets through, and has the shape of the tiles.

import matplotlib.pyplot as plt

# sphinx_gallery_thumbnail_number = 1
figure, axes = plt.subplots(1, 3, figsize=(9, 3.4))
axes[0].imshow(solution.x, cmap="gray", vmin=0, vmax=1)
axes[0].set_title("restored")
for axis, name, answer in zip(axes[1:], ("tiles alone", "tiles, iterated"), (one_pass, solution), strict=True):
    error = (answer.x - whole).abs()
    picture = axis.imshow(error.clamp_min(1e-12).log10(), cmap="magma", vmin=-12, vmax=0)
    axis.set_title(f"{name}: off by {float((answer.x - whole).norm() / whole.norm()):.0e}")
figure.colorbar(picture, ax=axes[1:], label="log10 of the error", shrink=0.8)
for axis in axes:
    axis.set(xticks=[], yticks=[])

# %%
# Nothing in the one-pass picture tells that it is wrong; its certificate does. How far tiles have to overlap is read
# off the inverse's kernel, which a plan does by itself (``overlap="auto"``): a wide Gaussian is easy, a box at small
# damping is not, and then one border solve of the whole is taken where that fits.

for name, kernel in (("Gaussian", lsconv.psf.gaussian(2.0).double()), ("box", psf)):
    for d in (0.1, 0.01):
        chosen = lsconv.tiled.Plan(kernel, (4096, 4096), damp=d, tile=1024)
        print(f"{name:8} damp {d:<5g} {chosen.path}: {chosen.why}")
