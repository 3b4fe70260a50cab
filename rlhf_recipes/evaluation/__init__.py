"""Measurements of policies and reward models, and the report."""
