"""The alternating direction method of multipliers, for convex terms of linear images of x.

``sparse_problem`` states a problem as terms (``proximal``) of images; ``iteration`` splits them off. Its quadratic step
is ``fourier_step``, one division per frequency with the images of ``split_images`` and ``spectral_image``, or
``operator_step`` in the operators themselves. ``optimality`` certifies what comes out, ``history`` reports it.
"""
