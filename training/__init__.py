"""Training: the small drawn world, the built-in model, fine-tuning."""
