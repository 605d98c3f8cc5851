"""The plans that need more than a border, a circulant or a matrix: Krylov methods, and those made of other plans.

``krylov_plan`` and ``krylov_choice`` (which preconditioner), ``dense_stack``. Two plans hand over to the border:
``trial_plan`` iterates first, ``separable_then_border`` solves axis by axis first. ``cosine_plan`` serves even kernels
with reflect padding. ``request`` is what the rules of ``inverse/route`` read. ``composed`` has the rules whose plans
are made of other plans: ``small_matrices`` (which of them are cheap), ``reduced_plan`` (a smaller convolution),
``adjoint_plan``, ``missing`` (outputs left out), and those of ``normal_iteration``: ``weighted`` and ``varying``.
"""
