"""What a configuration takes, before anything runs: FLOPs by formula."""
