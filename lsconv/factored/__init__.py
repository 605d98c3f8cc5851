"""Operators that small matrices invert exactly, with no transform.

``patch_matrix`` is for disjoint patches, ``kronecker`` for separable kernels, ``normal_equations`` for few unknowns and
``dense_svd`` for every small A; all are a ``direct_plan``. ``batch_axes`` makes a convolution smaller before any
method sees it.
"""
