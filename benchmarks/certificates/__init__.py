"""The search for wrong certificates: problems that are drawn, ways that solve them, and a dense judge of the answers.

``problems`` draws an operator with its data from one integer, ``ways`` solves it by everything that serves it,
``judge`` holds each answer against the dense singular value decomposition, and ``benchmarks.fuzz`` counts.
"""
