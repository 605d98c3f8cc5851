"""Deconvolution of images and volumes: what a picture needs around a least-squares problem.

``deconvolve`` is the entry point; ``blur`` and ``point_spread`` make the operator, ``image_layout`` names the axes,
``image_noise`` and ``saturation`` say what the pixels are worth, ``image_tikhonov`` and ``identical_groups`` solve.
"""
