r"""
Choosing the damping
====================

*How much should I damp?* Too little and the noise is amplified, too much and the answer is blurred. A rule chooses from
the data alone; :func:`lsconv.choose_damp` shows how.
"""

# %%
# A blurred, noisy picture, and the error of the answer against the damping (which needs the truth, so that you do not
# have it).

import matplotlib.pyplot as plt
import skimage
import torch

import lsconv

scene = torch.from_numpy(skimage.data.camera()).double()[None] / 255
scene = torch.nn.functional.avg_pool2d(scene, 4)
psf = torch.ones(5, 5, dtype=torch.float64) / 25
A = lsconv.blur_operator(psf, (124, 124))
noise_std = 0.02
y = A(scene) + noise_std * torch.randn(A.out_shape, dtype=torch.float64)
L = lsconv.Gradient(A.in_shape)

damps = torch.logspace(-2.5, 0.5, 16, dtype=torch.float64)
answers = lsconv.tikhonov(A, y.expand(16, *y.shape), damps, L=L).x  # a batch: one damp per item
error = (answers - scene)[..., 2:-2, 2:-2].square().mean((1, 2, 3)).sqrt()

# %%
# The rules. "discrepancy" and "upre" are told the noise; "gcv", "lcurve" and "evidence" read it off the data.

chosen = {
    rule: lsconv.choose_damp(A, y, rule, L=L, noise_std=noise_std if rule in ("discrepancy", "upre") else None)
    for rule in ("gcv", "discrepancy", "upre", "lcurve", "evidence")
}
for rule, selection in chosen.items():
    print(f"{rule:12} damp = {float(selection.damp):.3f}")

# %%

# sphinx_gallery_thumbnail_number = 1
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
left.loglog(damps, error, "k-", label="error")
for number, (rule, selection) in enumerate(chosen.items()):
    left.axvline(float(selection.damp), color=f"C{number}", linestyle=("-", "--", ":", "-.", "-")[number], label=rule)
left.set(xlabel="damp", ylabel="rms error of x", title="where the rules go")
left.legend(fontsize=8)
chosen["gcv"].plot(right)
right.set_title("what gcv has minimised")

# %%
# Give the name of the rule to the solver to have both in one call:

solution = lsconv.tikhonov(A, y, "gcv", L=L)
print(solution)
print(solution.selection.message)
