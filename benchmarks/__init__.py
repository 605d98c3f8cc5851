"""How fast, how exact and how large: one file a question, all run by ``python -m benchmarks``."""
