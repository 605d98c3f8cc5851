"""The border solved by factors instead of by iteration.

``crossed_border`` is a border of rows and columns; ``strip`` eliminates its rows frequency by frequency,
``schur_complement`` forms what that leaves of the columns, ``even_odd_basis`` splits it by symmetries and factorises
it, ``hodlr`` by hierarchical low-rank blocks where it is large. ``direct_pass`` is a solve with these factors;
``border.cost_model`` has what they take.
"""
