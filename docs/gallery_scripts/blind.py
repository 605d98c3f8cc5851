r"""
A blur that finds itself
========================

*The lens was out of focus, but by how much?* The image tells: :func:`lsconv.estimate_psf` finds the radius for which
the blurred image is most probable, with its standard error.
"""

# %%
# A part of a photograph, out of focus, with noise. The radius is forgotten.

import matplotlib.pyplot as plt
import skimage
import torch

import lsconv

coffee = torch.from_numpy(skimage.data.coffee()).double().mean(-1) / 255
true = lsconv.psf.disk(3.4)
A = lsconv.blur_operator(true, (256, 256))
rows, columns = A.in_shape[-2:]
scene = coffee[80 : 80 + rows, 150 : 150 + columns]
image = A(scene[None])[0] + 0.005 * torch.randn(256, 256, dtype=torch.float64)

found = lsconv.estimate_psf(image, "disk")
print(found)
print(found.status.sentence)
print(f"noise {found.noise_std:.4f}, damp {found.damp:.3f}")

# %%
# The estimate has the PSF, which restores the image. A radius that is too small leaves blur, one too large rings.

from functools import partial

restore = partial(lsconv.deconvolve, image, damp=found.damp)
views = {
    "blurred": image,
    f"radius {found.parameters['radius']:.2f}, found": restore(found.psf).x,
    "radius 2.4": restore(lsconv.psf.disk(2.4)).x,
    "radius 4.4": restore(lsconv.psf.disk(4.4)).x,
}

# sphinx_gallery_thumbnail_number = 1
figure, axes = plt.subplots(1, 4, figsize=(10, 2.9), layout="constrained")
for ax, (title, view) in zip(axes, views.items(), strict=True):
    ax.imshow(view[40:200, 40:200], cmap="gray", vmin=0, vmax=0.9)
    ax.set(title=title, xticks=[], yticks=[])

# %%
# The likelihood of every radius. Its top is narrow, since the zeros of a disk's transfer function leave dark rings in
# the spectrum of the image, which nothing else explains.

figure, ax = plt.subplots(figsize=(6, 3), layout="constrained")
found.plot(ax)

# %%
# A Gaussian blur has no zeros. It is told from the image's own softness by what is known of sharp photographs alone,
# so its standard error is larger; a picture that was soft before it was blurred is taken for more blur.

blurred = lsconv.blur_operator(lsconv.psf.gaussian(1.6), (256, 256))
rows, columns = blurred.in_shape[-2:]
gaussian = blurred(coffee[None, 80 : 80 + rows, 150 : 150 + columns])[0]
print(lsconv.estimate_psf(gaussian + 0.005 * torch.randn(256, 256, dtype=torch.float64), "gaussian"))

# %%
# On the command line: ``lsconv deblur photo.png --psf auto:disk -o sharp.png``.
