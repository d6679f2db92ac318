"""The six benchmark label sets that official archives can be turned into: what they are called, and how large."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from modeling_san.processing.vocabulary_san import ClassList, load_vocabulary, vocabulary_names


@dataclass(frozen=True)
class Preset:
    """
    One of the six label sets.

    Attributes:
        name: what `load_vocabulary` calls the label set.
        title: what its authors call it.
        homepage: where its archives are.
        counts: official number of images of each split; two where two official lists are in use.
        expected: layout of the official archives, in words.
    """

    name: str
    title: str
    homepage: str
    counts: Mapping[str, tuple[int, ...]]
    expected: str

    @property
    def vocabulary(self) -> ClassList:
        """Class names and ignore label."""
        return load_vocabulary(self.name)


def load_preset(name: str) -> Preset:
    """
    The preset of a label set.

    Args:
        name: such as "ade20k_150"; `vocabulary_names` lists all.

    Raises:
        ValueError: there is none of that name; the message lists those there are.
    """
    for preset in PRESETS:
        if preset.name == name:
            return preset
    raise ValueError(f"there is no preset {name!r}: choose one of {', '.join(vocabulary_names())}.")


_CONTEXT_COUNTS = {
    # VOC2010's own lists, and those of the PASCAL in Detail challenge, which lack two and one.
    "train": (4998, 4996),
    "validation": (5105, 5104),
}
_CONTEXT_LISTS = (
    "the lists ImageSets/SegmentationContext/{train,val}.txt (or pascalcontext_{train,val}.txt, or VOC2010's own "
    "ImageSets/Main/{train,val}.txt)"
)

PRESETS = (
    Preset(
        name="coco_stuff_171",
        title="COCO-Stuff 164K",
        homepage="https://github.com/nightrome/cocostuff",
        counts={"train": (118_287,), "validation": (5_000,)},
        expected="{train,val}2017/*.jpg (or images/...) and stuffthingmaps/{train,val}2017/*.png (or annotations/...)",
    ),
    Preset(
        name="ade20k_150",
        title="ADE20K, scene parsing challenge (ADEChallengeData2016)",
        homepage="http://sceneparsing.csail.mit.edu",
        counts={"train": (20_210,), "validation": (2_000,)},
        expected="images/{training,validation}/*.jpg and annotations/{training,validation}/*.png",
    ),
    Preset(
        name="ade20k_847",
        title="ADE20K, full (ADE20K_2021_17_01)",
        homepage="https://ade20k.csail.mit.edu",
        counts={"train": (25_574,), "validation": (2_000,)},
        expected="images/ADE/{training,validation}/**/NAME.jpg with NAME_seg.png",
    ),
    Preset(
        name="pascal_context_59",
        title="Pascal-Context, 59 classes",
        homepage="https://cs.stanford.edu/~roozbeh/pascal-context",
        counts=_CONTEXT_COUNTS,
        expected="VOC2010/JPEGImages/*.jpg with trainval/*.mat (or SegmentationClassContext/*.png, or "
        f"59_context_labels/*.png), and {_CONTEXT_LISTS}",
    ),
    Preset(
        name="pascal_context_459",
        title="Pascal-Context, 459 classes",
        homepage="https://cs.stanford.edu/~roozbeh/pascal-context",
        counts=_CONTEXT_COUNTS,
        expected=f"VOC2010/JPEGImages/*.jpg with trainval/*.mat, and {_CONTEXT_LISTS}",
    ),
    Preset(
        name="pascal_voc_20",
        title="Pascal VOC 2012",
        homepage="http://host.robots.ox.ac.uk/pascal/VOC/voc2012",
        counts={"train": (1_464,), "validation": (1_449,), "train_aug": (10_582,)},
        expected="VOC2012/JPEGImages/*.jpg, SegmentationClass/*.png and ImageSets/Segmentation/{train,val}.txt; for "
        "train_aug SegmentationClassAug/*.png and ImageSets/Segmentation/train_aug.txt",
    ),
)

__all__ = ["PRESETS", "Preset", "load_preset"]
