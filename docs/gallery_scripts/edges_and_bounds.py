r"""
Edges and bounds
================

*My scene has sharp edges, and no negative light. Can the solver know?* Total variation favours few, sharp edges;
``bounds=`` keeps every pixel where it can be.
"""

# %%
# A phantom with flat regions, blurred and noisy.

import matplotlib.pyplot as plt
import skimage
import torch

import lsconv

phantom = torch.from_numpy(skimage.data.shepp_logan_phantom()).float()[None]
scene = torch.nn.functional.avg_pool2d(phantom, 5)  # 80×80
axis = torch.arange(-4.0, 5.0)
psf = torch.exp(-(axis[:, None] ** 2 + axis**2) / (2 * 1.3**2))
psf /= psf.sum()
A = lsconv.blur_operator(psf, (72, 72))
y = A(scene) + 0.01 * torch.randn(A.out_shape)
L = lsconv.Gradient(A.in_shape)

# %%
# The quadratic penalty is fast, differentiable, and rings at edges. With bounds it is a quadratic programme, with total
# variation a convex one; each answer carries the certificate of its own problem.

answers = {
    "gradient": lsconv.tikhonov(A, y, 0.03, L=L),
    "gradient, 0 ≤ x ≤ 1": lsconv.tikhonov(A, y, 0.03, L=L, bounds=(0, 1)),
    "total variation": lsconv.total_variation(A, y, 1e-3),
    "total variation, 0 ≤ x ≤ 1": lsconv.total_variation(A, y, 1e-3, bounds=(0, 1)),
}
for name, solution in answers.items():
    error = (solution.x - scene)[:, 4:-4, 4:-4].square().mean().sqrt()
    print(f"{name:27} rms error {error:.4f}  lowest {float(solution.x.min()):+.3f}  {solution.status}")

# %%

# sphinx_gallery_thumbnail_number = 1
figure, axes = plt.subplots(2, 2, figsize=(6.4, 6.8))
images = {"scene": scene[:, 4:-4, 4:-4], "blurred": y}
images |= {
    name: s.x[:, 4:-4, 4:-4] for name, s in answers.items() if name in ("gradient", "total variation, 0 ≤ x ≤ 1")
}
for ax, (title, image) in zip(axes.flat, images.items(), strict=True):
    ax.imshow(image[0], vmin=-0.05, vmax=0.5)
    ax.set(title=title.replace(", ", ",\n"), xticks=[], yticks=[])
