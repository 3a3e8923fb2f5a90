"""Layers of the decoder: thin Linen modules."""
