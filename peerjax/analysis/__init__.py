"""What each expert does in a trained model."""
