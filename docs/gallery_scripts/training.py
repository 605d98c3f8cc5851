r"""
Training through the inverse
============================

*Can the inverse be a layer, with gradients?* Every linear answer of lsconv has them, by implicit differentiation: the
backward pass is one more solve, and its memory does not depend on the number of iterations.
"""

# %%
# A toy problem: a blur that we know only roughly, and pairs of sharp and blurred signals. The layer inverts its own
# convolution, damped; kernel and damping are learned together, from what the inverse makes of the blurred signals.

import matplotlib.pyplot as plt
import torch

import lsconv

true_taps = torch.tensor([0.05, 0.15, 0.4, 0.3, 0.1])
blur = lsconv.Conv1d(true_taps[None, None], in_size=64)


def pairs(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Signals with steps, and their blurred, noisy records."""
    steps = torch.randn(count, 1, 64) * (torch.rand(count, 1, 64) < 0.15)
    x = steps.cumsum(-1)
    return x, blur(x) + 0.02 * torch.randn(count, *blur.out_shape)


conv = torch.nn.Conv1d(1, 1, 5, bias=False)
with torch.no_grad():
    conv.weight.fill_(0.2)  # a box: wrong, but a blur
layer = lsconv.nn.Tikhonov(conv, damp=0.3)

# %%
# Train with :class:`lsconv.nn.Tikhonov`, not with ``PseudoInverse``: without damping the gradient grows with the
# square of the condition number.

optimizer = torch.optim.Adam(layer.parameters(), lr=0.03)
losses = []
for _ in range(150):
    x, y = pairs(32)
    loss = (layer(y) - x).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(float(loss.detach()))

print(f"loss {losses[0]:.3f} -> {sum(losses[-10:]) / 10:.3f}, damp {float(layer.damp.detach()):.3f}")
print("taps ", [round(float(t), 3) for t in conv.weight.detach().flatten()])
print("truth", [round(float(t), 3) for t in true_taps])

# %%

with torch.no_grad():
    x, y = pairs(1)
    answer = layer(y)

# sphinx_gallery_thumbnail_number = 1
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
left.semilogy(losses)
left.set(xlabel="step", ylabel="mean squared error")
right.plot(x[0, 0], "k", lw=1, label="signal")
right.plot(range(2, 62), y[0, 0], "C1", lw=1, label="record")
right.plot(answer[0, 0], "C0", label="layer")
right.legend()
