"""The choice of damp.

``choose_damp`` takes a problem to a ``selection``: ``rules`` are functions of the residual, the penalty and the trace
of the influence matrix; ``paths`` and ``decomposed_path`` compute these for any damp exactly, ``stochastic_paths``
estimates them for every operator, and ``path_choice`` chooses among them; ``search`` finds the best damp of a path.
``surrogate``, ``weighted_surrogate`` and ``subimages`` are cheap problems with nearly the same best damp, searched
first.
"""
