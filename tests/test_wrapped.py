"""What wraps, shards, adapts, quantises or watches modules is heard: every module that owns weights is called."""

import copy

import pytest
import torch
import torch.multiprocessing as mp
from conftest import coarse_image
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard, register_fsdp_forward_method
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.testing import assert_close
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from modeling_san import BUILTIN_MODEL, SANForOpenVocabSegmentation, SANProcessor
from modeling_san.side_adapter import SideAdapterLayer

pytestmark = pytest.mark.slow

LABELS = ["sky", "road", "red car", "tree", "truck"]
LAYERS = (CLIPEncoderLayer, SideAdapterLayer)


@pytest.fixture
def inputs(processor):
    """Images and words."""
    image = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(3))
    return {"pixel_values": image, **processor(text=LABELS)}


# Hooks


@torch.no_grad()
def test_a_hook_on_each_module_with_weights_is_called_and_changes_nothing(make_model, inputs):
    model = make_model(num_clip_prompts=2, sls_token_format="learnable_token")
    expected, called = model(**inputs), set()
    owners = {name for name, module in model.named_modules() if list(module.parameters(recurse=False))} - {""}
    layers = {name for name, module in model.named_modules() if isinstance(module, LAYERS)}
    for name in owners | layers:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.add(name))
    found = model(**inputs)
    assert called == owners | layers
    for name, value in expected.items():
        # Layers with hooks run as a whole: the same numbers, up to rounding
        assert_close(found[name], value, atol=1e-4, rtol=1e-4)


def test_gradients_reach_the_features_of_each_layer_of_clip(model, inputs):
    # As Grad-CAM has them
    kept = []
    for layer in model.vision_model.encoder.layers:
        layer.register_forward_hook(lambda module, args, output: kept.append(output.requires_grad_()))
    score = model(**inputs).class_queries_logits[..., 0].sum()
    assert len(kept) == len(model.vision_model.encoder.layers)
    for gradient, features in zip(torch.autograd.grad(score, kept), kept, strict=True):
        assert gradient.shape == features.shape
        assert gradient.any()


# Spread over processes


def spread(model):
    """FSDP2, layer by layer; it takes no parameters without dimensions."""
    mesh = init_device_mesh("cpu", (2,))
    for module in model.modules():
        if isinstance(module, LAYERS):
            fully_shard(module, mesh=mesh)
    register_fsdp_forward_method(fully_shard(model, mesh=mesh, ignored_params={model.logit_scale}), "get_class_embeds")
    return model


def spread_by_wrapping(model):
    """FSDP1."""
    options = {"use_orig_params": True, "device_id": torch.device("cpu"), "ignored_states": [model.logit_scale]}
    return FullyShardedDataParallel(model, auto_wrap_policy=ModuleWrapPolicy(set(LAYERS)), **options)


def squared_gradients(model):
    """The sum over what this process has of a side layer."""
    names = ((name.replace("_fsdp_wrapped_module.", ""), value) for name, value in model.named_parameters())
    gradients = [value.grad for name, value in names if name.startswith("side_adapter.layers.0")]
    local = (each.to_local() if hasattr(each, "to_local") else each for each in gradients if each is not None)
    return torch.stack([each.square().sum() for each in local]).sum()


def compare_spread(rank, wrap, folder, meeting):
    """Runs in each of two processes: a model that is spread over both gives answers and gradients of a whole one."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    processor = SANProcessor.from_pretrained(folder)
    image = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(rank))
    inputs = {"pixel_values": image, **processor(text=LABELS)}
    models = [SANForOpenVocabSegmentation.from_pretrained(folder) for _ in range(2)]
    whole, parts = models[0], wrap(models[1])
    outputs = [model(**inputs).class_queries_logits for model in (parts, whole)]
    assert_close(*outputs, atol=1e-4, rtol=1e-4)
    for each in outputs:
        each.square().mean().backward()
    # Squared gradients of one layer: of the whole they are still to be averaged, of the parts to be put together
    for parameter in whole.parameters():
        if parameter.grad is not None:
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= 2
    found, expected = (squared_gradients(model) for model in (parts, whole))
    torch.distributed.all_reduce(found)
    assert_close(found, expected, atol=0, rtol=1e-3)
    if wrap is spread:
        # Other methods than forward are not the wrapper's
        for model in (whole, parts):
            model.set_labels(LABELS[::-1], processor)
        found, expected = (model(image).class_queries_logits for model in (parts, whole))
        assert_close(found, expected, atol=1e-4, rtol=1e-4)
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP is switching", "ignore:.*is deprecated")
@pytest.mark.parametrize("wrap", [spread, spread_by_wrapping], ids=["FSDP2", "FSDP1"])
def test_a_model_that_two_processes_share_answers_and_learns_as_a_whole_one(wrap, model_folder, tmp_path):
    mp.spawn(compare_spread, args=(wrap, str(model_folder), tmp_path / "meeting"), nprocs=2)


# Adapters


def test_lora_on_all_linear_layers_trains_merges_and_is_saved(model, inputs, tmp_path):
    peft = pytest.importorskip("peft")
    with torch.no_grad():
        plain = model(**inputs).class_queries_logits
    original = copy.deepcopy(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=2))
    assert_close(adapted(**inputs).class_queries_logits, plain, atol=1e-4, rtol=1e-4)
    optimizer = torch.optim.Adam([each for each in adapted.parameters() if each.requires_grad], lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        outputs = adapted(**inputs)
        (outputs.class_queries_logits.square().mean() + outputs.masks_queries_logits.square().mean()).backward()
        optimizer.step()
    idle = {
        name
        for name, parameter in adapted.named_parameters()
        if "lora_" in name and (parameter.grad is None or not parameter.grad.any())
    }
    assert idle == set()
    with torch.no_grad():
        trained = adapted.eval()(**inputs).class_queries_logits
        assert (trained - plain).abs().max() > 0.1
        adapted.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(original, tmp_path).eval()
        assert_close(loaded(**inputs).class_queries_logits, trained, atol=1e-4, rtol=1e-4)
        merged = adapted.merge_and_unload()
        assert_close(merged(**inputs).class_queries_logits, trained, atol=1e-3, rtol=1e-3)


# Eight bits


def by_torchao(model):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def by_pytorch(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("quantize", [by_torchao, by_pytorch])
@torch.no_grad()
def test_eight_bits_change_few_pixels(quantize):
    model = SANForOpenVocabSegmentation.from_pretrained(BUILTIN_MODEL).eval()
    processor = SANProcessor.from_pretrained(BUILTIN_MODEL)
    inputs = processor(images=coarse_image(0, (150, 100)), text=["grass", "red plain", "wood"], return_tensors="pt")
    smaller = quantize(copy.deepcopy(model))
    outputs = [each(**inputs) for each in (model, smaller)]
    assert not torch.equal(outputs[0].masks_queries_logits, outputs[1].masks_queries_logits)
    [[plain], [quantized]] = map(processor.post_process_semantic_segmentation, outputs)
    assert (plain == quantized).float().mean() > 0.95


# Graphs


@torch.no_grad()
def test_the_geometry_of_vit_l_14_compiles_and_exports_in_one_graph(make_model, make_config, class_embeds):
    vision = {**make_config().vision_config.to_dict(), "patch_size": 14, "image_size": 56}
    model = make_model(vision_config=vision, clip_input_scale=0.7)
    image = torch.randn(1, 3, 96, 160, generator=torch.Generator().manual_seed(3))
    inputs = {"pixel_values": image, "class_embeds": class_embeds}
    expected = model(**inputs).class_queries_logits
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(compiled(**inputs).class_queries_logits, expected, atol=1e-4, rtol=1e-4)
    torch.compiler.reset()
    height, width = (32 * torch.export.Dim(name, min=2, max=40) for name in ("rows", "columns"))
    sizes = {"pixel_values": {2: height, 3: width}, "class_embeds": {0: torch.export.Dim("classes", min=2, max=1000)}}
    exported = torch.export.export(model, (), inputs, dynamic_shapes=sizes, strict=False).module()
    for shape, classes in (((96, 160), 5), ((128, 64), 3)):
        others = {"pixel_values": torch.randn(1, 3, *shape), "class_embeds": class_embeds[:classes]}
        expected = model(**others).class_queries_logits
        assert_close(exported(**others)["class_queries_logits"], expected, atol=1e-4, rtol=1e-4)
