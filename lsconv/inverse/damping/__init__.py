"""The choice of damp.

``choose_damp`` takes a problem to a ``selection``: ``rules`` are functions of the residual, the penalty and the trace
of the influence matrix; ``paths`` computes these for any damp exactly, ``stochastic_paths`` estimates them for every
operator; ``search`` finds the best damp of a path. ``surrogate``, ``weighted_surrogate`` and ``subimages`` are cheap
problems with nearly the same best damp, searched first.
"""
