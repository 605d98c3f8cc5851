"""The answers: the (pseudo-)inverse of a convolution.

``lstsq`` (with ``pinv``), ``tikhonov``, ``total_variation`` and ``plug_and_play`` are the questions; ``deconvolve``
asks them for images (``image_layout``, ``identical_groups``), and ``tiled_variation`` asks one of them by tiles.
``route`` finds the method that answers, and makes its plan: ``small_matrices`` those of the factored operators,
``reduced_plan`` that of a smaller convolution, ``dense_stack`` that of a small problem with a penalty,
``krylov_choice`` an iteration. ``damping`` chooses damp; ``admm`` iterates what is not quadratic.
"""
