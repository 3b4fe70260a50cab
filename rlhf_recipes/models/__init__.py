"""Base models, their tokenizers, and several adapters on one base."""
