"""What a user asks for: the (pseudo-)inverse of a convolution.

``lstsq`` (with ``pinv``), ``tikhonov``, ``total_variation`` and ``plug_and_play`` are the questions; ``deconvolve``
asks them for pictures (``image_layout``, ``identical_groups``). ``route`` finds the method that answers, and makes its
plan (``small_matrices`` those of the factored operators, ``reduced_plan`` that of a smaller convolution);
``penalised`` is a kept plan with a penalty. ``damping`` chooses damp; ``admm`` iterates what is not quadratic.
"""
