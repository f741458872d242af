"""The recipe of models/embedded: small real models that stand in for Hub checkpoints.

Run it from the repository root with `make embedded`, or `PYTHONPATH=src:. python -m recipes.embedded.build`. It uses
`attune` and is not part of it: nothing in src imports it.
"""
