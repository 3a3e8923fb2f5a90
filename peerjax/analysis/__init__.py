"""What experts do: numbers and pictures of a trained model."""
