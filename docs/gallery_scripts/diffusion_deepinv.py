r"""
Diffusion and plug-and-play with deepinv
========================================

*I work in deepinv. What do I change?* The physics. :class:`lsconv.deepinv.Blur` and
:class:`lsconv.deepinv.SuperResolution` take the place of deepinv's, with a ``prox_l2`` and an ``A_dagger`` that are
exact for every boundary and every gamma, so that samplers that rest on them do what their papers say.
"""

# %%
# The proximal step of deepinv's blur is fifty steps of conjugate gradients; at the large gamma of low noise they do not
# arrive. Here is the step of both, judged by the gradient of its own objective,
# :math:`A^H(Ap - y) + (p - z)/\gamma`.

import deepinv
import skimage
import torch

import lsconv.deepinv

image = torch.from_numpy(skimage.data.astronaut()).permute(2, 0, 1)[None].double() / 255
x = torch.nn.functional.avg_pool2d(image, 4)  # 3×128×128
axis = torch.arange(-6.0, 7.0, dtype=torch.float64)
psf = torch.exp(-(axis[:, None] ** 2 + axis**2) / (2 * 1.5**2))[None, None]
psf /= psf.sum()
ours = lsconv.deepinv.Blur(psf, padding="valid")
theirs = deepinv.physics.Blur(filter=psf, padding="valid")
y = ours.A(x)
z = torch.full_like(x, 0.5)

for gamma in (1e1, 1e3, 1e5):
    for name, physics in {"deepinv": theirs, "lsconv": ours}.items():
        p = physics.prox_l2(z, y, gamma)
        gradient = ours.A_adjoint(ours.A(p) - y) + (p - z) / gamma
        print(f"gamma {gamma:.0e}  {name:8} gradient {gradient.norm() / ours.A_adjoint(y).norm():.1e}")

# %%
# DDNM (Wang, Yu and Zhang 2023) puts into a sampler's estimate z the part that the data determine,
# :math:`z + A^+(y - Az)`. With an exact pseudo-inverse one step reproduces the data.

sr = lsconv.deepinv.SuperResolution(psf, factor=2, padding="circular")
low = sr.A(x)
estimate = torch.nn.functional.interpolate(low, scale_factor=2, mode="bilinear")
corrected = estimate + sr.A_dagger(low - sr.A(estimate))
for name, value in {"estimate": estimate, "corrected": corrected}.items():
    misfit = (sr.A(value) - low).norm() / low.norm()
    print(f"{name:10} misfit {misfit:.1e}, error {(value - x).square().mean().sqrt():.4f}")

# %%
# With noise the correction is damped: the guidance of ΠGDM (Song et al. 2023) is
# :math:`A^H(r^2 AA^H + \sigma^2)^{-1}(y - Ax_0)`, by name. And the steps are the ones that deepinv's own algorithms
# call: plug-and-play with a denoiser that needs no download.

noisy = ours.A(x) + 0.01 * torch.randn_like(y)
guidance = ours.pigdm_guidance(torch.nn.functional.pad(noisy, (6,) * 4, mode="replicate")[..., :128, :128], noisy,
                               noise_std=0.01, r=0.2)  # fmt: skip
model = deepinv.optim.optim_builder(
    iteration="HQS",
    prior=deepinv.optim.PnP(deepinv.models.MedianFilter(kernel_size=3)),
    data_fidelity=deepinv.optim.L2(),
    params_algo={"stepsize": 10.0, "g_param": 0.01},
    max_iter=8,
)
restored = model(noisy, ours)

# %%
# DiffPIR (Zhu et al. 2023) takes that proximal step at every noise level on its way, each with a gamma of its own. Any
# denoiser does; a trained one is what makes it good, and this page does without a download. Where few measurements see
# a pixel, in the margin, the sample is the denoiser's, and a median knows nothing of images.

sampler = deepinv.sampling.DiffPIR(
    deepinv.models.MedianFilter(kernel_size=3), deepinv.optim.L2(), sigma=0.01, max_iter=20, device="cpu"
)
with torch.no_grad():
    sampled = sampler(noisy.float(), lsconv.deepinv.Blur(psf.float(), padding="valid"))

answers = {"blurred": torch.nn.functional.pad(noisy, (6,) * 4), "plug-and-play": restored, "DiffPIR": sampled.double()}
for name, value in answers.items():
    error = (value - x)[..., 12:-12, 12:-12]
    print(f"{name:14}{-10 * error.square().mean().log10():.1f} dB")

# %%
# The pictures.

import matplotlib.pyplot as plt

# sphinx_gallery_thumbnail_number = 1
figure, axes = plt.subplots(2, 2, figsize=(6.4, 6.8))
images = {
    "image": x,
    "blurred": noisy,
    "DiffPIR": sampled,
    "size of the guidance": guidance.abs() / guidance.abs().max(),
}
for ax, (title, picture) in zip(axes.flat, images.items(), strict=True):
    ax.imshow(picture[0].permute(1, 2, 0).clamp(0, 1))
    ax.set(title=title, xticks=[], yticks=[])
