"""A small drawn world: textured backgrounds with free-form regions that combine a colour with a pattern.

Every image is an exact function of `(seed, index)`, so nothing has to be stored or downloaded. A region is named by
its colour and its pattern ("red striped"), a background by its texture ("grass"). A label map holds, for each pixel,
the position of its name in [`CLASS_NAMES`].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from datasets import Dataset, Features, Image
from PIL import Image as PILImage

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.84, 0.15, 0.18),
    "orange": (0.97, 0.53, 0.10),
    "yellow": (0.99, 0.86, 0.18),
    "green": (0.12, 0.66, 0.30),
    "cyan": (0.18, 0.82, 0.86),
    "blue": (0.15, 0.32, 0.88),
    "purple": (0.50, 0.22, 0.74),
    "pink": (0.97, 0.47, 0.75),
}
"""The colour of each colour word: red, green, blue in 0 ... 1, before jitter."""

PATTERNS: tuple[str, ...] = ("striped", "dotted", "checkered", "plain")
BACKGROUNDS: tuple[str, ...] = ("grass", "sand", "water", "brick", "snow", "wood")
COMBINATIONS: tuple[str, ...] = tuple(f"{colour} {pattern}" for colour in COLOURS for pattern in PATTERNS)
CLASS_NAMES: tuple[str, ...] = COMBINATIONS + BACKGROUNDS
"""What a label map's values stand for, in order."""

IGNORE_INDEX = 255
"""The label that no pixel of a drawn image has; padding may use it."""

# A Latin arrangement: each colour is held out once, each pattern twice. What is never seen is thus the combination
# only; its colour and its pattern are both seen in others.
NEVER_SEEN_COMBINATIONS: tuple[str, ...] = tuple(
    f"{colour} {PATTERNS[position % len(PATTERNS)]}" for position, colour in enumerate(COLOURS)
)
SEEN_COMBINATIONS: tuple[str, ...] = tuple(name for name in COMBINATIONS if name not in NEVER_SEEN_COMBINATIONS)

MIN_REGION_SHARE = 0.06
"""The least visible share of the image that a region covers."""


@dataclass(frozen=True)
class Scene:
    """A drawn image and what is to be known about it.

    Attributes:
        image: `uint8` array `(height, width, 3)`, RGB.
        label_map: `uint8` array `(height, width)`, positions in [`CLASS_NAMES`].
        regions: names of the regions, from the first drawn to the one on top; each covers at least
            [`MIN_REGION_SHARE`] of the image.
        background: name of the background, or `None` where a region fills the whole image.
    """

    image: np.ndarray
    label_map: np.ndarray
    regions: tuple[str, ...]
    background: str | None

    @property
    def names(self) -> tuple[str, ...]:
        """Every name in the image: the regions, then the background."""
        return self.regions if self.background is None else (*self.regions, self.background)


def draw_scene(
    seed: int,
    index: int,
    *,
    size: int | tuple[int, int] = 128,
    combinations: Sequence[str] = COMBINATIONS,
    backgrounds: Sequence[str] = BACKGROUNDS,
    min_regions: int = 1,
    max_regions: int = 3,
) -> Scene:
    """Draw image number `index` of the world `seed`.

    Half of the images hold `min_regions`, the others up to `max_regions`, all with different names. Textures have a
    fixed scale in pixels: a larger image shows more of them, not larger ones.

    Args:
        seed: which world; a non-negative integer.
        index: which image of it; a non-negative integer.
        size: height and width in pixels, or one number for both.
        combinations: names that regions may have.
        backgrounds: names that the background may have.
        min_regions: the fewest regions; 0 allows a background alone.
        max_regions: the most regions; fewer are drawn where there is no room.

    Raises:
        ValueError: if a name is unknown, or the numbers of regions make no sense.
    """
    for names, known in ((combinations, COMBINATIONS), (backgrounds, BACKGROUNDS)):
        if not names or not set(names) <= set(known):
            raise ValueError(f"{list(names)}: expected some of {list(known)}.")
    if not 0 <= min_regions <= max_regions:
        raise ValueError(f"min_regions={min_regions}, max_regions={max_regions}: expected 0 <= min <= max.")
    height, width = (size, size) if isinstance(size, int) else size
    rng = np.random.default_rng((seed, index))

    background = str(rng.choice(backgrounds))
    number = min_regions if rng.random() < 0.5 else int(rng.integers(min_regions, max_regions + 1))
    wanted = [str(name) for name in rng.choice(combinations, size=min(number, len(combinations)), replace=False)]

    image = _draw_texture(background, rng, height, width)
    label_map = np.full((height, width), CLASS_NAMES.index(background), dtype=np.uint8)
    regions: list[str] = []
    for name in wanted:
        distance = _place_region(rng, label_map, [CLASS_NAMES.index(region) for region in regions], len(wanted))
        if distance is not None:
            _paint(image, label_map, distance, name, rng)
            regions.append(name)
    return Scene(_finish(image, rng), label_map, tuple(regions), background)


def draw_texture(seed: int, index: int, *, size: int = 128, names: Sequence[str] = CLASS_NAMES) -> Scene:
    """Draw a square that one texture fills, one of `names`: a close-up of a region, or a background alone."""
    rng = np.random.default_rng((seed, index))
    name = str(rng.choice(names))
    image = _finish(_draw_texture(name, rng, size, size), rng)
    label_map = np.full((size, size), CLASS_NAMES.index(name), dtype=np.uint8)
    return Scene(image, label_map, (), name) if name in BACKGROUNDS else Scene(image, label_map, (name,), None)


def world_dataset(
    num_images: int, seed: int = 0, *, start: int = 0, names: Sequence[str] = CLASS_NAMES, **scene_options
) -> Dataset:
    """Draw `num_images` images, from number `start` on, as a `datasets.Dataset` held in memory.

    Args:
        num_images: number of images.
        seed: which world.
        start: index of the first image.
        names: what the values of the label maps stand for, in order; drawn names that are not among them get
            [`IGNORE_INDEX`].
        scene_options: options of [`draw_scene`], such as `size` and `combinations`.

    Returns:
        A dataset with the features `image` (RGB image) and `annotation` (label map, one channel).
    """
    values = np.array([names.index(name) if name in names else IGNORE_INDEX for name in CLASS_NAMES], np.uint8)
    scenes = [draw_scene(seed, index, **scene_options) for index in range(start, start + num_images)]
    columns = {
        "image": [PILImage.fromarray(scene.image) for scene in scenes],
        "annotation": [PILImage.fromarray(values[scene.label_map]) for scene in scenes],
    }
    return Dataset.from_dict(columns, features=Features(image=Image(), annotation=Image()))


# ------------------------------------------------------------------------------------------------------------ shapes


@lru_cache(maxsize=8)
def _grid(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    return rows, columns


def _smooth_noise(rng: np.random.Generator, height: int, width: int, rows: int, columns: int) -> np.ndarray:
    """Smooth values of about unit spread: a coarse random grid `(rows, columns)` brought to `(height, width)`."""
    coarse = rng.standard_normal((max(rows, 2), max(columns, 2)), dtype=np.float32)
    return np.asarray(PILImage.fromarray(coarse).resize((width, height), PILImage.Resampling.BICUBIC))


def _place_region(
    rng: np.random.Generator, label_map: np.ndarray, drawn: Sequence[int], number: int
) -> np.ndarray | None:
    """Find an outline that leaves the `drawn` labels and itself enough room: signed distances in pixels, or `None`."""
    least = MIN_REGION_SHARE * label_map.size
    for _ in range(12):
        distance = _blob(rng, label_map.shape[0], label_map.shape[1], largest={1: 0.55, 2: 0.36}.get(number, 0.28))
        inside = distance < 0
        if inside.sum() < least or inside.all():
            continue
        outside_labels = label_map[~inside]
        if all((outside_labels == label).sum() >= least for label in drawn):
            return distance
    return None


def _blob(rng: np.random.Generator, height: int, width: int, largest: float) -> np.ndarray:
    """A free-form outline as about the distance to it in pixels, negative inside."""
    rows, columns = _grid(height, width)
    radius = np.sqrt(rng.uniform(0.12, largest) * height * width / np.pi)
    stretch = np.exp(rng.uniform(-0.3, 0.3))
    angle = rng.uniform(0, np.pi)
    y = rows - rng.uniform(0.15, 0.85) * height
    x = columns - rng.uniform(0.15, 0.85) * width
    along = (np.cos(angle) * x + np.sin(angle) * y) * np.float32(stretch / radius)
    across = (np.cos(angle) * y - np.sin(angle) * x) * np.float32(1 / stretch / radius)
    wobble = _smooth_noise(rng, height, width, height // 28 + 1, width // 28 + 1)
    return (np.sqrt(along**2 + across**2) - 1 + np.float32(0.2) * wobble) * np.float32(radius)


def _paint(
    image: np.ndarray, label_map: np.ndarray, distance: np.ndarray, name: str, rng: np.random.Generator
) -> None:
    """Paint a region with a smooth edge and a soft shadow onto `image`, and its label onto `label_map`, in place."""
    texture = _draw_texture(name, rng, *label_map.shape)
    shadow = 1 - np.float32(0.35) * np.clip(1 - distance / 5, 0, 1)
    cover = np.clip(0.5 - distance, 0, 1)[..., None]
    image *= shadow[..., None]
    image += cover * (texture - image)
    label_map[distance < 0] = CLASS_NAMES.index(name)


def _finish(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Light, camera noise and rounding: `(height, width, 3)` in 0 ... 1 to `uint8`."""
    height, width = image.shape[:2]
    rows, columns = _grid(height, width)
    slope_y, slope_x = rng.uniform(-0.12, 0.12, size=2)
    light = rng.uniform(0.86, 1.08) + slope_y * (rows / height - 0.5) + slope_x * (columns / width - 0.5)
    noise = rng.standard_normal(image.shape, dtype=np.float32) * np.float32(rng.uniform(0.005, 0.025))
    image = image * light.astype(np.float32)[..., None] + noise
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------- textures


def _draw_texture(name: str, rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """An image full of one class: `float32` array `(height, width, 3)`, about 0 ... 1."""
    if name in _BACKGROUND_PAINTERS:
        return _BACKGROUND_PAINTERS[name](rng, height, width)
    colour, pattern = name.split(" ")
    return _draw_pattern(colour, pattern, rng, height, width)


def _draw_pattern(colour: str, pattern: str, rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    first = _jitter(rng, np.array(COLOURS[colour], dtype=np.float32), 0.045)
    second = _second_tone(rng, first)
    share = _PATTERN_PAINTERS[pattern](rng, height, width)[..., None]
    shade = 1 + np.float32(0.05) * _smooth_noise(rng, height, width, height // 32, width // 32)[..., None]
    return (first + share * (second - first)) * shade


def _second_tone(rng: np.random.Generator, first: np.ndarray) -> np.ndarray:
    """White, charcoal or a deep shade of the colour itself: never another colour of the world."""
    tones = (np.full(3, 0.96), np.full(3, 0.13), 0.32 * first)
    return _jitter(rng, tones[int(rng.choice(3, p=(0.5, 0.25, 0.25)))].astype(np.float32), 0.02)


def _jitter(rng: np.random.Generator, colour: np.ndarray, spread: float) -> np.ndarray:
    return np.clip(colour + rng.uniform(-spread, spread, size=3).astype(np.float32), 0, 1)


def _turned(
    rng: np.random.Generator, height: int, width: int, periods: tuple[float, float], largest_turn: float = np.pi / 2
) -> tuple[np.ndarray, np.ndarray, float]:
    """Coordinates in periods along two turned axes, and the period in pixels, drawn between the two `periods`."""
    rows, columns = _grid(height, width)
    period = rng.uniform(*periods)
    angle = rng.uniform(-largest_turn, largest_turn)
    cosine, sine = np.float32(np.cos(angle) / period), np.float32(np.sin(angle) / period)
    phase = rng.uniform(0, 1, size=2).astype(np.float32)
    return cosine * columns + sine * rows + phase[0], cosine * rows - sine * columns + phase[1], period


def _triangle(periods: np.ndarray) -> np.ndarray:
    """A triangle wave between -1 and 1."""
    return 4 * np.abs(periods - np.floor(periods) - np.float32(0.5)) - 1


# Stripes are coarse and checks fine and nearly upright: a patch of 8 x 8 pixels then tells them apart by their scale
# too, which a small transformer learns in minutes; at one scale and any angle the two stay confused for far longer.


def _striped(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    along, _, period = _turned(rng, height, width, (17, 24))
    return np.clip((_triangle(along) - np.float32(rng.uniform(0.1, 0.35))) * np.float32(period / 4) + 0.5, 0, 1)


def _dotted(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    along, across, period = _turned(rng, height, width, (12, 17))
    row = np.floor(across)
    # Every second row is shifted by half a period, as on fabric.
    along = along + np.float32(0.5) * row
    distance = np.hypot(along - np.floor(along) - np.float32(0.5), across - row - np.float32(0.5))
    return np.clip((np.float32(rng.uniform(0.27, 0.34)) - distance) * np.float32(period) + 0.5, 0, 1)


def _checkered(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    along, across, period = _turned(rng, height, width, (13, 17), largest_turn=np.pi / 9)
    return np.clip(_triangle(along) * _triangle(across) * np.float32(period / 3) + 0.5, 0, 1)


def _plain(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    return np.zeros((height, width), dtype=np.float32)


_PATTERN_PAINTERS: dict[str, Callable[[np.random.Generator, int, int], np.ndarray]] = {
    "striped": _striped,
    "dotted": _dotted,
    "checkered": _checkered,
    "plain": _plain,
}


def _blend(share: np.ndarray, dark: Sequence[float], light: Sequence[float]) -> np.ndarray:
    dark_tone, light_tone = np.array(dark, dtype=np.float32), np.array(light, dtype=np.float32)
    return dark_tone + np.clip(share, 0, 1)[..., None] * (light_tone - dark_tone)


def _grass(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    blades = _smooth_noise(rng, height, width, height // 9, width // 2)
    clumps = _smooth_noise(rng, height, width, height // 30, width // 30)
    return _blend(0.5 + 0.26 * blades + 0.12 * clumps, (0.20, 0.31, 0.10), (0.60, 0.66, 0.32))


def _sand(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    rows, columns = _grid(height, width)
    bend = _smooth_noise(rng, height, width, height // 40, width // 40)
    ripples = np.sin(rows * np.float32(2 * np.pi / rng.uniform(15, 20)) + 2 * bend + np.float32(0.05) * columns)
    grain = rng.standard_normal((height, width), dtype=np.float32)
    return _blend(0.5 + 0.22 * ripples + 0.16 * grain, (0.72, 0.60, 0.42), (0.94, 0.87, 0.71))


def _water(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    rows, _ = _grid(height, width)
    bend = _smooth_noise(rng, height, width, height // 16, width // 26)
    waves = np.sin(rows * np.float32(2 * np.pi / rng.uniform(12, 16)) + 2.2 * bend)
    swell = _smooth_noise(rng, height, width, height // 30, width // 40)
    return _blend(0.42 + 0.34 * waves * np.abs(waves) + 0.08 * swell, (0.11, 0.30, 0.40), (0.62, 0.78, 0.82))


def _brick(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    rows, columns = _grid(height, width)
    brick_height = np.float32(rng.uniform(12, 15))
    brick_width = np.float32(2.1) * brick_height
    y = rows / brick_height + np.float32(rng.uniform())
    row = np.floor(y)
    x = columns / brick_width + np.float32(rng.uniform()) + np.float32(0.5) * row
    column = np.floor(x)
    from_edge_y = (0.5 - np.abs(y - row - 0.5)) * brick_height
    from_edge_x = (0.5 - np.abs(x - column - 0.5)) * brick_width
    brick = np.clip(np.minimum(from_edge_y, from_edge_x) - 0.6, 0, 1)[..., None]
    tones = rng.uniform(0.0, 1.0, size=(int(row.max()) + 2, int(column.max()) + 2)).astype(np.float32)
    tone = tones[row.astype(np.intp), column.astype(np.intp)]
    grain = _smooth_noise(rng, height, width, height // 3, width // 3)
    clay = _blend(tone + 0.15 * grain, (0.47, 0.25, 0.20), (0.66, 0.40, 0.32))
    mortar = np.array((0.78, 0.75, 0.70), dtype=np.float32)
    return mortar + brick * (clay - mortar)


def _snow(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    drifts = _smooth_noise(rng, height, width, height // 22, width // 34)
    sparkle = rng.standard_normal((height, width), dtype=np.float32)
    return _blend(0.68 + 0.26 * drifts + 0.07 * sparkle, (0.70, 0.77, 0.87), (0.98, 0.98, 1.0))


def _wood(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    rows, _ = _grid(height, width)
    plank_height = np.float32(rng.uniform(22, 30))
    y = rows / plank_height + np.float32(rng.uniform())
    plank = np.floor(y)
    bend = _smooth_noise(rng, height, width, height // 9, width // 50)
    offsets = rng.uniform(0, 6, size=int(plank.max()) + 1).astype(np.float32)[plank.astype(np.intp)]
    grain = np.sin(rows * np.float32(2 * np.pi / 7) + 1.8 * bend + offsets)
    fibres = _smooth_noise(rng, height, width, height, width // 12)
    seam = np.clip((0.5 - np.abs(y - plank - 0.5)) * plank_height, 0.25, 1)[..., None]
    tone = 0.5 + 0.2 * grain + 0.14 * fibres + 0.05 * (offsets - 3)
    return _blend(tone, (0.36, 0.22, 0.11), (0.72, 0.52, 0.31)) * seam


_BACKGROUND_PAINTERS: dict[str, Callable[[np.random.Generator, int, int], np.ndarray]] = {
    "grass": _grass,
    "sand": _sand,
    "water": _water,
    "brick": _brick,
    "snow": _snow,
    "wood": _wood,
}
