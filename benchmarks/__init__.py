"""How fast SAN is and how much memory it takes: `python -m benchmarks` from the repository root."""
