"""Sentences about drawn images, which the tiny CLIP learns its words from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SINGLE_TEMPLATES: tuple[str, ...] = (
    "{}",
    "{}",
    "a photo of {}",
    "a photo of {}.",
    "a photo of a {}.",
    "an image of {}",
    "an image of a {} patch",
    "a close-up photo of {}.",
    "something {}",
    "this is a photo of a {}",
    "there is a {} in the scene",
    "there is the {} in the scene",
    "a photo of a {} in the scene",
    "a photo of a small {}.",
    "a photo of a medium {}.",
    "a photo of a large {}.",
    "there is a large {} in the scene.",
)
ON_BACKGROUND_TEMPLATES: tuple[str, ...] = (
    "{} on {}",
    "a photo of {} on {}",
    "a photo of a {} patch on {}.",
    "{} surrounded by {}",
    "an image with {} and {}",
    "{} in front of {}",
)
SEVERAL_TEMPLATES: tuple[str, ...] = ("{}", "a photo of {}", "an image with {}", "{} side by side", "there are {}")


@dataclass(frozen=True)
class Caption:
    """A sentence about an image and the class names it mentions."""

    text: str
    names: frozenset[str]


def write_caption(rng: np.random.Generator, regions: Sequence[str], background: str | None) -> Caption:
    """Write a sentence that mentions exactly the names given.

    Raises:
        ValueError: if there is nothing to mention.
    """
    names = frozenset(regions) | (frozenset() if background is None else {background})
    if not names:
        raise ValueError("write_caption got no names: pass at least one region or a background.")
    if len(names) == 1:
        templates, words = SINGLE_TEMPLATES, [*names]
    else:
        shuffled = [regions[position] for position in rng.permutation(len(regions))]
        listed = shuffled[0] if len(shuffled) == 1 else ", ".join(shuffled[:-1]) + f" and {shuffled[-1]}"
        templates = SEVERAL_TEMPLATES if background is None else ON_BACKGROUND_TEMPLATES
        words = [listed] if background is None else [listed, background]
    return Caption(templates[int(rng.integers(len(templates)))].format(*words), names)


def caption_scene(rng: np.random.Generator, regions: Sequence[str], background: str | None) -> Caption:
    """A caption of an image: everything, only the regions, or one thing, each a third of the time."""
    kind = 0 if background is None or not regions else int(rng.integers(3))
    if kind < 2:
        return write_caption(rng, regions, None if kind else background)
    names = [*regions, background]
    single = names[int(rng.integers(len(names)))]
    return write_caption(rng, [single] if single in regions else [], background if single == background else None)
