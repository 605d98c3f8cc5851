"""The iterations for min ||Ax - y||: one method of the literature a file, and two rooms that all methods share.

``cg``, ``minres`` and ``gmres`` are for square operators; ``cgls``, ``lsqr``, ``lsmr`` and ``craig`` for any;
``hybrid`` chooses the damping on the way (``projected`` is its small problem); ``refinement`` repeats a solve on the
residual. ``golub_kahan`` is the process that lsqr, lsmr, craig and hybrid stand on.

``loop`` takes a problem to a solution, whatever the method; ``gradients`` differentiates the answer.
"""
