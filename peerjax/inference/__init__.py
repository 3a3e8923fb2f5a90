"""What a trained model is used for: text from a prompt, its loss and experts on any text."""
