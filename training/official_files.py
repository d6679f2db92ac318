"""Where the official archives of the benchmarks keep things, and what their stored values mean."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from modeling_san.processing.vocabulary_san import load_vocabulary
from modeling_san.processing.wording_san import listed, one_line

_LISTED = 12
_UNKNOWN = -1
_BYTE_IGNORE = 255

# The list of ADE20K_2021_17_01 names 3688 classes; the 847 most frequent make up the benchmark.
_ADE_FULL_CLASSES = 3688

# What Pascal-Context's files call some of its 59 classes, and what its list of 459 calls them.
_CONTEXT_SYNONYMS = {"diningtable": "table", "bedcloth": "bedclothes", "clothes": "cloth"}

# Order of 59_labels.txt, which the PNG files of 59_context_labels.tar.gz count from 1 in: VOC's 20 classes, then the
# others. https://cs.stanford.edu/~roozbeh/pascal-context
# fmt: off
_CONTEXT_59_ORDER = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor", "bag", "bed", "bench",
    "book", "building", "cabinet", "ceiling", "cloth", "computer", "cup", "door", "fence", "floor", "flower",
    "food", "grass", "ground", "keyboard", "light", "mountain", "mouse", "curtain", "platform", "sign", "plate",
    "road", "rock", "shelves", "sidewalk", "sky", "snow", "bedclothes", "track", "tree", "truck", "wall",
    "water", "window", "wood",
)
# fmt: on


class MissingFolderError(ValueError):
    """A folder or list that a split needs is not where the official archive has it."""


class UnreadableFileError(ValueError):
    """An image or label map is damaged, or the two do not belong together."""


class UnknownValueError(ValueError):
    """A label map holds a value that its data set does not define."""


@dataclass(frozen=True)
class Pair:
    """One image and the file of its labels."""

    image: Path
    label_map: Path


@dataclass(frozen=True)
class LabelReader:
    """
    Reads one release's label files as class indices.

    Attributes:
        decode: reads a file as stored values, integers `(height, width)`.
        table: class index, or the ignore label, of each stored value; -1 where the data set defines none. `(values,)`
        ignore_index: stands for "no class".
    """

    decode: Callable[[Path], np.ndarray]
    table: np.ndarray
    ignore_index: int

    def read(self, path: Path) -> np.ndarray:
        """
        Read one label file.

        Returns:
            class indices `(height, width)`, uint8 where the ignore label is 255, else uint16.

        Raises:
            UnreadableFileError: it cannot be decoded.
            UnknownValueError: it holds a value that is not in the table.
        """
        values = self.decode(path)
        inside = (values >= 0) & (values < len(self.table))
        labels = np.take(self.table, values, mode="clip")
        known = inside & (labels != _UNKNOWN)
        if not known.all():
            strange = np.unique(values[~known])
            raise UnknownValueError(
                f"{path} holds the value{'s' if len(strange) > 1 else ''} {listed(strange, _LISTED)}, to which this "
                "data set gives no meaning: use the official label files, not converted ones."
            )
        return labels.astype(np.uint8 if self.ignore_index == _BYTE_IGNORE else np.uint16)


@dataclass(frozen=True)
class FoundSplit:
    """
    The files of one split.

    Attributes:
        pairs: images with their label maps, in a fixed order.
        without_label_map: names of images that have none.
        without_image: names of label maps, or of entries in the official list, that have no image.
        reader: reads the label maps.
        layout: which of the known layouts was found, for the data set's card.
    """

    pairs: tuple[Pair, ...]
    without_label_map: tuple[str, ...]
    without_image: tuple[str, ...]
    reader: LabelReader
    layout: str


def find_files(name: str, source: Path, split: str) -> FoundSplit:
    """
    The files of a split in the folder into which official archives were unpacked.

    Args:
        name: of the preset.
        source: the folder, or the one that holds it.
        split: "train", "validation", or "train_aug" of Pascal VOC.

    Raises:
        MissingFolderError: a folder or list is not there; the message says where it was looked for.
        ValueError: `source` is no folder, or a list in it cannot be read.
    """
    return _FINDERS[name](source, split)


def _find_coco(source: Path, split: str) -> FoundSplit:
    folder = {"train": "train2017", "validation": "val2017"}[split]
    roots = ("", "coco", "coco_stuff164k")
    images = _folder(source, roots, (folder, f"images/{folder}"), ".jpg")
    maps = _folder(
        source,
        roots,
        # The archive stuffthingmaps_trainval2017.zip unpacks to train2017 and val2017, as the images' do.
        (f"stuffthingmaps/{folder}", f"stuffthingmaps_trainval2017/{folder}", f"annotations/{folder}", folder),
        ".png",
    )
    vocabulary = load_vocabulary("coco_stuff_171")
    # Things keep COCO's ids from 1, label maps store them from 0.
    stored = {source_id - 1: index for index, source_id in enumerate(vocabulary.source_ids or ())}
    # Another tool writes its own maps beside the official ones.
    official = {
        name: path
        for name, path in _by_stem(maps, ".png").items()
        if not name.endswith(("_labelTrainIds", "_instanceTrainIds"))
    }
    return _paired(
        _by_stem(images, ".jpg"),
        official,
        LabelReader(_read_values, _table({**stored, 255: vocabulary.ignore_index}), vocabulary.ignore_index),
        "pixel values of stuffthingmaps, plus 1, are COCO-Stuff's ids; 255 = no label",
    )


def _find_ade_150(source: Path, split: str) -> FoundSplit:
    folder = {"train": "training", "validation": "validation"}[split]
    roots = ("", "ADEChallengeData2016")
    images = _folder(source, roots, (f"images/{folder}",), ".jpg")
    maps = _folder(source, roots, (f"annotations/{folder}",), ".png")
    return _paired(
        _by_stem(images, ".jpg"),
        _by_stem(maps, ".png"),
        _shifted_reader("ade20k_150", _read_values),
        "pixel values of annotations, less 1; 0 = no label",
    )


def _find_ade_847(source: Path, split: str) -> FoundSplit:
    folder = {"train": "training", "validation": "validation"}[split]
    # Releases before 2021 have images/training, and number the classes otherwise.
    root = _folder(source, ("", "ADE20K_2021_17_01"), (f"images/ADE/{folder}", f"ADE/{folder}"), None)
    images: dict[str, Path] = {}
    maps: dict[str, Path] = {}
    for place, folders, files in os.walk(root):
        folders.sort()
        here = Path(place).relative_to(root).as_posix()
        for file in files:
            if file.startswith("."):
                continue
            if file.endswith("_seg.png"):
                maps[f"{here}/{file.removesuffix('_seg.png')}"] = Path(place, file)
            elif file.lower().endswith(".jpg"):
                images[f"{here}/{Path(file).stem}"] = Path(place, file)
    vocabulary = load_vocabulary("ade20k_847")
    # Ids as the released models' preparation reads them: places in the full list, from 1. It also shrinks
    # images and label maps to a short side of 512 pixels; here they keep their size.
    known = {source_id: index for index, source_id in enumerate(vocabulary.source_ids or ())}
    # Most of the classes of the full list are none of the 847.
    others = dict.fromkeys(range(_ADE_FULL_CLASSES + 1), vocabulary.ignore_index)
    return _paired(
        images,
        maps,
        LabelReader(_read_ade_colors, _table({**others, **known}), vocabulary.ignore_index),
        "red // 10 * 256 + green of *_seg.png is the id in the full list; classes outside the 847 = no label; "
        "images and label maps in full size",
    )


def _find_voc(source: Path, split: str) -> FoundSplit:
    root = _voc_root(source, "VOC2012")
    augmented = split == "train_aug"
    lists = {"train": ("train",), "validation": ("val",), "train_aug": ("train_aug", "trainaug")}[split]
    names = _read_list(_first_file(root, tuple(f"ImageSets/Segmentation/{name}.txt" for name in lists)))
    maps = _folder(root, ("",), ("SegmentationClassAug" if augmented else "SegmentationClass",), ".png")
    return _listed_pairs(
        names,
        _by_stem(root / "JPEGImages", ".jpg"),
        _by_stem(maps, ".png"),
        _shifted_reader("pascal_voc_20", _read_values, no_label=(0, 255)),
        f"palette indices of {maps.name}, less 1; background (0) and 255 = no label",
    )


def _find_context_459(source: Path, split: str) -> FoundSplit:
    maps = _folder(source, _voc_roots("VOC2010"), ("trainval",), ".mat")
    reader = _shifted_reader("pascal_context_459", _read_matlab)
    return _context_pairs(source, split, _by_stem(maps, ".mat"), reader, "LabelMap of trainval/*.mat, less 1")


def _find_context_59(source: Path, split: str) -> FoundSplit:
    roots = _voc_roots("VOC2010")
    for folder, suffix, make_reader, layout in _CONTEXT_59_RELEASES:
        try:
            maps = _folder(source, roots, (folder,), suffix)
        except MissingFolderError:
            continue
        return _context_pairs(source, split, _by_stem(maps, suffix), make_reader(maps.parent), layout)
    looked_for = ", ".join(f"{folder}/*{suffix}" for folder, suffix, *_ in _CONTEXT_59_RELEASES)
    raise MissingFolderError(
        f"{source} holds no label files of Pascal-Context: looked for {looked_for} in {_places(roots)}; "
        f"{_what_is_in(source)}."
    )


def _context_pairs(source: Path, split: str, maps: dict[str, Path], reader: LabelReader, layout: str) -> FoundSplit:
    root = _voc_root(source, "VOC2010")
    name = {"train": "train", "validation": "val"}[split]
    list_file = _first_file(
        root,
        (
            f"ImageSets/SegmentationContext/{name}.txt",
            f"pascalcontext_{name}.txt",
            f"pascal_context_{name}.txt",
            # All images of VOC2010's own lists are labelled.
            f"ImageSets/Main/{name}.txt",
        ),
    )
    layout = f"{layout}; 0 = no label; split by {list_file.relative_to(root).as_posix()}"
    return _listed_pairs(_read_list(list_file), _by_stem(root / "JPEGImages", ".jpg"), maps, reader, layout)


def _reader_of_459(_: Path) -> LabelReader:
    """Finds each of the 459 ids among the 59 classes by name."""
    few, many = load_vocabulary("pascal_context_59"), load_vocabulary("pascal_context_459")
    ids = {name: index + 1 for index, name in enumerate(many.classes)}
    named = {ids[_CONTEXT_SYNONYMS.get(name, name)]: index for index, name in enumerate(few.classes)}
    others = dict.fromkeys(range(len(many) + 1), few.ignore_index)
    return LabelReader(_read_matlab, _table({**others, **named}), few.ignore_index)


def _reader_of_59_labels(folder: Path) -> LabelReader:
    """Reads the official PNG files, by the names in 59_labels.txt where it is at hand."""
    vocabulary = load_vocabulary("pascal_context_59")
    indices = {_CONTEXT_SYNONYMS.get(name, name): index for index, name in enumerate(vocabulary.classes)}
    path = folder / "59_labels.txt"
    entries = dict(enumerate(_CONTEXT_59_ORDER, start=1))
    if path.is_file():
        lines = [line.partition(":") for line in _read_text(path).splitlines() if ":" in line]
        entries = {int(number): name.replace(" ", "") for number, _, name in lines if number.strip().isdigit()}
    named = {number: indices.get(_CONTEXT_SYNONYMS.get(name, name), _UNKNOWN) for number, name in entries.items()}
    if sorted(named) != list(range(1, 60)) or set(named.values()) != set(range(59)):
        raise ValueError(f"{path} does not number Pascal-Context's 59 classes from 1 to 59, one `1: name` a line.")
    return LabelReader(_read_values, _table({0: vocabulary.ignore_index, **named}), vocabulary.ignore_index)


def _shifted_reader(name: str, decode: Callable[[Path], np.ndarray], no_label: tuple[int, ...] = (0,)) -> LabelReader:
    """Class c is stored as c + 1."""
    vocabulary = load_vocabulary(name)
    classes = {index + 1: index for index in range(len(vocabulary))}
    table = _table({**dict.fromkeys(no_label, vocabulary.ignore_index), **classes})
    return LabelReader(decode, table, vocabulary.ignore_index)


def _table(entries: Mapping[int, int]) -> np.ndarray:
    """Class index of each stored value, see `LabelReader`."""
    table = np.full(max(entries) + 1, _UNKNOWN, dtype=np.int32)
    table[list(entries)] = list(entries.values())
    return table


def _read_values(path: Path) -> np.ndarray:
    """Values of a grey PNG file, or indices of a palette one."""
    return _read_png(path, bands=1, expected="one channel").astype(np.int32)


def _read_ade_colors(path: Path) -> np.ndarray:
    """Ids in ADE20K's full list, which its files code as colours."""
    colors = _read_png(path, bands=3, expected="RGB")
    return colors[..., 0].astype(np.int32) // 10 * 256 + colors[..., 1]


def _read_png(path: Path, bands: int, expected: str) -> np.ndarray:
    try:
        with Image.open(path, formats=("PNG",)) as image:
            if len(image.getbands()) != bands:
                raise ValueError(f"it has mode {image.mode}, expected {expected}")
            return np.asarray(image)
    except (ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UnreadableFileError(f"{path} cannot be read as a label map: {one_line(error)}.") from error


def _read_matlab(path: Path) -> np.ndarray:
    """The matrix LabelMap of a MATLAB file."""
    from scipy.io import loadmat

    try:
        values = loadmat(path, variable_names=["LabelMap"])["LabelMap"]
    except KeyError as error:
        raise UnreadableFileError(f"{path} holds no matrix LabelMap: expected a file of Pascal-Context.") from error
    except Exception as error:
        # The reader raises whatever a damaged file makes it stumble over.
        raise UnreadableFileError(f"{path} cannot be read as a MATLAB file: {one_line(error)}.") from error
    if values.ndim != 2 or values.dtype.kind not in "ui" or values.size == 0:
        raise UnreadableFileError(
            f"{path}: LabelMap is of type {values.dtype} and shape {values.shape}: expected integers (height, width)."
        )
    return values.astype(np.int64)


def _folder(source: Path, roots: Sequence[str], names: Sequence[str], suffix: str | None) -> Path:
    """The first of the folders that holds a file that ends with `suffix`, or anything if that is None."""
    if not source.is_dir():
        what = "is a file" if source.is_file() else "does not exist"
        raise ValueError(f"{source} {what}: pass the folder into which the official archives were unpacked.")
    for root in roots:
        for name in names:
            folder = source / root / name
            if folder.is_dir() and (any(folder.iterdir()) if suffix is None else _by_stem(folder, suffix)):
                return folder
    files = "" if suffix is None else f" with {suffix} files"
    raise MissingFolderError(
        f"{source} has no folder {' or '.join(names)}{files}; looked in {_places(roots)}; {_what_is_in(source)}."
    )


def _voc_roots(year: str) -> tuple[str, ...]:
    return ("", year, f"VOCdevkit/{year}")


def _voc_root(source: Path, year: str) -> Path:
    return _folder(source, _voc_roots(year), ("JPEGImages",), ".jpg").parent


def _first_file(root: Path, names: Sequence[str]) -> Path:
    for name in names:
        if (root / name).is_file():
            return root / name
    raise MissingFolderError(f"{root} has no list {' or '.join(names)}, which says what belongs to the split.")


def _places(roots: Iterable[str]) -> str:
    return ", ".join("the folder itself" if root == "" else root for root in roots)


def _what_is_in(source: Path) -> str:
    names = sorted(f"{path.name}/" if path.is_dir() else path.name for path in source.iterdir())
    return f"it holds {listed(names, _LISTED)}" if names else "it is empty"


def _by_stem(folder: Path, suffix: str) -> dict[str, Path]:
    """Files of a folder by name without suffix."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if not entry.name.startswith(".")]
    return {name[: -len(suffix)]: folder / name for name in names if name.lower().endswith(suffix)}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text file in UTF-8.") from error


def _read_list(path: Path) -> list[str]:
    """Image names of an official list: the first word of each line, without folder and suffix."""
    words = (line.split()[0] for line in _read_text(path).splitlines() if line.strip())
    names = list(dict.fromkeys(PurePosixPath(word).stem for word in words))
    if not names:
        raise ValueError(f"{path} is empty: expected the name of one image a line.")
    return names


def _paired(images: dict[str, Path], maps: dict[str, Path], reader: LabelReader, layout: str) -> FoundSplit:
    """Images and label maps of one folder each."""
    return FoundSplit(
        pairs=tuple(Pair(images[name], maps[name]) for name in sorted(images.keys() & maps.keys())),
        without_label_map=tuple(sorted(images.keys() - maps.keys())),
        without_image=tuple(sorted(maps.keys() - images.keys())),
        reader=reader,
        layout=layout,
    )


def _listed_pairs(
    names: Sequence[str], images: dict[str, Path], maps: dict[str, Path], reader: LabelReader, layout: str
) -> FoundSplit:
    """Images and label maps that an official list names."""
    return FoundSplit(
        pairs=tuple(Pair(images[name], maps[name]) for name in names if name in images and name in maps),
        without_label_map=tuple(name for name in names if name in images and name not in maps),
        without_image=tuple(name for name in names if name not in images),
        reader=reader,
        layout=layout,
    )


_CONTEXT_59_RELEASES: tuple[tuple[str, str, Callable[[Path], LabelReader], str], ...] = (
    ("trainval", ".mat", _reader_of_459, "LabelMap of trainval/*.mat, mapped by class name"),
    (
        "SegmentationClassContext",
        ".png",
        lambda _: _shifted_reader("pascal_context_59", _read_values),
        "pixel values of SegmentationClassContext (alphabetical), less 1",
    ),
    (
        "59_context_labels",
        ".png",
        _reader_of_59_labels,
        "pixel values of 59_context_labels, mapped by class name",
    ),
)
"""Folder, ending, reader and description of the label files in which Pascal-Context was released."""

_FINDERS = {
    "coco_stuff_171": _find_coco,
    "ade20k_150": _find_ade_150,
    "ade20k_847": _find_ade_847,
    "pascal_context_59": _find_context_59,
    "pascal_context_459": _find_context_459,
    "pascal_voc_20": _find_voc,
}

__all__ = [
    "FoundSplit",
    "LabelReader",
    "MissingFolderError",
    "Pair",
    "UnknownValueError",
    "UnreadableFileError",
    "find_files",
]
