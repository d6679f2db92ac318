"""Prompts that begin alike are computed once, and mean what CLIP's text encoder says they mean."""

import pytest
import torch
from torch.testing import assert_close
from transformers import CLIPTextConfig, CLIPTextModel

from modeling_san.clip_trunk import find_prompt_ends
from modeling_san.prompt_encoder import encode_prompts, make_prompt_tree

EOS = 49
PAD = 0


def make_text_model(eos_token_id=EOS, attn_implementation="sdpa", dtype=torch.float32, num_hidden_layers=3):
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=4,
        max_position_embeddings=16,
        eos_token_id=eos_token_id,
        initializer_factor=5.0,
    )
    return CLIPTextModel._from_config(config, attn_implementation=attn_implementation).to(dtype).eval()


def pad(*prompts):
    longest = max(map(len, prompts))
    return torch.tensor([[*prompt, *[PAD] * (longest - len(prompt))] for prompt in prompts])


PROMPTS = pad(
    [48, 1, 2, 3, EOS],
    [48, 1, 2, 3, 4, EOS],
    [48, 1, 5, EOS],
    [48, 1, 2, 3, EOS],
    [48, EOS],
    [47, 1, 2, 3, 4, 6, 7, EOS],
    [48, 5, 2, 3, EOS, EOS, 9],
)


@torch.no_grad()
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_prompts_mean_what_the_text_encoder_says(attention, layers):
    model = make_text_model(attn_implementation=attention, num_hidden_layers=layers)
    expected = model(PROMPTS).pooler_output
    assert expected.std(0).min() > 0.01, "prompts that all mean the same would prove nothing"
    assert_close(encode_prompts(model, PROMPTS), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(4))
def test_random_prompts_mean_what_the_text_encoder_says(seed):
    model = make_text_model()
    # Few different tokens, so that beginnings meet; some prompts have no end, and are read at their first token
    prompts = torch.randint(44, 50, (60, 9), generator=torch.Generator().manual_seed(seed))
    assert_close(encode_prompts(model, prompts), model(prompts).pooler_output, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_old_configs_mean_the_highest_token_by_their_end():
    model = make_text_model(eos_token_id=2)
    assert find_prompt_ends(model, PROMPTS).tolist() == [4, 5, 3, 4, 1, 7, 4]
    assert_close(encode_prompts(model, PROMPTS), model(PROMPTS).pooler_output, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_half_precision_stays_close():
    model = make_text_model(dtype=torch.bfloat16)
    encoded = encode_prompts(model, PROMPTS)
    assert encoded.dtype == torch.bfloat16
    assert_close(encoded, model(PROMPTS).pooler_output, atol=0.1, rtol=0.1)


@torch.no_grad()
@pytest.mark.parametrize("prompts", [[[EOS]], [[48, EOS]], [[48, 3, EOS]] * 5])
def test_one_prompt_or_one_token_is_enough(prompts):
    model = make_text_model()
    prompts = torch.tensor(prompts)
    assert_close(encode_prompts(model, prompts), model(prompts).pooler_output, atol=1e-5, rtol=1e-5)


def test_every_beginning_is_one_node():
    ends = find_prompt_ends(make_text_model(), PROMPTS)
    beginnings = {
        tuple(prompt[: position + 1].tolist())
        for prompt, end in zip(PROMPTS, ends.tolist(), strict=True)
        for position in range(end + 1)
    }
    tree = make_prompt_tree(PROMPTS, ends)
    assert len(tree.token_ids) == len(beginnings)
    # Reading the nodes along a path gives the prompt back
    for prompt, path, end in zip(PROMPTS, tree.path, ends.tolist(), strict=True):
        nodes = path[: end + 1]
        assert tree.token_ids[nodes].tolist() == prompt[: end + 1].tolist()
        assert tree.positions[nodes].tolist() == list(range(end + 1))
    assert torch.equal(tree.path.flatten()[tree.found_at], torch.arange(len(beginnings)))


@pytest.mark.parametrize("changed", ["what follows the end", "the order of the prompts"])
def test_neither_padding_nor_order_counts(changed):
    model = make_text_model()
    with torch.no_grad():
        expected = encode_prompts(model, PROMPTS)
        if changed == "the order of the prompts":
            assert_close(encode_prompts(model, PROMPTS.flip(0)), expected.flip(0), atol=1e-5, rtol=1e-5)
        else:
            behind = torch.arange(PROMPTS.shape[1]) > find_prompt_ends(model, PROMPTS)[:, None]
            assert torch.equal(encode_prompts(model, PROMPTS.masked_fill(behind, 33)), expected)


def test_a_vocabulary_is_encoded_alike_with_and_without_gradients(make_model, processor):
    model = make_model(trainable_clip_parameters=["text_model", "text_projection"])
    inputs = processor(text=["sky", "red car", "car|auto", "tree"], return_tensors="pt")
    with_gradients = model.get_class_embeds(**inputs)
    assert with_gradients.requires_grad
    with torch.no_grad():
        without = model.get_class_embeds(**inputs)
    assert_close(without, with_gradients.detach(), atol=1e-5, rtol=1e-5)
