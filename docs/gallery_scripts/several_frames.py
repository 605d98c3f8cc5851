r"""
Several frames of one scene
===========================

*I have a few blurred pictures of the same scene. How do I use them all?* Stack their operators: :func:`lsconv.vstack`
gives ``[A1; A2; ...]``, and every function takes it.
"""

# %%
# Three frames shaken in different directions. Each blur destroys some frequencies; together they destroy none.

import skimage
import torch

import lsconv

scene = torch.from_numpy(skimage.data.camera()).double()[None] / 255
scene = torch.nn.functional.avg_pool2d(scene, 4)[:, 10:90, 30:110]
length = 9
blurs = []
for direction in ("across", "down", "diagonal"):
    psf = torch.zeros(length, length, dtype=torch.float64)
    middle, along = [length // 2] * length, list(range(length))
    psf[{"across": (middle, along), "down": (along, middle), "diagonal": (along, along)}[direction]] = 1 / length
    blurs.append(lsconv.blur_operator(psf, (72, 72)))

frames = [A(scene) + 0.01 * torch.randn(A.out_shape, dtype=torch.float64) for A in blurs]

# %%
# One frame alone, then all of them, with a damping that suits the noise.

together = lsconv.vstack(blurs)
L = lsconv.Gradient(scene.shape)
alone = lsconv.tikhonov(blurs[0], frames[0], 0.1, L=L)
joint = lsconv.tikhonov(together, torch.cat(frames), 0.1, L=L)
print(together)
print(joint)

# %%

import matplotlib.pyplot as plt

# sphinx_gallery_thumbnail_number = 1
figure, axes = plt.subplots(2, 3, figsize=(7.5, 5.4))
images = {f"frame {number}": frame for number, frame in enumerate(frames, start=1)}
images |= {"scene": scene, "from frame 1": alone.x, "from all": joint.x}
for ax, (title, image) in zip(axes.flat, images.items(), strict=True):
    if title.startswith("from"):
        title += f"\nrms error {(image - scene).square().mean().sqrt():.3f}"
    ax.imshow(image[0], vmin=0, vmax=1)
    ax.set(title=title, xticks=[], yticks=[])
