"""Routing of tokens to experts: pure functions, and thin Linen modules around them."""
