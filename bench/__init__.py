"""Measure fusednorm beside PyTorch: ``python -m fusednorm.bench run | compare | report | list``.

One idea a file. What: `shapes`, `registry` (families, ops, bytes), `papers` and `plain` (PyTorch's
side), `providers` and `peers` (who computes), `resnet`, `variants` and `steps` (end to end).
How: `operands`, `gate` (exact before fast), `timing`, `observe` (kernels, memory), `machine`,
`run` (cases to rows), `results` (the file), `progress`, `selection` (filters). Reading: `compare`,
`views`, `report`, `picture`, `html`. docs/benchmarks.md says what a row means.
"""
