"""Functions of an operator: determinants, traces, singular values.

- :mod:`~lsconv.inverse.functions.determinants`: ``logdet``, ``slogdet``, ``trace_inverse``.
- :mod:`~lsconv.inverse.functions.stochastic`: what they are estimated with, where no factors fit.
- :mod:`~lsconv.inverse.functions.spectra`: ``norm``, ``singular_values``, ``svd``.
"""
