"""A small world with known truth, and the language model that has read about it."""
