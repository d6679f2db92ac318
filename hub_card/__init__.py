"""What accompanies a model on the Hub."""
