"""How the built-in model was made: a drawn world, a CLIP that is trained on it, and SAN beside that."""
