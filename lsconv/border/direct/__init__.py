"""The inverse of the operator on the border by factors.

``border_inverse`` chooses: ``block_elimination`` for a border of rows and columns, ``dense_inverse`` for any.
``reflection_symmetry`` splits either into halves where the operator and the border are symmetric.
"""
