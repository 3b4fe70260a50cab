"""Questions whose answers a real model knows or lacks: cities, capitals and sums."""
