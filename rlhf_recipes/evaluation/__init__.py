"""Metrics, as `evaluate.Metric`s that work alone and offline, and what they are computed from."""
