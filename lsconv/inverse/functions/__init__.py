"""Functions of an operator: determinants, traces, the norm.

:mod:`~lsconv.inverse.functions.determinants` has ``logdet``, ``slogdet`` and ``trace_inverse``;
:mod:`~lsconv.inverse.functions.square` the determinant of a square convolution,
:mod:`~lsconv.inverse.functions.triangular` the factor of a small problem,
:mod:`~lsconv.inverse.functions.stochastic` what is estimated where no factors fit, and
:mod:`~lsconv.inverse.functions.spectral_norm` ``norm``.
"""
