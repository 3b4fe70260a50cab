"""What leaves a run directory: merged models, model cards, uploads."""
