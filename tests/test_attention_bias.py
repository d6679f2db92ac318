"""The heart of SAN: [SLS] tokens go where the bias says, and CLIP itself never notices."""

import contextlib
import copy
import threading

import pytest
import torch
from conftest import TINY_VISION
from torch import nn
from torch.testing import assert_close

from modeling_san.attention_bias import StreamMasks, mask_regions, recognize_regions, steered_layer
from modeling_san.clip_trunk import TrunkStates
from modeling_san.pooling import pool_attention_bias

GRID = (4, 4)
PATCHES = 16
START = 2


@pytest.fixture
def image():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def clip_hidden_states(model, image):
    """CLIP's own hidden states, from CLIP's own forward pass, all layers."""
    with torch.no_grad():
        return model.vision_model(image, output_hidden_states=True).hidden_states


def random_bias(heads=4, queries=3, batch=2, scale=2.0, seed=4):
    return scale * torch.randn(batch, heads, queries, PATCHES, generator=torch.Generator().manual_seed(seed))


def deep_layers(model):
    return model.vision_model.encoder.layers[START:]


@torch.no_grad()
def recognize(model, hidden_states, biases, sls_tokens=None):
    if sls_tokens is None:
        sls_tokens = hidden_states[:, :1].expand(-1, biases[0].shape[2], -1)
    return recognize_regions(deep_layers(model), hidden_states, sls_tokens, biases)


@contextlib.contextmanager
def hooked(layers):
    """A hook on every layer, which makes them run as a whole."""
    hooks = [layer.register_forward_hook(lambda *call: None) for layer in layers]
    yield
    for hook in hooks:
        hook.remove()


def snapshot(module):
    """What a module carries beside its parameters: attribute names and every kind of hook."""
    return {
        name: (sorted(part.__dict__), [len(value) for key, value in part.__dict__.items() if key.endswith("_hooks")])
        for name, part in module.named_modules()
    }


# CLIP's own path


@pytest.mark.parametrize("whole", [False, True], ids=["in parts", "whole"])
@torch.no_grad()
def test_cls_and_patches_pass_the_deep_layers_as_if_there_were_no_sls_tokens(model, clip_hidden_states, whole):
    tokens, sls_tokens = clip_hidden_states[START], torch.randn(2, 3, 32)
    for layer, expected in zip(deep_layers(model), clip_hidden_states[START + 1 :], strict=True):
        with hooked([layer] if whole else []):
            tokens, sls_tokens = steered_layer(layer, tokens, sls_tokens, mask_regions(random_bias()))
        assert_close(tokens, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_without_a_bias_an_sls_token_becomes_cls(model, image, clip_hidden_states):
    # Its row sees itself where CLIP's row sees [CLS], and both are the same vector.
    sls = recognize(model, clip_hidden_states[START], [torch.zeros(2, 4, 3, PATCHES)])
    pooled = model.vision_model(image).pooler_output
    for query in range(3):
        assert_close(model.vision_model.post_layernorm(sls[:, query]), pooled, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_shared_hidden_states_are_clips_own(model, image, clip_hidden_states):
    states = model.trunk.encode(image, START)
    assert states.grid == GRID
    for ours, clips in zip(states.hidden_states, clip_hidden_states[: START + 1], strict=True):
        assert_close(ours, clips, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("training", [False, True])
def test_a_call_leaves_nothing_behind_on_the_model(model, class_embeds, training):
    model.train(training)
    before = snapshot(model)
    model(torch.randn(1, 3, 64, 96), class_embeds=class_embeds)
    assert snapshot(model) == before


# Who sees whom


def test_an_sls_token_does_not_see_cls(model, clip_hidden_states):
    # One deep layer: in later ones the patches have seen [CLS], which is CLIP's own doing.
    start = clip_hidden_states[START]
    sls_tokens = torch.randn(2, 3, start.shape[-1])
    changed = start.clone()
    changed[:, 0] *= -1.0
    layer = deep_layers(model)[:1]
    with torch.no_grad():
        before, after = (recognize_regions(layer, states, sls_tokens, [random_bias()]) for states in (start, changed))
    assert_close(before, after, atol=0, rtol=0)


def test_an_sls_token_does_not_see_other_sls_tokens(model, clip_hidden_states):
    start = clip_hidden_states[START]
    sls_tokens = torch.randn(2, 3, start.shape[-1])
    changed = sls_tokens.clone()
    changed[:, 1] *= -1.0
    before, after = (recognize(model, start, [random_bias()], tokens) for tokens in (sls_tokens, changed))
    assert_close(before[:, [0, 2]], after[:, [0, 2]], atol=1e-6, rtol=1e-6)
    assert (before[:, 1] - after[:, 1]).abs().max() > 0.1


def test_an_sls_token_sees_itself_and_the_patches(model, clip_hidden_states):
    start = clip_hidden_states[START]
    changed = start.clone()
    changed[:, 7] *= -1.0
    sls_tokens = torch.randn(2, 3, start.shape[-1])
    before, after = (recognize(model, states, [random_bias(scale=0)], sls_tokens) for states in (start, changed))
    assert (before - after).abs().max() > 1e-2


def test_a_strong_bias_makes_a_token_ignore_all_other_patches(model, clip_hidden_states):
    inside = torch.zeros(PATCHES, dtype=torch.bool)
    inside[[1, 2, 5, 6]] = True
    bias = torch.where(inside, 0.0, -1e4).expand(2, 4, 3, -1)
    start = clip_hidden_states[START]
    sls_tokens = torch.randn(2, 3, start.shape[-1])
    layer = deep_layers(model)[:1]
    changed_outside, changed_inside = start.clone(), start.clone()
    changed_outside[:, 1:][:, ~inside] *= -1.0
    changed_inside[:, 1:][:, inside] *= -1.0
    with torch.no_grad():
        plain, outside, within = (
            recognize_regions(layer, states, sls_tokens, [bias]) for states in (start, changed_outside, changed_inside)
        )
    assert_close(plain, outside, atol=1e-6, rtol=1e-6)
    assert (plain - within).abs().max() > 1e-2


def test_the_mask_is_the_table_of_who_sees_whom():
    inf = float("inf")
    bias = torch.tensor([[1.0, 2.0], [3.0, 4.0]])[None, None]
    expected = torch.tensor(
        [
            [0, 0, 0, -inf, -inf],
            [0, 0, 0, -inf, -inf],
            [0, 0, 0, -inf, -inf],
            [-inf, 1, 2, 0, -inf],
            [-inf, 3, 4, -inf, 0],
        ]
    )
    assert torch.equal(mask_regions(bias).as_table(3)[0, 0], expected)
    # Prompts are seen by [SLS] tokens alone; what they see themselves nobody reads
    with_prompts = mask_regions(bias, prompts=2).as_table(3)[0, 0]
    assert torch.equal(with_prompts[:5, :5], expected)
    assert torch.equal(with_prompts[:5, 5:] == 0, torch.tensor([[False]] * 3 + [[True]] * 2).expand(-1, 2))
    assert not with_prompts[5:].any()


@torch.no_grad()
def test_who_sees_whom_is_handed_in(model, clip_hidden_states):
    """Other models use other tables: here patches see their own half only, and steered tokens see [CLS] too."""
    halves = torch.arange(1 + PATCHES) > PATCHES // 2
    severed = torch.zeros(1 + PATCHES, 1 + PATCHES).masked_fill(halves != halves[:, None], float("-inf"))

    def build(bias, prompts):
        masks = mask_regions(bias, prompts)
        masks.steered[..., 0] = 0
        return StreamMasks(masks.steered, severed[None, None])

    start, sls_tokens, bias = clip_hidden_states[START], torch.randn(2, 3, 32), random_bias()
    expected = start
    for layer in deep_layers(model):
        expected = layer(expected, severed[None, None])
    tokens, sls = start, sls_tokens
    for layer in deep_layers(model):
        tokens, sls = steered_layer(layer, tokens, sls, build(bias, 0))
    assert_close(tokens, expected, atol=1e-5, rtol=1e-5)
    ours = recognize_regions(deep_layers(model), start, sls_tokens, [bias], build_masks=build)
    assert_close(ours, sls, atol=1e-5, rtol=1e-5)
    assert (ours - recognize(model, start, [bias], sls_tokens)).abs().max() > 1e-2
    with hooked(deep_layers(model)):
        whole = recognize_regions(deep_layers(model), start, sls_tokens, [bias], build_masks=build)
    assert_close(whole, ours, atol=1e-5, rtol=1e-5)


# Sets, heads and layers of biases


def test_one_bias_for_all_heads_is_that_bias_for_each_head(model, clip_hidden_states):
    shared = random_bias(heads=1)
    ours, each = (
        recognize(model, clip_hidden_states[START], [bias]) for bias in (shared, shared.expand(-1, 4, -1, -1))
    )
    assert_close(ours, each)


def test_heads_have_biases_of_their_own(model, clip_hidden_states):
    bias = random_bias()
    ours, mixed = (recognize(model, clip_hidden_states[START], [each]) for each in (bias, bias.flip(1)))
    assert (ours - mixed).abs().max() > 1e-2


def test_one_bias_for_all_layers_is_that_bias_for_each_layer(model, clip_hidden_states):
    bias = random_bias()
    start = clip_hidden_states[START]
    assert_close(recognize(model, start, [bias]), recognize(model, start, [bias, bias]))


def test_layers_take_their_biases_in_order(model, clip_hidden_states):
    first, second = random_bias(seed=5), random_bias(seed=6)
    start = clip_hidden_states[START]
    layers = deep_layers(model)
    with torch.no_grad():
        tokens = start[:, :1].expand(-1, 3, -1)
        tokens = recognize_regions(layers[:1], start, tokens, [first])
        step_by_step = recognize_regions(layers[1:], clip_hidden_states[START + 1], tokens, [second])
    assert_close(recognize(model, start, [first, second]), step_by_step, atol=1e-5, rtol=1e-5)
    assert (recognize(model, start, [second, first]) - step_by_step).abs().max() > 1e-2


@pytest.mark.parametrize("bias_layers", [1, 2])
@torch.no_grad()
def test_sets_of_biases_in_one_pass_give_what_each_gives_alone(model, clip_hidden_states, bias_layers):
    start = clip_hidden_states[START]
    sets = [2.0 * torch.randn(2, bias_layers, 4, 6, 8, 8) for _ in range(3)]
    start = TrunkStates([start], GRID)
    together = model.recognize(start, sets)
    assert len(together) == 3
    for bias, ours in zip(sets, together, strict=True):
        [alone] = model.recognize(start, [bias])
        assert_close(ours, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("token_format", ["cls_token", "learnable_token", "pos_embedding"])
@torch.no_grad()
def test_sls_tokens_start_as_configured(make_model, token_format):
    model = make_model(sls_token_format=token_format)
    hidden_states = torch.randn(2, 1 + PATCHES, 32)
    [first] = model.recognize(TrunkStates([hidden_states], GRID), [torch.zeros(2, 1, 4, 6, 8, 8)])
    spread = (first - first[:, :1]).abs().max()
    assert (spread < 1e-5) == (token_format == "cls_token")
    assert (model.sls_embedding is None) == (token_format == "cls_token")
    # [CLS] is visible to a learned token through the patches only, which one layer does not have.
    layer = deep_layers(model)[:1]
    changed = hidden_states.clone()
    changed[:, 0] *= -1.0
    starts = [model._start_sls_tokens(states[:, :1]) for states in (hidden_states, changed)]
    before, after = (
        recognize_regions(layer, hidden_states, tokens, [torch.zeros(2, 4, 6, PATCHES)]) for tokens in starts
    )
    assert torch.equal(before, after) == (token_format == "learnable_token")


def test_bias_channels_are_ordered_layer_then_head(make_model):
    model = make_model(attention_bias_layers=2, rescale_attention_bias=False)
    decoder = model.side_adapter.mask_decoder
    with torch.no_grad():
        # Only the channels of layer 1, head 2 are left: 16 channels each, 4 heads a layer.
        keep = slice((1 * 4 + 2) * 16, (1 * 4 + 3) * 16)
        for tensor in (decoder.bias_mlp.fc3.weight, decoder.bias_mlp.fc3.bias):
            kept = tensor[keep].clone()
            tensor.zero_()
            tensor[keep] = kept
        bias = decoder(torch.randn(1, 6, 24), torch.randn(1, 12, 24), (3, 4)).attention_bias
    left = bias.abs().amax(dim=(0, 3, 4, 5))
    assert left[1, 2] > 0
    assert left.count_nonzero() == 1


# Pooling


@pytest.mark.parametrize(
    ("method", "expected"), [("max", [5.0, 7, 13, 15]), ("avg", [2.5, 4.5, 10.5, 12.5]), ("nearest", [0.0, 2, 8, 10])]
)
def test_pooling_takes_the_largest_the_mean_or_the_first_corner_of_each_patch(method, expected):
    bias = torch.arange(16.0).view(1, 1, 1, 4, 4)
    assert torch.equal(pool_attention_bias(bias, (2, 2), method)[0, 0, 0], torch.tensor(expected))


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
def test_interpolation_keeps_a_slope_a_slope(method):
    bias = torch.arange(12.0).expand(1, 1, 1, 12, 12)
    pooled = pool_attention_bias(bias, (6, 6), method).view(6, 6)
    assert_close(pooled[:, 1:-1], torch.tensor([2.5, 4.5, 6.5, 8.5]).expand(6, -1))


@pytest.mark.parametrize("method", ["max", "avg", "nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(2, 3), (4, 6), (5, 5), (8, 12)])
def test_pooling_keeps_a_constant_and_the_order_of_queries(method, size):
    bias = torch.arange(2.0 * 3 * 5).view(2, 3, 5, 1, 1).expand(-1, -1, -1, 4, 6).contiguous()
    pooled = pool_attention_bias(bias, size, method)
    assert_close(pooled, bias[..., 0, :1].expand(-1, -1, -1, size[0] * size[1]))


@pytest.mark.parametrize("method", ["avg", "nearest", "bilinear", "bicubic"])
def test_the_configured_pooling_is_used(make_model, class_embeds, method):
    image = torch.randn(1, 3, 128, 96)
    largest, other = (make_model(attention_bias_pooling=name) for name in ("max", method))
    logits = [model(image, class_embeds=class_embeds).class_queries_logits for model in (largest, other)]
    assert (logits[0] - logits[1]).abs().max() > 1e-3


# Attention implementations, precision, threads


def test_eager_and_sdpa_agree(make_model, class_embeds):
    sdpa, eager = make_model(attn_implementation="sdpa"), make_model(attn_implementation="eager")
    assert eager.vision_model.config._attn_implementation == "eager"
    assert sdpa.vision_model.config._attn_implementation == "sdpa"
    image = torch.randn(2, 3, 96, 128)
    ours, theirs = (model(image, class_embeds=class_embeds) for model in (eager, sdpa))
    for name in ("masks_queries_logits", "attention_bias", "mask_embeds", "class_queries_logits"):
        assert_close(ours[name], theirs[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_says_nearly_the_same(make_model, class_embeds, dtype, implementation):
    model = make_model(attn_implementation=implementation)
    image = torch.randn(2, 3, 96, 128)
    exact = model(image, class_embeds=class_embeds)
    rough = model.to(dtype)(image, class_embeds=class_embeds)
    assert rough.masks_queries_logits.dtype == dtype
    for name in ("masks_queries_logits", "attention_bias", "class_queries_logits"):
        assert rough[name].isfinite().all()
    cosine = nn.functional.cosine_similarity(rough.mask_embeds.float(), exact.mask_embeds, dim=-1)
    assert cosine.min() > 0.98
    agree = (rough.class_queries_logits.argmax(-1) == exact.class_queries_logits.argmax(-1)).float().mean()
    assert agree > 0.9
    with torch.enable_grad():
        model.train()(image, class_embeds=class_embeds, labels=torch.randint(0, 5, (2, 96, 128))).loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


@torch.no_grad()
def test_threads_that_share_a_model_get_what_each_gets_alone(model, class_embeds):
    # Different sizes, vocabularies and wishes, so that anything the calls shared would not even fit.
    calls = [
        {
            "pixel_values": torch.randn(1, 3, 64 + 32 * index, 96),
            "class_embeds": class_embeds[: 2 + index],
            "output_hidden_states": index == 1,
        }
        for index in range(3)
    ]
    alone = [model(**call) for call in calls]
    results = {}

    def work(index):
        with torch.no_grad():
            results[index] = [model(**calls[index]) for _ in range(4)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, expected in enumerate(alone):
        for outputs in results[index]:
            assert_close(outputs.class_queries_logits, expected.class_queries_logits, atol=1e-5, rtol=1e-5)
            assert_close(outputs.masks_queries_logits, expected.masks_queries_logits, atol=1e-5, rtol=1e-5)
            assert len(outputs.hidden_states or ()) == (5 if index == 1 else 0)


# Gradient checkpointing


def count_layer_calls(model, monkeypatch):
    """Count forward passes of MLPs in CLIP and the side adapter from here on; layers in parts have one a stream."""
    counts = {"clip": 0, "side": 0}
    for kind, layer in (("clip", model.vision_model.encoder.layers[0]), ("side", model.side_adapter.layers[0])):
        mlp_type = type(layer.mlp)
        forward = mlp_type.forward

        def counting(self, *args, _forward=forward, _kind=kind, **kwargs):
            counts[_kind] += 1
            return _forward(self, *args, **kwargs)

        monkeypatch.setattr(mlp_type, "forward", counting)
    return counts


def gradients_of(model, image, class_embeds, labels):
    torch.manual_seed(7)
    model.zero_grad()
    model(image, class_embeds=class_embeds, labels=labels).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("trainable", [["vision_model.embeddings.position_embedding"], ["vision_model"]])
def test_checkpointing_recomputes_layers_and_keeps_the_gradients(make_model, class_embeds, monkeypatch, trainable):
    model = make_model(trainable_clip_parameters=trainable).train()
    image, labels = torch.randn(2, 3, 64, 64), torch.randint(0, 5, (2, 64, 64))
    counts = count_layer_calls(model, monkeypatch)
    plain = gradients_of(model, image, class_embeds, labels)
    assert counts == {"clip": 4 + 1, "side": 3}
    model.gradient_checkpointing_enable()
    checkpointed = gradients_of(model, image, class_embeds, labels)
    # Twice each layer, the frozen ones of CLIP too, which run as a whole
    assert counts == {"clip": 5 + 8, "side": 3 + 6}
    model.eval()(image, class_embeds=class_embeds)
    assert counts == {"clip": 13 + 5, "side": 9 + 3}
    for name, gradient in plain.items():
        assert_close(checkpointed[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


# torch.compile


SHALLOW = {
    "vision_config": {**TINY_VISION, "num_hidden_layers": 2},
    "sls_start_layer": 1,
    "fusion_map": [[0, 0], [1, 1]],
    "side_num_layers": 1,
    "deep_supervision_layers": [1],
}


@pytest.fixture
def shallow_model(make_model):
    """One layer of each kind on each side of every choice: compiling takes its time layer by layer."""
    torch.compiler.reset()
    yield make_model(**SHALLOW)
    torch.compiler.reset()


@pytest.mark.slow
@torch.no_grad()
def test_it_compiles_with_what_the_processor_makes_for_images_of_one_size(shallow_model, processor):
    images = [torch.randint(0, 256, (3, 90, 120), dtype=torch.uint8) for _ in range(2)]
    inputs = processor(images=images, text=["sky", "road|car"], do_resize=False)
    compiled = torch.compile(copy.deepcopy(shallow_model), fullgraph=True, backend="eager")
    ours, expected = compiled(**inputs), shallow_model(**inputs)
    assert_close(ours.class_queries_logits, expected.class_queries_logits, atol=1e-4, rtol=1e-4)
    assert_close(ours.masks_queries_logits, expected.masks_queries_logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(ours.image_sizes, inputs["image_sizes"])
    # The graph cannot branch on sizes: other ones are refused rather than answered wrongly.
    inputs["image_sizes"] = torch.tensor([[90, 120], [32, 96]])
    with pytest.raises((RuntimeError, AssertionError), match="one padded size at a time"):
        compiled(**inputs)
