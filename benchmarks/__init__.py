"""Measurements of what peerjax promises: `python -m benchmarks` lists them."""
