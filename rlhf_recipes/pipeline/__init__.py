"""Stages in order, from one YAML file.

`reading`, `settings`, `schema` and `early` import no PyTorch: what they find wrong is said at once.
"""
