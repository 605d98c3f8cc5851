"""The exact inverse of a truncated circulant, through the border that the truncation removes.

A truncated convolution is ``A = R_out C R_in^T``, C block-circulant. The inverse of its normal operator is one division
per frequency and the solve of a system on the border cells (``normal_inverse``); it preconditions an iteration that A
itself certifies. In the order in which a right-hand side passes:

* plans, made once and solved with often: ``plan`` (damped or not), ``stacked_plan`` (a penalty ``L``),
  ``capacitance_plan`` (square, without damping; ``null_space`` for its singular cases);
* ``outer_iteration``: flexible conjugate gradients with A in float64;
* ``truncated_circulant``: what is inverted, with ``penalty`` stacked below or ``reflected_padding`` as constraints;
* ``normal_inverse``: the inverse by Fourier and border, of matrices from ``gram`` and ``saddle``;
* ``border_set``: the cells of the border, vectors on them, the entries of an operator between them;
* ``system``: the system on the border by iteration; ``direct``: by factors;
* ``influence`` and ``border_factor``: exact traces and determinants; ``memory`` and ``free_memory``: what fits.
"""
