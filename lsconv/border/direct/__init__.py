"""The border solved by factors instead of by iteration.

``crossed_border`` is a border of rows and columns; ``strip`` eliminates its rows frequency by frequency, and
``schur_complement`` forms what that leaves of the columns. ``dense_schur`` factorises it, split by its symmetries
(``even_odd_basis``); ``hodlr`` by hierarchical low-rank blocks where it is large. ``direct_pass`` is a solve with these
factors; ``border.cost_model`` has what they take.
"""
