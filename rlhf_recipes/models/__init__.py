"""Base models in 4 bits or not, their tokenizers, and several adapters on one base."""
