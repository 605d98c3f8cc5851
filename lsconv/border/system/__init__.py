"""The system on the border, solved by a preconditioned Krylov iteration.

``border_system`` is the system with its Schwarz preconditioner, and says when factors would cost no more.
``border_krylov`` iterates, and keeps what GMRES has found out for the next system.
"""
