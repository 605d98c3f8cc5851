"""The iterations for min ||Ax - y||: one file for each method of the literature, and two folders that all share.

``cg``, ``minres`` and ``gmres`` are for square operators; ``cgls``, ``lsqr``, ``lsmr`` and ``craig`` for any;
``hybrid`` chooses the damping while it iterates; ``refinement`` repeats a solve on the residual. ``golub_kahan`` is the
process behind lsqr, lsmr, craig and hybrid, ``lanczos`` that of Hermitian operators; ``plan`` is the interface of every
method's setup.

``loop`` takes a problem to a solution, whatever the method; ``gradients`` differentiates the answer.
"""
