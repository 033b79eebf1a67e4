"""Grids of runs: methods and ablations on tasks and seeds, and the table of what came of them.

``grid`` says which runs there are, ``runner`` does them, ``curves`` reads what a run recorded,
``statistics`` compares methods seed by seed, ``tables`` writes what came of it.
"""
