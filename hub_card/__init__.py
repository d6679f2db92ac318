"""What accompanies a model on the Hub."""

from .model_card import make_model_card

__all__ = ["make_model_card"]
