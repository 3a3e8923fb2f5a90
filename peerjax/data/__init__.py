"""Turns text into packed batches of tokens."""
