"""Operators that small matrices invert exactly, with no transform: the singular value decomposition of a small A."""
