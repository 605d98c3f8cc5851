r"""
Error bars
==========

*How sure is each pixel?* With Gaussian noise and a Gaussian prior, the answer of :func:`lsconv.tikhonov` is the mean of
a posterior. Its standard deviation is :func:`lsconv.posterior_std`, and :func:`lsconv.posterior_samples` draws from it.
"""

# %%
# A signal, blurred, noisy, with a stretch that is not measured.

import matplotlib.pyplot as plt
import torch

import lsconv

n = 240
position = torch.arange(n, dtype=torch.float64)
scene = (torch.sin(position / 9) * torch.exp(-position / 150) + (position > 170) * 0.8)[None]
taps = torch.hann_window(13, periodic=False, dtype=torch.float64)
A = lsconv.Conv1d((taps / taps.sum())[None, None], in_size=n)
measured = torch.ones(A.out_shape, dtype=torch.bool)
measured[:, 100:125] = False
M = lsconv.Mask(measured) @ A
noise_std = 0.05
y = M(scene) + torch.where(measured, noise_std * torch.randn(A.out_shape, dtype=torch.float64), 0)

# %%
# The prior: neighbours differ by about 0.1. In the words of Bayes ``damp = noise_std / 0.1`` on the differences; or let
# the data say, with the rule "evidence", which is the likelihood of damp.

L = lsconv.Gradient((1, n), 1)
damp = float(lsconv.choose_damp(M, y, "evidence", L=L).damp)
print(f"damp = {damp:.3f}: neighbours differ by about {noise_std / damp:.2f}")
mean = lsconv.tikhonov(M, y, damp, L=L).x
std = lsconv.posterior_std(M, damp, noise_std=noise_std, L=L)
samples = lsconv.posterior_samples(M, y, damp, noise_std=noise_std, L=L, count=5)

# %%

# sphinx_gallery_thumbnail_number = 1
figure, ax = plt.subplots(figsize=(8, 3.4))
ax.plot(scene[0], "k", lw=1, label="scene")
ax.plot(mean[0], "C0", label="answer")
ax.fill_between(position, (mean - 2 * std)[0], (mean + 2 * std)[0], color="C0", alpha=0.25, label="± 2 std")
ax.plot(samples[:, 0].T, "C1", lw=0.5, alpha=0.8)
ax.axvspan(106, 131, color="0.9", zorder=-1)
ax.legend(ncol=3)

inside = ((scene - mean).abs() <= 2 * std).double().mean()
print(f"{100 * inside:.0f} % of the scene lies within two standard deviations")

# %%
# The bars are wide where nothing was measured and at the ends. The jump at 170 is no sample of this prior, which says
# that all differences are alike, and it is seen as such.
