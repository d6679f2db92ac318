"""How messages shorten what others said and what is long."""

from collections.abc import Iterable

_LINES = 6


def one_line(error: BaseException | str) -> str:
    """
    A message without line breaks or a full stop; the error's type where it says nothing.

    Args:
        error: an exception or a text. Of a text with many lines the first few are kept, and the rest counted.
    """
    text = str(error).strip() or type(error).__name__
    first, *others = (" ".join(line.split()) for line in text.splitlines() if line.strip())
    others = others[:_LINES] + ([f"and {len(others) - _LINES} more"] if len(others) > _LINES else [])
    return " ".join([first, "; ".join(others)] if others else [first]).rstrip(".")


def listed(items: Iterable[object], limit: int = 5) -> str:
    """
    Items separated by commas, the first `limit` of them, and how many more there are.

    Args:
        items: of any kind; names are best passed through `repr`.
        limit: how many are written out.
    """
    texts = [str(item) for item in items]
    more = f" and {len(texts) - limit} more" if len(texts) > limit else ""
    return ", ".join(texts[:limit]) + more


__all__ = ["listed", "one_line"]
