"""FLOPs and memory of a configuration, found before anything runs."""
