"""Deconvolution of images and volumes: from an image, its PSF and its noise to a least-squares problem and back.

``deconvolve`` is the entry point; ``blur`` and ``point_spread`` make the operator, ``image_layout`` names the axes,
``image_noise`` and ``saturation`` describe how well each pixel was measured; ``restoration`` solves under each prior,
and for ``identical_groups`` once.
"""
