"""Gradients of an answer by implicit differentiation: one more solve of the same kind, no graph through iterations.

``attach`` is the entry: it runs a solve and hands it to one of the two rules; ``methods`` are the Krylov methods with
it, the public ones. ``solve_record`` is the solve as the rules see it; ``damped_rule`` differentiates it with damping,
``pseudo_inverse_rule`` (Golub and Pereyra) without; ``vmap`` makes a mapped dimension a batch dimension.
``backward_solves`` has the solves of the backward pass, ``parameters`` the derivatives by the tensors that an operator
is made of.
"""
