"""Which experts a token gets: pure functions, and thin Linen modules around them."""
