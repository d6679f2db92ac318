"""Pictures and words in, tensors out, and back again."""
