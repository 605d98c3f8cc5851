"""The system on the border, solved by a preconditioned Krylov iteration or by the factors of the whole border.

``border_system`` decides between the two with ``cost_model``. ``krylov`` iterates (``recycling`` keeps what GMRES has
found out); ``schwarz`` preconditions, its subdomains added up by ``subdomain_sum``. The operator on the border is
applied by ``grid_product``, ``strip_product`` or ``pruned_fft``; ``cuda_graph`` records both maps on a GPU.
"""
