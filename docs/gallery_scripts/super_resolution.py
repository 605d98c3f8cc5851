r"""
Super-resolution is a strided convolution
=========================================

*My detector averages over the scene and keeps every second pixel. Can I invert that?* Blur and subsampling together are
one convolution with a stride, and lsconv inverts those as it inverts any other.
"""

# %%
# The point spread function of the optics, 5×5, and every second pixel along each axis. A has four times as many
# unknowns as equations: without a prior the minimum-norm solution is all there is; a penalty on the gradient makes x
# smooth between the pixels.

import skimage
import torch

import lsconv

camera = torch.from_numpy(skimage.data.camera()).double() / 255
fine = torch.nn.functional.avg_pool2d(camera[None], 4)[:, 5:128, 5:128]  # 123×123
taps = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], dtype=torch.float64) / 16
K = (taps[:, None] * taps)[None, None]

A = lsconv.Conv2d(K, in_size=fine.shape[-2:], stride=2)
y = A(fine) + 0.002 * torch.randn(A.out_shape, dtype=torch.float64)
print(A)

# %%

shortest = lsconv.lstsq(A, y, damp=1e-3)
smooth = lsconv.tikhonov(A, y, 0.01, L=lsconv.Gradient(A.in_shape))
repeated = torch.nn.functional.interpolate(y[None], size=fine.shape[-2:], mode="nearest")[0]

import matplotlib.pyplot as plt

# sphinx_gallery_thumbnail_number = 1
figure, axes = plt.subplots(2, 2, figsize=(6.4, 6.8))
images = {"fine": fine, "coarse, repeated": repeated, "least norm": shortest.x, "least gradient": smooth.x}
for ax, (title, image) in zip(axes.flat, images.items(), strict=True):
    part = (0, slice(10, 80), slice(30, 100))
    error = (image - fine)[part].square().mean().sqrt()
    ax.imshow(image[part], vmin=0, vmax=1)
    ax.set(title=title if image is fine else f"{title}\nrms error {error:.3f}", xticks=[], yticks=[])

# %%
# Both answers reproduce the coarse picture; they differ in what they put between its pixels.

for name, solution in {"least norm": shortest, "least gradient": smooth}.items():
    print(f"{name}: residual {solution.residual_norm / y.norm():.1e}, converged {bool(solution.converged)}")
