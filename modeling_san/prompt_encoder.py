# Copyright 2026 The modeling-san authors. Licensed under the Apache License, Version 2.0.
"""Many prompts through CLIP's text encoder at once, without computing anything twice.

CLIP's text encoder is causal: prompts that begin alike, as those of one template do, have the same hidden states as
far as they do. So they are merged into a tree in which every beginning is one node, and layers run on the nodes: 4.2
tokens a prompt for COCO-Stuff in 14 templates, instead of 13. Attention alone gathers whole prompts, and the last
layer runs on their ends. An encoder with gradients, hooks or wrappers runs as a whole instead.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .clip_trunk import attend, find_prompt_ends, keys_and_values, text_layers_in_parts, update


@dataclass(frozen=True)
class PromptTree:
    """
    Prompts merged where they begin alike.

    Attributes:
        token_ids: `(nodes,)`, the last token of the beginning that a node stands for.
        positions: `(nodes,)`, its position.
        path: `(prompts, tokens)`, the nodes of each prompt in order; behind its end any node.
        found_at: `(nodes,)`, a place in the flattened `path` where each node is.
        ends: `(prompts,)`, the position of each prompt's end.
    """

    token_ids: Tensor
    positions: Tensor
    path: Tensor
    found_at: Tensor
    ends: Tensor


def make_prompt_tree(input_ids: Tensor, ends: Tensor) -> PromptTree:
    """Merge prompts `(prompts, tokens)`; `ends` `(prompts,)` are the positions of their last tokens that count."""
    prompts = torch.arange(len(input_ids), device=input_ids.device)
    vocabulary = int(input_ids.max()) + 1
    longest = int(ends.max()) + 1
    path = input_ids.new_zeros(len(input_ids), longest)
    found_at, first_node = [], 0
    before = torch.zeros_like(prompts)
    for position in range(longest):
        going_on = prompts[ends >= position]
        # Two beginnings are the same where all tokens but the last are the same node, and the last one is the same
        beginnings = before[going_on] * vocabulary + input_ids[going_on, position]
        distinct, node = beginnings.unique(return_inverse=True)
        path[going_on, position] = first_node + node
        before[going_on] = node
        found_at.append(torch.empty_like(distinct).scatter_(0, node, going_on * longest + position))
        first_node += len(distinct)
    found = torch.cat(found_at)
    return PromptTree(input_ids[:, :longest].flatten()[found], found % longest, path, found, ends)


def encode_prompts(text_model: Any, input_ids: Tensor) -> Tensor:
    """
    What `text_model(input_ids).pooler_output` is, for prompts that have much in common.

    Args:
        text_model: a `CLIPTextModel`.
        input_ids: `(prompts, tokens)`.

    Returns:
        `(prompts, width)`, the hidden state of each prompt's end-of-text token.
    """
    layers = text_layers_in_parts(text_model)
    if layers is None:
        return text_model(input_ids).pooler_output
    tree = make_prompt_tree(input_ids, find_prompt_ends(text_model, input_ids))
    nodes = text_model.embeddings(tree.token_ids[:, None], tree.positions[:, None]).transpose(0, 1)
    order = torch.arange(tree.path.shape[1], device=input_ids.device)
    # As numbers to add, in the model's precision
    later, behind = (
        torch.zeros_like(hidden, dtype=nodes.dtype).masked_fill(hidden, float("-inf"))
        for hidden in ((order > order[:, None])[None, None], (order > tree.ends[:, None])[:, None, None])
    )
    ends = tree.path.gather(1, tree.ends[:, None])[:, 0]
    for layer in layers[:-1]:
        nodes = update(layer, nodes, functools.partial(_attend_along_paths, layer, nodes, tree, later))
    last = layers[-1]
    key, value = keys_and_values(last, nodes)

    def attend_from_ends(query: Tensor) -> Tensor:
        return attend(last, query.transpose(0, 1), key[0][tree.path], value[0][tree.path], behind).transpose(0, 1)

    return text_model.final_layer_norm(update(last, nodes[:, ends], attend_from_ends)[0])


def _attend_along_paths(layer: Any, nodes: Tensor, tree: PromptTree, later: Tensor, query: Tensor) -> Tensor:
    """What each node gathers from those before it on its path: `(1, nodes, width)`."""
    key, value = keys_and_values(layer, nodes)
    gathered = attend(layer, query[0][tree.path], key[0][tree.path], value[0][tree.path], later)
    return gathered.flatten(0, 1)[tree.found_at][None]


__all__ = ["PromptTree", "encode_prompts", "make_prompt_tree"]
