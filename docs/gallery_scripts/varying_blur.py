r"""
Varying blur
============

*My lens is sharp in the middle and soft in the corners. Must I cut the image into tiles?* No: give the PSFs that you
measured and where, and the whole image is restored at once. There are tiles inside, but only to speed up the iteration:
the answer, and its certificate, are those of the whole problem.
"""

# %%
# Nine PSFs, measured at nine points of the image, which grow towards the corners. Between them the PSF is linear.

import matplotlib.pyplot as plt
import skimage
import torch

import lsconv

torch.manual_seed(0)
scene = torch.from_numpy(skimage.data.camera()).double()[None] / 255
scene = torch.nn.functional.avg_pool2d(scene, 4)[:, :106, 20:126]
places = torch.arange(11, dtype=torch.float64) - 5
points = torch.cartesian_prod(*[torch.tensor([8.0, 48.0, 88.0], dtype=torch.float64)] * 2)


def gaussian(sigma):
    """A Gaussian of this width, of sum one."""
    profile = torch.exp(-0.5 * (places / sigma) ** 2)
    return profile[:, None] * profile / profile.sum() ** 2


distance = torch.linalg.vector_norm(points - 48, dim=1)
psfs = torch.stack([gaussian(0.7 + 1.3 * float(d) / float(distance.max())) for d in distance])
A = lsconv.blur_operator(psfs, (96, 96), positions=points)
print(A)
y = A(scene) + 0.003 * torch.randn(A.out_shape, dtype=torch.float64)

# %%
# The operator is one like any other: :func:`lsconv.lstsq`, :func:`lsconv.tikhonov` and
# :func:`lsconv.total_variation` take it.

solution = lsconv.tikhonov(A, y, 0.02, L=lsconv.Gradient(A.in_shape))
print(solution)
print(lsconv.explain(A, 1e-3))

# %%
# For an image :func:`lsconv.deconvolve` takes the positions beside the PSFs. Beside it what the PSF of the middle makes
# of the whole image, and the mean PSF.

images = {
    "blurred": y[0],
    "PSF of the middle": lsconv.deconvolve(y[0], psfs[4], damp=0.02).x,
    "mean PSF": lsconv.deconvolve(y[0], psfs.mean(0), damp=0.02).x,
    "PSFs that vary": lsconv.deconvolve(y[0], psfs, psf_positions=points, damp=0.02).x,
}

# sphinx_gallery_thumbnail_number = 1
figure, axes = plt.subplots(2, 2, figsize=(6.4, 6.8))
for ax, (title, image) in zip(axes.flat, images.items(), strict=True):
    error = (image - scene[0, 5:-5, 5:-5]).square().mean().sqrt()
    ax.imshow(image, vmin=0, vmax=1, cmap="gray")
    ax.set(title=title, xlabel=f"rms error {error:.3f}", xticks=[], yticks=[])
figure.tight_layout()

# %%
# On the command line the same is ``lsconv deblur image.png --psf-grid psfs.npz -o restored.png``, with ``kernels`` and
# ``positions`` in the file; or a folder of pictures with their positions in ``positions.csv``.
