"""The algebra of block-circulants: one small matrix per frequency.

``embedding`` writes a convolution as a crop of a block-circulant on a periodic grid; ``symbol`` computes its matrices,
``frequency_matrices`` applies them, and ``frequency_inverse`` and ``damped_inverse`` invert them. ``circulant`` solves
where nothing is cropped, ``spectrum`` has norms, condition numbers and singular values. ``convolution_structure`` finds
the convolution in an operator made of operators, ``circulant_preconditioner`` inverts it approximately.
``batched_linalg`` factorises batches of matrices.
"""
