r"""
The original question
=====================

*Given* ``y = conv2d(x, K)`` *with many channels and a small kernel, how do I get x back?* The well-known recipe takes a
pseudo-inverse per frequency of the FFT. That inverts a *periodic* convolution, which ``conv2d`` is not.
"""

# %%
# Sixteen channels, a random 3×3 kernel, no padding and no noise. There are more unknowns than equations (the output is
# smaller than the input), so we ask for the shortest x that reproduces y, the minimum-norm solution :math:`A^+ y`.

import time

import torch

import lsconv

channels, size = 16, 48
K = torch.randn(channels, channels, 3, 3, dtype=torch.float64) / 12
x_true = torch.randn(channels, size, size, dtype=torch.float64)
A = lsconv.Conv2d(K, in_size=(size, size))
y = A(x_true)
A


# %%
# The recipe: y is padded to the size of x, and a matrix of channels is inverted at every frequency.


def circular_pinv(y: torch.Tensor) -> torch.Tensor:
    """The pseudo-inverse of the periodic convolution, frequency by frequency."""
    padded = torch.nn.functional.pad(y, (0, 2, 0, 2))
    spectrum = torch.fft.rfft2(K, s=(size, size)).conj().movedim((0, 1), (-2, -1))
    inverse = torch.linalg.pinv(spectrum)
    x = inverse @ torch.fft.rfft2(padded).movedim(0, -1)[..., None]
    return torch.fft.irfft2(x[..., 0].movedim(-1, 0), s=(size, size))


start = time.perf_counter()
solution = lsconv.lstsq(A, y)
print(f"lsconv.lstsq: {time.perf_counter() - start:.2f} s, {solution}")

# %%
# How far is each answer from the minimum-norm solution? The part of x that y does not determine is orthogonal to it,
# so the shorter of two answers with the same residual is the better one.


def report(name: str, x: torch.Tensor) -> None:
    """Print the residual and the length of an answer."""
    residual = torch.linalg.vector_norm(A(x) - y) / torch.linalg.vector_norm(y)
    print(f"{name:14}  residual {residual:.1e}   length {torch.linalg.vector_norm(x):8.2f}")


report("circular pinv", circular_pinv(y))
report("lsconv", solution.x)
report("the true x", x_true)

# %%
# Both reproduce y, but the periodic answer is several times longer: it is *an* x, not the pseudo-inverse's. A map of
# the first channel shows where the length is.

import matplotlib.pyplot as plt

figure, axes = plt.subplots(1, 3, figsize=(8, 3))
for ax, (title, image) in zip(
    axes, {"true x": x_true[0], "lsconv": solution.x[0], "circular pinv": circular_pinv(y)[0]}.items(), strict=True
):
    ax.imshow(image, vmin=-4, vmax=4, cmap="coolwarm")
    ax.set(title=title, xticks=[], yticks=[])

# %%
# With many y and one kernel keep the set-up: :func:`lsconv.pinv` is an operator.

inverse = lsconv.pinv(A)
start = time.perf_counter()
x = inverse(A(torch.randn(4, channels, size, size, dtype=torch.float64)))
print(f"four more: {time.perf_counter() - start:.2f} s, {tuple(x.shape)}")
