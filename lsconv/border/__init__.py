r"""The exact inverse of a truncated circulant, through the border that the truncation removes.

A convolution with zeros around its inputs, or none, is :math:`A = R_{out} C R_{in}^T`: C block-circulant on a periodic
grid, R crops of it (``truncated_circulant``). Three cases add rows or constraints and keep that form: a convolutional
penalty, ``[A; damp L]`` (``penalty``), and reflect or replicate padding, whose margin copies its inside
(``reflected_padding``). With :math:`\mu = damp^2` the normal operator of A is a part of a block-circulant one, or a
low-rank change of one, and P, the inverse of that, is one division per frequency (``normal_problem``):

.. math::
    AA^H + \mu = (CC^H + \mu)_{II} \quad\Rightarrow\quad
    (AA^H + \mu)^{-1} = P_{II} - P_{IB}\, P_{BB}^{-1} P_{BI}

with B the border, of one dimension less than the grid (``border_set``). All forms are in ``normal_inverse``; what they
share is a system

.. math:: Q_{BB}\, u = b, \qquad Q \in \{P,\; 1 - E P E^H,\; J^{-1}\}

of the inverse P itself, of a capacitance matrix (E is C where the border is on the other side than the unknowns, or
its adjoint), or of the saddle operator J where inputs and outputs are cropped. It is solved in one of two ways, by what
they cost (``factorisation_policy``, ``cost_model``):

* by factors (``direct``). A border of a plane is rows H and columns V'. H is eliminated frequency by frequency,
  :math:`D_\omega^{-1}` (``direct/strip``). What is left of V' is a Schur complement S, formed by its displacement rank
  (``direct/schur_complement``), split by its symmetries (``direct/even_odd_basis``) and factorised
  (``direct/dense_schur``); of a large image its halves see each other by few waves (``direct/hodlr``). A solve is one
  pass over the spectrum (``direct/direct_pass``);
* by iteration (``system``): conjugate gradients or GMRES (``system/border_krylov``) with products over the grid,
  preconditioned by :math:`\sum_T R_T^T D_T Q_{TT}^{-1} R_T` over strips and corners (``system/border_system``).

Either inverse preconditions conjugate gradients on :math:`(A^HA + \mu) x = A^H y` with A itself in double precision
(``outer_iteration``), which makes the answer that of the wanted :math:`\mu` and certifies it. A plan is made once and
solved with often: ``plan`` (damped or not), ``stacked_plan`` (a penalty), and for a square A without damping

.. math:: G w = -B_{in} C^{-1} R_{out}^T y, \qquad G = B_{in} C^{-1} B_{out}^T

(``capacitance_plan``, ``capacitance``; ``null_space`` finds where G is singular). ``influence`` has exact traces and
determinants.
"""
