"""The embedded default: a small world with known truth, and the small language model that has read about it."""
