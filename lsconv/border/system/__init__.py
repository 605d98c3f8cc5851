"""The system on the border, solved by a preconditioned Krylov iteration.

``border_system`` is the system, and knows by ``cost_model`` when factors would cost no more. ``krylov`` iterates
(``recycling`` keeps what GMRES has found out); ``schwarz`` preconditions, its subdomains added up by ``subdomain_sum``.
The operator on the border is applied by ``grid_product``, ``strip_product`` or ``pruned_fft``; ``cuda_graph`` records
both maps on a GPU.
"""
