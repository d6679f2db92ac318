"""Every stage equals the reference implementation's, from pixels to label maps and to gradients.

The reference's weights are made from names and shapes, converted, and run on the reference's images; what is
compared was computed by the reference itself.
"""

import json
import math
import re

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close
from transformers.models.mask2former.modeling_mask2former import Mask2FormerHungarianMatcher

from modeling_san.conversion import convert_checkpoint

pytestmark = pytest.mark.slow

CASES = ["tiny_128x128", "tiny_96x150", "vit_b_16_427x640", "vit_b_16_640x640", "vit_l_14_640x640"]


def convert(weights, folder, name, rename=None):
    """The converted model of `tiny`, `vit_b_16` or `vit_l_14`; released ones are recognised from their shapes."""
    state_dict = weights.make_state_dict(folder / f"{name}_shapes.json")
    reference_config = json.loads((folder / "tiny_config.json").read_text()) if name == "tiny" else None
    return convert_checkpoint(rename(state_dict) if rename else state_dict, reference_config)


class Case:
    """One image of the reference, and the same image's way through the converted model."""

    def __init__(self, name, model, folder, weights, processor):
        facts = json.loads((folder / f"{name}.json").read_text())
        self.model, self.processor = model, processor
        self.expected = load_file(folder / f"{name}.safetensors")
        self.whole = facts["stored"] == "whole"
        self.size = (facts["image"]["height"], facts["image"]["width"])
        image = weights.make_image(**facts["image"])
        self.inputs = processor(images=image, text=facts["vocabulary"], do_resize=False)
        self.side_tokens = []
        hook = model.side_adapter.layers[-1].register_forward_hook(lambda *call: self.side_tokens.append(call[-1]))
        with torch.no_grad():
            self.outputs = model(**self.inputs)
            self.clip_pixels = model.shrink_for_clip(self.inputs["pixel_values"])
            self.clip_states = model.trunk.encode(self.clip_pixels, model.config.sls_start_layer)
        hook.remove()

    def check(self, name, tensor, tolerance=1e-4):
        """Compare with a stored tensor, which may be every k-th element only."""
        expected = self.expected[name]
        if self.whole:
            assert tensor.shape == expected.shape
        else:
            tensor = tensor.flatten()[:: math.ceil(tensor.numel() / 20000)]
        assert_close(tensor, expected, atol=tolerance, rtol=0, msg=lambda text: f"{name}: {text}")


@pytest.fixture(scope="module")
def converted(reference, reference_weights):
    """Converted models, one at a time: the largest takes 2 GB."""
    held = {}

    def get(name):
        if name not in held:
            held.clear()
            held[name] = convert(reference_weights, reference, name)
        return held[name]

    return get


@pytest.fixture(scope="module", params=CASES)
def case(request, converted, reference, reference_weights, clip_processor):
    model = converted(request.param.rpartition("_")[0])
    return Case(request.param, model, reference, reference_weights, clip_processor)


# Stages


def test_pixel_values_equal_the_references(case):
    case.check("pixel_values", case.inputs["pixel_values"], 1e-5)
    case.check("clip_pixel_values", case.clip_pixels, 1e-5)


def test_class_embeds_equal_the_references(case):
    background = nn.functional.normalize(case.model.background_embedding.detach(), dim=-1)
    case.check("text_embeds", torch.cat([case.outputs.class_embeds, background]))


def test_clip_hidden_states_equal_the_references(case):
    layers = [int(match[1]) for name in case.expected if (match := re.fullmatch(r"clip_hidden_(\d+)", name))]
    assert sorted(layers) == [clip_layer for clip_layer, _ in case.model.config.fusion_map]
    for layer in layers:
        patches = case.clip_states.patches(layer).transpose(1, 2).unflatten(-1, case.clip_states.grid)
        case.check(f"clip_hidden_{layer}", patches, 1e-3)
        case.check(f"clip_hidden_{layer}_cls", case.clip_states.hidden_states[layer][:, :1], 1e-3)


def test_side_adapter_tokens_equal_the_references(case):
    tokens = case.side_tokens[0]
    queries = case.model.config.num_queries
    grid = case.outputs.masks_queries_logits.shape[-2:]
    case.check("side_queries", tokens[:, :queries], 1e-3)
    case.check("side_pixels", tokens[:, queries:].transpose(1, 2).unflatten(-1, grid), 1e-3)


def test_mask_logits_equal_the_references(case):
    case.check("mask_logits", case.outputs.masks_queries_logits)


def test_attention_biases_equal_the_references(case):
    stored = sorted(name for name in case.expected if name.startswith("attention_bias_"))
    assert stored == ["attention_bias_0"]
    assert case.outputs.attention_bias.shape[1] == 1
    case.check("attention_bias_0", case.outputs.attention_bias[:, 0])


def test_mask_embeds_equal_the_references(case):
    case.check("mask_embeds", case.outputs.mask_embeds)


def test_class_logits_equal_the_references(case):
    case.check("class_logits", case.outputs.class_queries_logits)


# Segmentation


def test_semantic_scores_equal_the_references(case):
    [scores] = case.processor.post_process_semantic_scores(case.outputs)
    assert scores.shape[-2:] == case.size
    case.check("semantic_scores", scores)


@pytest.mark.parametrize("name", ["segmentation", "segmentation_resized"])
def test_segmentation_equals_the_references_pixel_for_pixel(case, name):
    height, width = case.size
    target = (height, width) if name == "segmentation" else (height // 2 + 3, width // 2 + 5)
    [labels] = case.processor.post_process_semantic_segmentation(case.outputs, target_sizes=[target])
    [scores] = case.processor.post_process_semantic_scores(case.outputs, target_sizes=[target])
    best, second = scores.topk(2, dim=0).values
    clear = best - second > 1e-4
    expected = case.expected[name].long()
    assert labels.shape == expected.shape
    assert clear.float().mean() > 0.9
    assert torch.equal(labels[clear], expected[clear])


# One training step


class Step:
    """The forward and backward pass of the reference's training step."""

    def __init__(self, model, folder, weights, processor, monkeypatch):
        self.facts = json.loads((folder / "tiny_loss.json").read_text())
        self.expected = load_file(folder / "tiny_loss.safetensors")
        self.model = model.train()
        image = self.facts["image"]
        images = [weights.make_image(image["height"], image["width"], seed) for seed in image["seeds"]]
        inputs = processor(images=images, text=self.facts["vocabulary"], do_resize=False)
        self.matches = []
        match = Mask2FormerHungarianMatcher.forward

        def keep(*args, **kwargs):
            self.matches.append(match(*args, **kwargs))
            return self.matches[-1]

        monkeypatch.setattr(Mask2FormerHungarianMatcher, "forward", keep)
        monkeypatch.setattr(torch, "rand", weights.fixed_rand)
        self.outputs = model(
            **inputs,
            mask_labels=[self.expected[f"mask_labels_{index}"].float() for index in range(2)],
            class_labels=[self.expected[f"class_labels_{index}"] for index in range(2)],
        )
        self.outputs.loss.backward()


@pytest.fixture(scope="module")
def step(reference, reference_weights, clip_processor):
    model = convert(reference_weights, reference, "tiny")
    with pytest.MonkeyPatch.context() as monkeypatch:
        return Step(model, reference, reference_weights, clip_processor, monkeypatch)


@pytest.mark.parametrize("output", [0, 1])
@pytest.mark.parametrize("image", [0, 1])
def test_matching_pairs_are_the_references(step, output, image):
    queries, targets = step.matches[output][image]
    stored = [step.expected[f"match_{output}_{image}_{side}"].tolist() for side in ("queries", "targets")]
    assert set(zip(queries.tolist(), targets.tolist(), strict=True)) == set(zip(*stored, strict=True))
    assert len(queries) == len(stored[0])


@pytest.mark.parametrize("suffix", ["", "_0"])
@pytest.mark.parametrize(("ours", "theirs"), [("cross_entropy", "ce"), ("mask", "mask"), ("dice", "dice")])
def test_loss_terms_are_the_references(step, ours, theirs, suffix):
    expected = step.expected[f"weighted_loss_{theirs}{suffix}"].squeeze()
    assert_close(step.outputs.loss_dict[f"loss_{ours}{suffix}"], expected, rtol=1e-4, atol=0)


def test_total_loss_is_the_references(step):
    assert len(step.outputs.loss_dict) == 6
    assert_close(step.outputs.loss, step.expected["total"].squeeze(), rtol=1e-4, atol=0)


class Tracker:
    """Finds what a tensor of the reference becomes: converts a checkpoint whose tensors each hold one number."""

    def __init__(self, folder, weights):
        shapes = json.loads((folder / "tiny_shapes.json").read_text())
        numbers = {name: number for number, name in enumerate(shapes, start=1)}
        marked = {name: torch.full(tuple(shape), float(numbers[name])) for name, shape in shapes.items()}
        model = convert_checkpoint(marked, json.loads((folder / "tiny_config.json").read_text()))
        names = {number: name for name, number in numbers.items()}
        self.origin = {}
        for name, parameter in model.named_parameters():
            [number] = parameter.unique().tolist()
            self.origin[name] = names[number]


@pytest.fixture(scope="module")
def origin(reference, reference_weights):
    return Tracker(reference, reference_weights).origin


def test_every_gradient_norm_is_the_references(step, origin):
    norms = {
        origin[name]: parameter.grad.norm()
        for name, parameter in step.model.named_parameters()
        if parameter.requires_grad
    }
    expected = {name: torch.tensor(norm) for name, norm in step.facts["gradient_norms"].items()}
    assert norms.keys() == expected.keys()
    for name, norm in expected.items():
        assert_close(norms[name], norm, rtol=1e-3, atol=0, msg=lambda text, name=name: f"{name}: {text}")


def test_what_the_reference_freezes_is_frozen(step, origin):
    frozen = {origin[name] for name, parameter in step.model.named_parameters() if not parameter.requires_grad}
    assert frozen == set(step.facts["frozen"])
    assert all(parameter.grad is None for parameter in step.model.parameters() if not parameter.requires_grad)


# OpenMMLab's edition


def to_openmmlab(state_dict):
    """The original's tensors under the names of OpenMMLab's modules, and in their shapes."""
    whole_names = {
        "clip_visual_extractor.class_embedding": "image_encoder.cls_token",
        "clip_visual_extractor.positional_embedding": "image_encoder.pos_embed",
        "clip_visual_extractor.conv1.weight": "image_encoder.patch_embed.projection.weight",
        "side_adapter_network.vit_model.pos_embed": "decode_head.side_adapter_network.pos_embed",
        "clip_rec_head.proj": "decode_head.rec_with_attnbias.proj.weight",
        "clip_rec_head.sos_token": "decode_head.rec_with_attnbias.sos_token",
    }
    prefixes = {
        "clip_visual_extractor.resblocks": "image_encoder.layers",
        "clip_visual_extractor": "image_encoder",
        "side_adapter_network.vit_model.patch_embed.proj": "decode_head.side_adapter_network.patch_embed.projection",
        "side_adapter_network.vit_model.blocks": "decode_head.side_adapter_network.encode_layers",
        "side_adapter_network.fusion_layers": "decode_head.side_adapter_network.conv_clips",
        "side_adapter_network": "decode_head.side_adapter_network",
        "clip_rec_head.resblocks": "decode_head.rec_with_attnbias.layers",
        "clip_rec_head": "decode_head.rec_with_attnbias",
        "ov_classifier.transformer.resblocks": "text_encoder.transformer",
        "ov_classifier": "text_encoder",
    }
    # Vision layers, ViT layers of the side adapter, and mmcv's BaseTransformerLayer of the other two towers.
    encoder_layer = {
        ".ln_1.": ".ln1.",
        ".ln_2.": ".ln2.",
        ".attn.": ".attn.attn.",
        ".mlp.c_fc.": ".ffn.layers.0.0.",
        ".mlp.c_proj.": ".ffn.layers.1.",
    }
    side_layer = {
        ".norm1.": ".ln1.",
        ".norm2.": ".ln2.",
        ".attn.qkv.": ".attn.attn.in_proj_",
        ".attn.proj.": ".attn.attn.out_proj.",
        ".mlp.fc1.": ".ffn.layers.0.0.",
        ".mlp.fc2.": ".ffn.layers.1.",
    }
    base_layer = {
        ".ln_1.": ".norms.0.",
        ".ln_2.": ".norms.1.",
        ".attn.": ".attentions.0.attn.",
        ".mlp.c_fc.": ".ffns.0.layers.0.0.",
        ".mlp.c_proj.": ".ffns.0.layers.1.",
    }
    fusion = {"conv_clips.layer_": "conv_clips.", ".input_proj.0.": ".0.", ".input_proj.1.": ".1.conv."}

    renamed = {}
    for name, tensor in state_dict.items():
        if name.startswith("criterion."):
            continue
        new_name = whole_names.get(name)
        if new_name is None:
            prefix = next(prefix for prefix in prefixes if name.startswith(prefix + "."))
            new_name = prefixes[prefix] + name.removeprefix(prefix)
            if new_name.startswith("image_encoder.layers."):
                parts = encoder_layer
            elif ".encode_layers." in new_name:
                parts = side_layer
            elif ".conv_clips." in new_name:
                parts = fusion
            else:
                parts = (
                    base_layer
                    if re.search(r"(rec_with_attnbias\.layers|text_encoder\.transformer)\.", new_name)
                    else {}
                )
            for theirs, mmlab in parts.items():
                new_name = new_name.replace(theirs, mmlab)
        renamed[new_name] = tensor
    renamed["image_encoder.cls_token"] = renamed["image_encoder.cls_token"][None, None]
    renamed["image_encoder.pos_embed"] = renamed["image_encoder.pos_embed"][None]
    projection = "decode_head.rec_with_attnbias.proj.weight"
    renamed[projection] = renamed[projection].T
    return renamed


OPENMMLAB_NAMES = [
    "image_encoder.cls_token",
    "image_encoder.pos_embed",
    "image_encoder.patch_embed.projection.weight",
    "image_encoder.ln_pre.weight",
    "image_encoder.layers.3.ln1.bias",
    "image_encoder.layers.3.attn.attn.in_proj_weight",
    "image_encoder.layers.3.attn.attn.out_proj.bias",
    "image_encoder.layers.3.ffn.layers.0.0.weight",
    "image_encoder.layers.3.ffn.layers.1.bias",
    "decode_head.side_adapter_network.query_pos_embed",
    "decode_head.side_adapter_network.pos_embed",
    "decode_head.side_adapter_network.patch_embed.projection.bias",
    "decode_head.side_adapter_network.encode_layers.7.attn.attn.in_proj_bias",
    "decode_head.side_adapter_network.encode_layers.7.attn.attn.out_proj.weight",
    "decode_head.side_adapter_network.encode_layers.7.ln2.weight",
    "decode_head.side_adapter_network.encode_layers.7.ffn.layers.0.0.bias",
    "decode_head.side_adapter_network.conv_clips.2.0.weight",
    "decode_head.side_adapter_network.conv_clips.2.1.conv.bias",
    "decode_head.side_adapter_network.mask_decoder.attn_mlp.layers.2.weight",
    "decode_head.side_adapter_network.mask_decoder.bias_scaling.weight",
    "decode_head.rec_with_attnbias.proj.weight",
    "decode_head.rec_with_attnbias.ln_post.bias",
    "decode_head.rec_with_attnbias.layers.1.norms.0.weight",
    "decode_head.rec_with_attnbias.layers.1.attentions.0.attn.in_proj_weight",
    "decode_head.rec_with_attnbias.layers.1.ffns.0.layers.0.0.bias",
    "decode_head.rec_with_attnbias.layers.1.ffns.0.layers.1.bias",
    "text_encoder.positional_embedding",
    "text_encoder.text_projection",
    "text_encoder.token_embedding.weight",
    "text_encoder.ln_final.weight",
    "text_encoder.bg_embed",
    "text_encoder.logit_scale",
    "text_encoder.transformer.1.norms.1.bias",
    "text_encoder.transformer.1.attentions.0.attn.out_proj.weight",
    "text_encoder.transformer.1.ffns.0.layers.1.weight",
]


def test_the_renaming_above_makes_openmmlabs_names(reference, reference_weights):
    renamed = to_openmmlab(reference_weights.make_state_dict(reference / "tiny_shapes.json"))
    assert set(OPENMMLAB_NAMES) <= renamed.keys()
    assert not any(re.search(r"resblocks|input_proj|vit_model|clip_|ov_|\.ln_[12]|\.mlp\.", name) for name in renamed)
    assert renamed["image_encoder.cls_token"].shape == (1, 1, 64)
    assert renamed["image_encoder.pos_embed"].shape == (1, 17, 64)
    assert renamed["decode_head.rec_with_attnbias.proj.weight"].shape == (32, 64)


@pytest.mark.parametrize("left_out", [[], ["text_encoder.attn_mask"]])
def test_openmmlabs_names_give_the_same_model(reference, reference_weights, left_out):
    def rename(state_dict):
        return {name: tensor for name, tensor in to_openmmlab(state_dict).items() if name not in left_out}

    ours = convert(reference_weights, reference, "tiny").state_dict()
    theirs = convert(reference_weights, reference, "tiny", rename).state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
