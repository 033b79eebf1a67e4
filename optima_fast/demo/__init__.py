"""The first five minutes: two students of one teacher, side by side, and what came of it.

``python -m optima_fast.demo`` distils a task made of handwritten digits twice, from the same
teacher and the same seed: once with the modules that are worth most (``headroom``), once with all
of them (``layerwise``).
"""
