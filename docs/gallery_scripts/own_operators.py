r"""
Operators of your own
=====================

*My problem is not quite a convolution.* Compose what there is; make an operator of a function; or write a class. Every
solver takes all of them.
"""

# %%
# **Compose.** Operators multiply, add and stack. Here a scene that is lit unevenly, blurred, and cropped.

import matplotlib.pyplot as plt
import skimage
import torch

import lsconv

scene = torch.from_numpy(skimage.data.coins()).double()[None, :300, :380] / 255
scene = torch.nn.functional.avg_pool2d(scene, 4)  # 75×95
light = 0.3 + 0.7 * torch.linspace(1, 0, 95, dtype=torch.float64).expand_as(scene)
blur = lsconv.Conv2d(torch.ones(1, 1, 5, 5, dtype=torch.float64) / 25, in_size=(75, 95))
A = lsconv.Crop(blur.out_shape, start=(4, 4), size=(60, 80)) @ blur @ lsconv.Diagonal(light)
y = A(scene) + 0.003 * torch.randn(A.out_shape, dtype=torch.float64)
solution = lsconv.tikhonov(A, y, 0.03, L=lsconv.Gradient(A.in_shape))
print(A, solution, sep="\n")

# %%
# **A function of torch.** :func:`lsconv.as_operator` takes any linear function or module, and finds its adjoint by
# autograd; it checks that the function is linear, and says what to do where it is not.


def rotate_and_average(x: torch.Tensor) -> torch.Tensor:
    """The mean of an image and the image turned by 20 degrees."""
    angle = torch.tensor(20 * torch.pi / 180)
    turn = torch.tensor([[angle.cos(), -angle.sin(), 0], [angle.sin(), angle.cos(), 0]], dtype=x.dtype)
    grid = torch.nn.functional.affine_grid(turn.expand(len(x), 2, 3), list(x.shape), align_corners=False)
    return (x + torch.nn.functional.grid_sample(x, grid, align_corners=False)) / 2


B = lsconv.as_operator(rotate_and_average, scene.shape, dtype=torch.float64)
double = B(scene) + 0.002 * torch.randn(B.out_shape, dtype=torch.float64)
apart = lsconv.lstsq(B, double, damp=0.02)
print(B, apart, sep="\n")

try:
    lsconv.as_operator(lambda x: x + 1, (4,))
except lsconv.ArgumentError as error:
    print("refused:", error)

# %%
# **A class.** ``apply`` and ``adjoint`` are all that a subclass of :class:`lsconv.LinearOperator` needs; tensors that
# it holds are its parameters, and gradients of a solve reach them. ``dot_test`` tells whether the adjoint is one.


class Echo(lsconv.LinearOperator):
    """A signal and its echo: ``y[t] = x[t] + strength * x[t - delay]``."""

    def __init__(self, length: int, delay: int, strength: torch.Tensor) -> None:
        super().__init__((length,), (length,), dtype=strength.dtype, device=strength.device)
        self.delay, self.strength = delay, strength

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """The signal with its echo."""
        return x + self.strength * torch.nn.functional.pad(x, (self.delay, 0))[..., : -self.delay]

    def adjoint(self, y: torch.Tensor) -> torch.Tensor:
        """The echo undone in time."""
        return y + self.strength * torch.nn.functional.pad(y, (0, self.delay))[..., self.delay :]


strength = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
echo = Echo(200, 15, strength)
print(f"dot test {echo.dot_test():.1e}")
signal = torch.sin(torch.arange(200, dtype=torch.float64) / 7) ** 3
x = lsconv.lstsq(echo, echo(signal).detach(), damp=0.1).x
(x - signal).square().sum().backward()
print(
    f"error {float((x - signal).detach().norm() / signal.norm()):.3f}, d error / d strength {float(strength.grad):.3f}"
)

# %%

# sphinx_gallery_thumbnail_number = 1
figure, axes = plt.subplots(2, 2, figsize=(6.4, 5.2))
images = {"lit, blurred, cropped": y, "restored": solution.x, "two in one": double, "apart": apart.x}
for ax, (title, image) in zip(axes.flat, images.items(), strict=True):
    ax.imshow(image[0], vmin=0, vmax=0.9)
    ax.set(title=title, xticks=[], yticks=[])
