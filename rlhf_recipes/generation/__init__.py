"""Answers of any policy, and the judges of them."""
