# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""How messages shorten what others said and what is long, and tame what came from anywhere."""

import re
from collections.abc import Iterable

_LINES = 6

# All but tabs and line breaks, and what turns the direction of writing
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def escaped(text: str) -> str:
    """
    A text with those characters written out that a terminal obeys, such as "\\x1b".

    Labels, file names and models come from anywhere; whatever is printed goes through this.
    """
    return _CONTROL_CHARACTERS.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


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


__all__ = ["escaped", "listed", "one_line"]
