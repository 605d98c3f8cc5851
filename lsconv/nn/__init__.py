"""Modules for networks: inverses of convolutions, flows, and the spectral norm of a layer.

:mod:`~lsconv.nn.inversion` has ``PseudoInverse``, ``Tikhonov`` and ``RangeNull``, :mod:`~lsconv.nn.invertible` has
``InvertibleConv2d``, and :mod:`~lsconv.nn.spectral_norm` the parametrization ``spectral_norm``.
"""

from lsconv.nn.inversion import PseudoInverse, RangeNull, Tikhonov
from lsconv.nn.invertible import InvertibleConv2d
from lsconv.nn.spectral_norm import spectral_norm

__all__ = ["InvertibleConv2d", "PseudoInverse", "RangeNull", "Tikhonov", "spectral_norm"]
