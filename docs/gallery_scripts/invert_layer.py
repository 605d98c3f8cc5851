r"""
Invert a layer of a network
===========================

*What input would have given this activation?* A convolution layer is an operator;
:meth:`lsconv.Conv2d.from_module <lsconv.Convolution.from_module>` reads it off the module, with its stride, padding,
padding mode, dilation and groups; transposed layers too.
"""

# %%
# Two layers with weights made here: one that keeps more numbers than it gets, and so loses nothing, and one with a
# stride, which does.

import matplotlib.pyplot as plt
import skimage
import torch

import lsconv

image = torch.from_numpy(skimage.data.astronaut()).permute(2, 0, 1).float() / 255
image = torch.nn.functional.avg_pool2d(image, 8)
wide = torch.nn.Conv2d(3, 12, 3, padding=1)
strided = torch.nn.Conv2d(3, 8, 5, stride=2, padding=2, padding_mode="reflect")

# %%
# A module computes ``A x + bias``. The modules of :mod:`lsconv.nn` take the bias off, keep their plan while the weight
# does not change, and pass gradients to it.

recovered = {}
with torch.no_grad():
    for name, layer in {"3 → 12, 3×3": wide, "3 → 8, 5×5, stride 2": strided}.items():
        inverse = lsconv.nn.PseudoInverse(layer, in_size=image.shape[-2:])
        recovered[name] = inverse(layer(image[None]))[0]
        again = layer(recovered[name][None]) - layer(image[None])
        print(f"{name:20} error of x {torch.dist(recovered[name], image) / image.norm():.1e}, of the activation "
              f"{again.norm() / layer(image[None]).norm():.1e}")  # fmt: skip

# %%
# From the strided layer comes the shortest image with the same activation: what the layer has not seen is missing.
# :class:`lsconv.nn.RangeNull` fills that part from any other image z, and leaves the activation as it is.

with torch.no_grad():
    flat = image.mean((1, 2), keepdim=True).expand_as(image)
    filled = lsconv.nn.RangeNull(strided)(strided(image[None]), flat[None])[0]

# sphinx_gallery_thumbnail_number = 1
figure, axes = plt.subplots(2, 2, figsize=(6.4, 6.8))
images = {"image": image, **recovered, "stride 2, with the mean": filled}
for ax, (title, picture) in zip(axes.flat, images.items(), strict=True):
    ax.imshow(picture.permute(1, 2, 0).clamp(0, 1))
    ax.set(title=title, xticks=[], yticks=[])

# %%
# Where there is noise, or a gradient is wanted, damp: :class:`lsconv.nn.Tikhonov`, whose damping can be learned
# (:doc:`training`). A chain of layers is no convolution; :func:`lsconv.as_operator` makes an operator of it too.

chain = torch.nn.Sequential(torch.nn.AvgPool2d(2), torch.nn.Conv2d(3, 16, 3, bias=False))
A = lsconv.as_operator(chain, image.shape)
with torch.no_grad():
    solution = lsconv.lstsq(A, A(image), damp=1e-2)
print(A)
print(solution)
