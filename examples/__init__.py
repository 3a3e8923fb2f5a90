"""Complete programs that use a part of peerjax."""
