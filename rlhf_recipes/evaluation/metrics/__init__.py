"""Metrics and their intervals, each a function of texts or numbers."""
