"""The checks that transformers puts on its own models, for both classes."""

import copy

import pytest
import torch
from conftest import TINY, TINY_VISION
from torch import nn
from torch.testing import assert_close
from transformers import initialization

from modeling_san import SANConfig, SANForOpenVocabSegmentation, SANForSemanticSegmentation

LABELS = ["sky", "road", "red car", "tree", "truck"]
LAYERS, START, QUERIES = TINY_VISION["num_hidden_layers"], TINY["sls_start_layer"], TINY["num_queries"]
SIDE_LAYERS = TINY["side_num_layers"]
RECORDED = ("hidden_states", "attentions", "side_hidden_states", "side_attentions")


@pytest.fixture(params=[SANForOpenVocabSegmentation, SANForSemanticSegmentation], ids=["words", "semantic"])
def model_class(request):
    return request.param


@pytest.fixture
def build(model_class, make_model, processor):
    """Makes a tiny model of each class with five labels stored; keyword arguments replace fields of its config."""

    def build(attn_implementation="sdpa", **changes):
        model = make_model(attn_implementation=attn_implementation, **changes)
        model.set_labels(LABELS, processor)
        same = model_class._from_config(copy.deepcopy(model.config), attn_implementation=attn_implementation)
        same.load_state_dict(model.state_dict())
        return same.eval()

    return build


@pytest.fixture
def built(build):
    return build()


@pytest.fixture
def image():
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(3))


def answer(outputs):
    """What a class is there for."""
    return outputs.logits if "logits" in outputs else outputs.class_queries_logits


# Initialisation


@pytest.mark.parametrize("token_format", ["cls_token", "learnable_token"])
def test_what_a_checkpoint_lacks_starts_as_in_a_new_model(model_class, make_config, monkeypatch, token_format):
    # Each tensor draws by itself: what a module draws for one of them may not shift the numbers of the next.
    for name in ("normal_", "trunc_normal_"):
        draw = getattr(initialization, name)

        def draw_from_a_seed(*args, _draw=draw, **kwargs):
            torch.manual_seed(11)
            return _draw(*args, **kwargs)

        monkeypatch.setattr(initialization, name, draw_from_a_seed)
    config = make_config(sls_token_format=token_format, num_clip_prompts=2, has_stored_labels=True)
    new = model_class(copy.deepcopy(config)).state_dict()
    loaded = model_class.from_pretrained(None, config=copy.deepcopy(config), state_dict={}).state_dict()
    assert loaded.keys() == new.keys()
    different = [name for name, tensor in new.items() if not torch.equal(loaded[name], tensor)]
    assert different == []


def test_norms_start_as_identities_and_biases_at_zero(model_class, make_config):
    for name, module in model_class(make_config()).named_modules():
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all(), name
            assert (module.bias == 0).all(), name
        elif isinstance(module, nn.Linear) and module.bias is not None and not name.endswith("bias_scaling"):
            assert name.startswith("side_adapter.mask_decoder") or (module.bias == 0).all(), name


def test_the_configs_range_is_the_spread_of_new_weights(model_class, make_config):
    torch.manual_seed(0)
    model = model_class(make_config(initializer_range=0.3, sls_token_format="learnable_token"))
    for layer in model.side_adapter.layers:
        assert layer.mlp.fc1.weight.std().item() == pytest.approx(0.3, rel=0.1)
    assert model.side_adapter.embeddings.position_embedding.std().item() == pytest.approx(0.3, rel=0.1)
    # A shift of the bias is the same for every patch and says nothing; a scale of 0 would say nothing at all.
    assert model.side_adapter.mask_decoder.bias_scaling.weight.item() == 1
    assert model.side_adapter.mask_decoder.bias_scaling.bias.item() == 0
    assert model.side_adapter.layers[0].mlp.fc1.weight.abs().max() <= 2, "the normal distribution is cut at 2"
    assert model.sls_embedding.std().item() == pytest.approx(0.3, rel=0.3)
    assert model.logit_scale.exp().item() == pytest.approx(100, rel=1e-3)
    assert model.background_embedding.norm().item() == pytest.approx(1, rel=0.6)


# Hidden states and attentions


@torch.no_grad()
def test_hidden_states_and_attentions_come_when_asked_for_and_change_nothing(build, image):
    model = build("eager")
    plain = model(image)
    assert all(plain[name] is None for name in RECORDED if name in plain)
    assert not hasattr(model, "_output_capturing_hooks_installed")
    recorded = model(image, output_hidden_states=True, output_attentions=True)
    for name, value in plain.items():
        # Layers that are recorded run as a whole: the same numbers, up to rounding
        assert_close(recorded[name], value, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    assert set(recorded) - set(plain) == set(RECORDED)
    states_only = model(image, output_hidden_states=True)
    assert set(states_only) - set(plain) == {"hidden_states", "side_hidden_states"}
    assert set(model(image)) == set(plain)


@torch.no_grad()
def test_hidden_states_are_of_every_layer_of_both_networks(built, image):
    outputs = built(image, output_hidden_states=True)
    patches, side_patches = 2 * 3, 4 * 6
    tokens = [1 + patches] * (START + 1) + [1 + patches + QUERIES] * (LAYERS - START)
    assert [tuple(state.shape) for state in outputs.hidden_states] == [(2, count, 32) for count in tokens]
    assert [tuple(state.shape) for state in outputs.side_hidden_states] == [
        (2, QUERIES + side_patches, 24)
    ] * SIDE_LAYERS


@torch.no_grad()
def test_hidden_states_are_clips_own_and_end_in_the_answer(built, image):
    outputs = built(image, output_hidden_states=True)
    clip = built.vision_model(built.shrink_for_clip(image), interpolate_pos_encoding=True, output_hidden_states=True)
    assert len(outputs.hidden_states) == len(clip.hidden_states)
    for ours, theirs in zip(outputs.hidden_states, clip.hidden_states, strict=True):
        assert_close(ours[:, : theirs.shape[1]], theirs, atol=1e-4, rtol=1e-4)
    sls_tokens = outputs.hidden_states[-1][:, -QUERIES:]
    embeds = built.visual_projection(built.vision_model.post_layernorm(sls_tokens))
    assert_close(nn.functional.normalize(embeds, dim=-1), outputs.mask_embeds)
    queries, patches = outputs.side_hidden_states[-1].split([QUERIES, 4 * 6], dim=1)
    decoded = built.side_adapter.mask_decoder(queries, patches, (4, 6))
    assert_close(decoded.mask_logits, outputs.masks_queries_logits)


@torch.no_grad()
def test_attentions_show_who_sees_whom(build, image):
    model = build("eager")
    outputs = model(image, output_attentions=True)
    seen = 1 + 2 * 3
    assert [tuple(weights.shape) for weights in outputs.attentions] == [
        (2, 4, count, count) for count in [seen] * START + [seen + QUERIES] * (LAYERS - START)
    ]
    side = QUERIES + 4 * 6
    assert [tuple(weights.shape) for weights in outputs.side_attentions] == [(2, 3, side, side)] * SIDE_LAYERS
    for weights in (*outputs.attentions, *outputs.side_attentions):
        assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    for weights in outputs.attentions[START:]:
        assert not weights[:, :, :seen, seen:].any()
        assert not weights[:, :, seen:, 0].any()
        assert weights[:, :, seen:, 1:seen].any()
    clip_pixels = model.shrink_for_clip(image)
    clip = model.vision_model(clip_pixels, interpolate_pos_encoding=True, output_attentions=True)
    for ours, theirs in zip(outputs.attentions, clip.attentions, strict=True):
        assert_close(ours[:, :, :seen, :seen], theirs, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_config_can_ask_for_hidden_states_and_attentions(build, image):
    model = build("eager", output_hidden_states=True)
    assert len(model(image).hidden_states) == LAYERS + 1
    assert model(image, output_hidden_states=False).hidden_states is None
    model.config.output_attentions = True
    outputs = model(image)
    assert len(outputs.attentions) == LAYERS
    assert len(outputs.side_attentions) == SIDE_LAYERS


@torch.no_grad()
def test_sdpa_has_no_attentions_to_return(built, image):
    outputs = built(image, output_attentions=True)
    assert (outputs.attentions, outputs.side_attentions) == ((), ())
    built.set_attn_implementation("eager")
    assert len(built(image, output_attentions=True).attentions) == LAYERS


@torch.no_grad()
def test_images_of_several_sizes_have_no_common_hidden_states(built, image):
    with pytest.raises(ValueError, match="one padded size at a time, and these are 64 x 96, 64 x 64: pass each size"):
        built(image, image_sizes=torch.tensor([[64, 96], [60, 40]]), output_hidden_states=True)
    # A frame that is too large for all of them is no second size.
    one_size = built(image, image_sizes=torch.tensor([[64, 50], [60, 40]]), output_hidden_states=True)
    assert one_size.side_hidden_states[0].shape == (2, QUERIES + 4 * 4, 24)


def test_gradients_reach_hidden_states_and_attentions(build, image):
    model = build("eager").train()
    labels = torch.zeros(2, 64, 96, dtype=torch.int64)
    outputs = model(image, labels=labels, output_hidden_states=True, output_attentions=True)
    recorded = [tensor for name in RECORDED for tensor in outputs[name]]
    for tensor in recorded:
        tensor.retain_grad()
    outputs.loss.backward()
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in recorded)


@torch.no_grad()
def test_a_model_that_has_recorded_can_be_copied(built, image):
    expected = built(image, output_hidden_states=True)
    copied = copy.deepcopy(built)
    del built
    assert torch.equal(copied(image, output_hidden_states=True).hidden_states[-1], expected.hidden_states[-1])


# Outputs


def assert_same(value, other):
    if isinstance(value, torch.Tensor):
        assert torch.equal(value, other)
    elif isinstance(value, dict):
        assert list(value) == list(other)
        assert_same(tuple(value.values()), tuple(other.values()))
    else:
        assert len(value) == len(other)
        for one, another in zip(value, other, strict=True):
            assert_same(one, another)


@pytest.mark.parametrize("training", [False, True])
def test_tuples_and_outputs_hold_the_same(build, image, training):
    model = build("eager").train(training)
    calls = [
        {},
        {"labels": torch.zeros(2, 64, 96, dtype=torch.int64)},
        {"output_hidden_states": True, "output_attentions": True},
    ]
    for call in calls:
        torch.manual_seed(2)
        outputs = model(image, **call)
        torch.manual_seed(2)
        values = model(image, **call, return_dict=False)
        assert type(values) is tuple
        assert_same(outputs.to_tuple(), values)
        assert ("loss" in outputs) == ("labels" in call)
        torch.manual_seed(2)
        model.config.return_dict = False
        assert_same(model(image, **call), values)
        model.config.return_dict = True


@torch.no_grad()
def test_a_batch_gives_what_its_images_give_alone(built):
    sizes = [(64, 96), (60, 40), (31, 64)]
    frame = torch.zeros(len(sizes), 3, 64, 96)
    for canvas, (height, width) in zip(frame, sizes, strict=True):
        canvas[:, :height, :width] = torch.randn(3, height, width)
    together = built(frame, image_sizes=torch.tensor(sizes))
    for index, (height, width) in enumerate(sizes):
        rows, columns = -(-height // 32) * 32, -(-width // 32) * 32
        alone = built(frame[index : index + 1, :, :rows, :columns], image_sizes=torch.tensor([[height, width]]))
        assert_close(together.class_queries_logits[index], alone.class_queries_logits[0], atol=1e-3, rtol=1e-4)
        masks = together.masks_queries_logits[index, :, : rows // 16, : columns // 16]
        assert_close(masks, alone.masks_queries_logits[0], atol=1e-3, rtol=1e-4)
        if "logits" in together:
            logits = together.logits[index, :, : rows // 4, : columns // 4]
            assert_close(logits, alone.logits[0], atol=1e-3, rtol=1e-4)


# Sizes


@pytest.mark.parametrize(
    "changes",
    [
        {"num_queries": 3},
        {"side_num_layers": 4, "deep_supervision_layers": [4]},
        {"side_hidden_size": 12, "side_num_heads": 2, "mask_dim": 8, "side_mlp_ratio": 2.0},
        {"side_patch_size": 32, "side_image_size": 64},
        {"attention_bias_heads": 1, "attention_bias_layers": 2, "attention_bias_pooling": "avg"},
        {"sls_start_layer": 1, "fusion_map": [[1, 3]]},
        {"vision_config": {**TINY_VISION, "hidden_size": 16, "num_attention_heads": 2, "patch_size": 8}},
        {"projection_dim": 5},
    ],
    ids=lambda changes: next(iter(changes)),
)
@torch.no_grad()
def test_every_size_is_the_configs(build, image, changes):
    model = build(**changes)
    config: SANConfig = model.config
    outputs = model(image, output_hidden_states=True)
    grid = (64 // config.side_patch_size, 96 // config.side_patch_size)
    assert outputs.masks_queries_logits.shape == (2, config.num_queries, *grid)
    assert outputs.class_queries_logits.shape == (2, config.num_queries, len(LABELS) + 1)
    assert outputs.mask_embeds.shape == (2, config.num_queries, config.projection_dim)
    heads = changes.get("attention_bias_heads", config.vision_config.num_attention_heads)
    biases = (config.attention_bias_layers, heads, config.num_queries)
    assert outputs.attention_bias.shape == (2, *biases, *grid)
    assert len(outputs.side_hidden_states) == config.side_num_layers
    assert outputs.side_hidden_states[0].shape == (2, config.num_queries + grid[0] * grid[1], config.side_hidden_size)
    patches = (32 // config.vision_config.patch_size) * (48 // config.vision_config.patch_size)
    assert outputs.hidden_states[0].shape == (2, 1 + patches, config.vision_config.hidden_size)


# Training


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("model_class", [SANForOpenVocabSegmentation], indirect=True)
def test_checkpointing_is_switched_on_and_off_and_keeps_gradients(built, image, reentrant):
    labels = torch.arange(96).expand(2, 64, -1) // 24
    gradients = []

    def train_once(**call):
        built.train()
        built.zero_grad()
        torch.manual_seed(5)
        outputs = built(image, labels=labels, **call)
        outputs.loss.backward()
        gradients.append({name: p.grad for name, p in built.named_parameters() if p.requires_grad})
        return outputs

    plain = train_once(output_hidden_states=True)
    built.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert built.is_gradient_checkpointing
    recorded = train_once(output_hidden_states=True)
    assert_same(recorded.hidden_states, plain.hidden_states)
    assert_same(recorded.side_hidden_states, plain.side_hidden_states)
    built.gradient_checkpointing_disable()
    assert not built.is_gradient_checkpointing
    train_once()
    expected, *others = gradients
    for other in others:
        assert other.keys() == expected.keys()
        for name, gradient in expected.items():
            assert_close(other[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


# Input embeddings


def test_the_input_embedding_is_clips_patch_embedding(built, image):
    patches = built.get_input_embeddings()
    assert patches is built.vision_model.embeddings.patch_embedding
    other = copy.deepcopy(patches)
    with torch.no_grad():
        before = built(image).mask_embeds
        other.weight.mul_(-1)
        built.set_input_embeddings(other)
        assert built.get_input_embeddings() is other
        assert not torch.allclose(built(image).mask_embeds, before, atol=1e-2)
    assert built.get_output_embeddings() is None


def test_inputs_can_be_made_to_need_gradients(build, image):
    # What adapters inside a frozen network ask for.
    model = build(trainable_clip_parameters=[]).train()
    plain = model(image, output_hidden_states=True)
    assert not plain.hidden_states[START].requires_grad
    model.enable_input_require_grads()
    assert model(image, output_hidden_states=True).hidden_states[START].requires_grad
    model.disable_input_require_grads()
    assert not model(image, output_hidden_states=True).hidden_states[START].requires_grad


# torch.compile


@pytest.fixture
def shallow(build):
    """One layer of each kind on each side of every choice: compiling takes its time layer by layer."""
    torch.compiler.reset()
    yield build(
        "eager",
        vision_config={**TINY_VISION, "num_hidden_layers": 2, "patch_size": 14, "image_size": 56},
        clip_input_scale=0.7,
        sls_start_layer=1,
        fusion_map=[[0, 0], [1, 1]],
        side_num_layers=1,
        deep_supervision_layers=[1],
    )
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("model_class", [SANForSemanticSegmentation], indirect=True)
@torch.no_grad()
def test_the_model_for_semantic_segmentation_compiles_in_one_graph(shallow, image):
    compiled = torch.compile(copy.deepcopy(shallow), fullgraph=True, backend="eager")
    sizes = torch.tensor([[64, 90], [60, 96]])
    ours, expected = (each(image, image_sizes=sizes) for each in (compiled, shallow))
    assert_close(ours.logits, expected.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("model_class", [SANForOpenVocabSegmentation], indirect=True)
@torch.no_grad()
def test_a_compiled_model_has_hidden_states_and_attentions(shallow, image):
    expected = shallow(image, output_hidden_states=True, output_attentions=True)
    compiled = torch.compile(shallow, backend="eager")
    ours = compiled(image, output_hidden_states=True, output_attentions=True)
    for name in RECORDED:
        assert len(ours[name]) == len(expected[name])
        for tensor, other in zip(ours[name], expected[name], strict=True):
            assert_close(tensor, other, atol=1e-4, rtol=1e-4)
