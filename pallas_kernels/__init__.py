"""Ops on pools of very many tiny experts: arrays in, arrays out, no model code.

One folder per op. Each has `api.py` (the public function) and `xla.py` (always works, and
the reference that every other implementation is tested against).
"""
