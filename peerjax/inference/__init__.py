"""Uses trained models: continues prompts, and evaluates loss and experts on any text."""
