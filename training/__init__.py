"""Training: data sets, recipes, the training loop, evaluation."""
