# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""Prompt templates: the sentences that labels are put into before they are encoded."""

from collections.abc import Iterable, Mapping
from typing import Any

from .vocabulary_san import prompt_templates

DEFAULT_TEMPLATES = "vild"
"""The prompt templates of the released SAN models."""

Templates = str | Iterable[str] | Mapping[str, Any]
"""A name of templates, the templates themselves, or the saved form `{"name": ..., "prompts": [...]}`."""


def resolve_templates(templates: Templates) -> tuple[str | None, list[str]]:
    """
    Name, if there is one, and text of prompt templates.

    Args:
        templates: a name, a list of templates, or the saved form `{"name": ..., "prompts": [...]}`.

    Raises:
        ValueError: the name is unknown, there are no templates, or one does not hold exactly one `{}`.
    """
    if isinstance(templates, str):
        if "{" in templates:
            raise ValueError(f"templates is {templates!r}: pass a list, [{templates!r}], or the name of a set")
        return templates, list(prompt_templates(templates))
    name = None
    if isinstance(templates, Mapping):
        name, templates = templates.get("name"), templates.get("prompts", [])
    patterns = list(templates)
    if not patterns:
        raise ValueError('templates is empty: pass at least one, for example ["a photo of a {}."]')
    for pattern in patterns:
        if not isinstance(pattern, str) or pattern.count("{}") != 1 or set("{}") & set(pattern.replace("{}", "")):
            raise ValueError(
                f"template {pattern!r} cannot be used: expected a string with {{}} once, where the label goes, and no "
                'other braces, for example "a photo of a {}."'
            )
    return name, patterns


__all__ = ["DEFAULT_TEMPLATES", "Templates", "resolve_templates"]
