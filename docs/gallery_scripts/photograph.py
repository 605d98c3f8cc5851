r"""
Deblur a photograph
===================

*I have a blurred picture and its point spread function. How do I get a sharp one?* One call: :func:`lsconv.deconvolve`.
Nothing is assumed about what lies beyond the edges of the picture, and the damping is chosen from the data.
"""

# %%
# A photograph of 512×512 pixels, taken down to 256×256, out of focus by a disk of radius 3, with noise of two grey
# levels. It is blurred from a larger scene, as a camera does it: the margin of the scene is not in the picture.

import numpy as np
import skimage

import lsconv

camera = skimage.data.camera().reshape(256, 2, 256, 2).mean((1, 3))
rows, columns = np.mgrid[-3:4, -3:4]
psf = (rows**2 + columns**2 <= 9.5).astype(float)
psf /= psf.sum()

generator = np.random.default_rng(0)
windows = np.lib.stride_tricks.sliding_window_view(camera, psf.shape)
blurred = np.einsum("ijkl,kl->ij", windows, psf[::-1, ::-1]) + 2 * generator.standard_normal((250, 250))
scene = camera[3:-3, 3:-3]

# %%
# ``deconvolve`` takes numpy arrays and tensors; the answer has the kind and the size of the picture.

solution = lsconv.deconvolve(blurred, psf)
print(solution)
print(f"damp = {float(solution.damp):.3g}, chosen by generalised cross-validation")

# %%

import matplotlib.pyplot as plt


def psnr(image: np.ndarray) -> float:
    """The peak signal-to-noise ratio in dB against the scene."""
    return float(10 * np.log10(255**2 / np.mean((image - scene) ** 2)))


# sphinx_gallery_thumbnail_number = 1
figure, axes = plt.subplots(1, 3, figsize=(9, 3.4))
for ax, (title, image) in zip(axes, {"scene": scene, "blurred": blurred, "restored": solution.x}.items(), strict=True):
    ax.imshow(image[40:190, 60:210], vmin=0, vmax=255)
    ax.set(title=title if image is scene else f"{title}, {psnr(image):.1f} dB", xticks=[], yticks=[])

# %%
# Sharper edges come from another prior, :doc:`total variation <edges_and_bounds>`; the same on the command line is
# ``lsconv deblur blurred.png --disk 3 -o restored.png``.
