"""What a training loop or a model is given, whatever the method."""
