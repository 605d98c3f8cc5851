"""The loop that every Krylov method runs in, in the order in which a right-hand side passes.

``entry`` checks options and answers empty batches. ``problem`` checks and broadcasts the arguments, ``options`` says
how to iterate, ``batch_groups`` divides a large batch, ``damping`` folds damp into the operator. ``iteration`` runs a
``method``; ``monitor`` stops its items by the tolerances; ``judge`` makes the ``certificate`` of what was found, with
``null_space`` where norms cannot tell; ``solution`` is what comes out.

``batched_scalars`` is the arithmetic per batch item; ``penalised`` makes one problem of data and penalty;
``lagrange_multipliers`` are found along with least-norm answers.
"""
