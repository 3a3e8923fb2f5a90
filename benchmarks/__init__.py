"""Benchmarks of peerjax. `python -m benchmarks` lists them."""
