"""Measure fusednorm beside PyTorch's own norms: ``python -m fusednorm.bench run | list | report``.

One idea a file: `shapes` (what is normalized), `registry` (ops, their bytes, who provides them),
`gate` (exact before fast), `timing` (how long), `run` (cases to rows), `report` (rows to read).
"""
