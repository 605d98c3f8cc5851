"""Deconvolution of images and volumes: what a picture needs around a least-squares problem.

``deconvolve`` is the entry point; ``blur`` and ``point_spread`` make the operator, ``image_layout`` names the axes,
``image_noise`` and ``saturation`` say how well each pixel was measured; ``restoration`` solves under each prior, with
``image_tikhonov`` and ``identical_groups`` for the quadratic ones.
"""
