# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""Mask2Former's loss, fitted to vocabularies of any length and images of several sizes (paper, section 3.4)."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerLoss,
    dice_loss,
    sample_point,
    sigmoid_cross_entropy_loss,
)

from .configuration_san import SANConfig
from .open_vocabulary import ImageBatch


def masks_from_label_map(label_map: Tensor, num_labels: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """
    One mask for each class of a label map.

    Args:
        label_map: `(height, width)`, integer class indices.
        num_labels: C, the length of the vocabulary.
        ignore_index: value of pixels without a label.

    Returns:
        masks `(classes present, height, width)` of 0 and 1 in float32, and their classes `(classes present,)`.

    Raises:
        ValueError: where the map holds a value outside the vocabulary.
    """
    # PyTorch compares no integers of 16 bits without a sign with others
    label_map = label_map.long()
    classes = label_map.unique()
    classes = classes[classes != ignore_index]
    outside = [value for value in classes.tolist() if not 0 <= value < num_labels]
    if outside:
        raise ValueError(
            f"labels hold {outside[:5]}, but there are {num_labels} class names (0 to {num_labels - 1}) and "
            f"{ignore_index} marks pixels to ignore: pass every name the label maps use, or correct the maps."
        )
    return (label_map == classes[:, None, None]).float(), classes


class SANLoss(Mask2FormerLoss):
    """
    Matching, classification and mask terms of one decoder output.

    Cheap to make: it is built for each forward pass, because the number of classes may change with every call.

    Args:
        config: weights and point counts.
        num_labels: C, the length of the vocabulary.
    """

    def __init__(self, config: SANConfig, num_labels: int) -> None:
        weights = {
            "loss_cross_entropy": config.class_weight,
            "loss_mask": config.mask_weight,
            "loss_dice": config.dice_weight,
        }
        # The fields of Mask2FormerConfig that the loss reads have the same names, and the vocabulary is the call's
        options: Any = SimpleNamespace(**{**vars(config), "num_labels": num_labels})
        super().__init__(options, weights)
        self.mask_stride = config.mask_stride

    def forward(  # type: ignore[override] # deep supervision is the caller's, sizes are new
        self,
        masks_queries_logits: Tensor,
        class_queries_logits: Tensor,
        mask_labels: Sequence[Tensor],
        class_labels: Sequence[Tensor],
        batches: Sequence[ImageBatch],
    ) -> dict[str, Tensor]:
        """
        Compare one output with the labels.

        Args:
            masks_queries_logits: `(batch, queries, height, width)` on the side adapter's grid.
            class_queries_logits: `(batch, queries, classes + 1)`, "no object" last.
            mask_labels: for each image `(masks, H, W)` of 0 and 1.
            class_labels: for each image `(masks,)`.
            batches: the images by padded size, each of which is compared on the part of the frame that it fills.

        Returns:
            the weighted terms `loss_cross_entropy`, `loss_mask`, `loss_dice`. An image without labels adds to none.
        """
        num_masks, class_weight = self._count_over_processes(class_labels, class_queries_logits)
        stride = self.mask_stride
        matches: dict[int, Any] = {}
        logits, targets = [], []
        for batch in batches:
            labelled = [index for index in batch.indices if len(class_labels[index])]
            size = (batch.size[0] // stride, batch.size[1] // stride)
            if not labelled:
                continue
            pred_masks = masks_queries_logits[labelled][..., : size[0], : size[1]].float()
            true_masks = [self._crop(mask_labels[index], size, masks_queries_logits) for index in labelled]
            matched = self.matcher(
                pred_masks, class_queries_logits[labelled].float(), true_masks, [class_labels[i] for i in labelled]
            )
            matches.update(zip(labelled, matched, strict=True))
            pred_matched = torch.cat([masks[queries] for masks, (queries, _) in zip(pred_masks, matched, strict=True)])
            true_matched = torch.cat([masks[chosen] for masks, (_, chosen) in zip(true_masks, matched, strict=True)])
            points = self._choose_points(pred_matched)
            logits.append(sample_point(pred_matched[:, None], points, align_corners=False).squeeze(1))
            targets.append(sample_point(true_matched[:, None], points, align_corners=False).squeeze(1))

        if not matches:
            nothing = 0.0 * (masks_queries_logits.sum() + class_queries_logits.sum())
            return dict.fromkeys(self.weight_dict, nothing)
        terms = {
            "loss_cross_entropy": self._cross_entropy(class_queries_logits, class_labels, matches) / class_weight,
            "loss_mask": sigmoid_cross_entropy_loss(torch.cat(logits), torch.cat(targets), num_masks),
            "loss_dice": dice_loss(torch.cat(logits), torch.cat(targets), num_masks),
        }
        return {name: self.weight_dict[name] * term for name, term in terms.items()}

    def _count_over_processes(self, class_labels: Sequence[Tensor], class_logits: Tensor) -> tuple[Any, Tensor]:
        """
        The number of masks and the sum of the queries' class weights, which the terms are divided by.

        They are the same in every process: then the average of the processes' gradients is the gradient of all their
        images in one batch, however unevenly the masks are spread.
        """
        queries = class_logits.shape[1]
        masks = sum(map(len, class_labels))
        labelled = sum(len(classes) > 0 for classes in class_labels)
        matched = sum(min(len(classes), queries) for classes in class_labels)
        class_weight = matched + self.eos_coef * (labelled * queries - matched)
        counts = torch.tensor([float(masks), float(class_weight)], device=class_logits.device)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
            counts = counts / torch.distributed.get_world_size()
        return counts[0].clamp(min=1), counts[1].clamp(min=1e-6)

    def _cross_entropy(
        self, class_queries_logits: Tensor, class_labels: Sequence[Tensor], matches: dict[int, Any]
    ) -> Tensor:
        """Sum over the queries of labelled images, "no object" being the class of those that matched no mask."""
        no_object: Any = self.num_labels
        targets = torch.full(class_queries_logits.shape[:2], no_object, device=class_queries_logits.device)
        for index, (queries, chosen) in matches.items():
            targets[index, queries] = class_labels[index].to(targets)[chosen]
        kept = sorted(matches)
        logits = class_queries_logits[kept].float().flatten(0, 1)
        weight: Any = self.empty_weight
        return nn.functional.cross_entropy(logits, targets[kept].flatten(), weight, reduction="sum")

    @torch.no_grad()
    def _choose_points(self, masks: Tensor) -> Tensor:
        """Points in [0, 1] x [0, 1], `(masks, points, 2)`, most of them where the masks `(masks, h, w)` are unsure."""
        oversample_ratio: Any = self.oversample_ratio
        return self.sample_points_using_uncertainty(
            masks[:, None],
            self.calculate_uncertainty,
            self.num_points,
            oversample_ratio,
            self.importance_sample_ratio,
        )

    @staticmethod
    def _crop(true_masks: Tensor, size: tuple[int, int], pred_masks: Tensor) -> Tensor:
        """The part of `true_masks` that `size` cells of the side grid cover, on the device of `pred_masks`."""
        rows = true_masks.shape[-2] * size[0] // pred_masks.shape[-2]
        columns = true_masks.shape[-1] * size[1] // pred_masks.shape[-1]
        return true_masks[:, :rows, :columns].to(pred_masks.device, torch.float32)


__all__ = ["SANLoss", "masks_from_label_map"]
