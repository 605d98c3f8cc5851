"""The plans that need more than a border, a circulant or a matrix: Krylov methods, and those made of other plans.

``krylov_plan`` and ``krylov_choice`` (which preconditioner), ``dense_stack``. Two plans hand over to
the border, once the work they have done would have paid for it (``route_costs``): that of ``lsmr_then_border`` iterates
first (it is a ``certified_lsmr``), that of ``small_matrices`` solves axis by axis first. ``cosine_plan`` serves even
kernels with reflect padding. ``request`` is what the rules of ``inverse/route`` read. ``composed`` has the rules whose
plans are made of other plans: ``reduced_plan`` (a smaller convolution), ``adjoint_plan``, ``missing`` (outputs left
out), and the two of ``normal_iteration`` (weights, and kernels that vary).
"""
