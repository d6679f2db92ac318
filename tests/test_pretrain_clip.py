import pytest
import torch
from transformers import CLIPModel, CLIPTokenizer

from drawn_world.pretrain_clip import (
    contrastive_loss,
    demo_clip_config,
    draw_pool,
    embed_images,
    embed_regions,
    patches_of_regions,
    pretrain_clip,
)
from drawn_world.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    return CLIPModel(demo_clip_config(build_tokenizer())).eval()


def test_the_tiny_clip_has_about_two_million_parameters(clip):
    assert 1.5e6 < sum(parameter.numel() for parameter in clip.parameters()) < 2.5e6


@torch.no_grad()
def test_a_region_that_is_the_whole_image_is_embedded_as_the_image(clip):
    pixel_values = torch.randn(2, 3, 64, 64)
    regions = embed_regions(clip, pixel_values, torch.ones(2, 3, 8, 8, dtype=torch.bool), first_layer=3)
    torch.testing.assert_close(regions, embed_images(clip, pixel_values)[:, None].expand(-1, 3, -1))


def test_patches_of_a_region_are_those_it_touches_or_those_it_fills():
    mask = torch.zeros(1, 2, 128, 128)
    mask[0, 0, :, :40] = 1
    mask[0, 1, :4, :4] = 1
    touched, filled = patches_of_regions(mask, 8), patches_of_regions(mask, 8, min_coverage=0.9)
    assert touched[0, 0].any(0).tolist() == [True] * 3 + [False] * 5
    assert filled[0, 0].any(0).tolist() == [True] * 2 + [False] * 6
    assert touched[0, 1].sum() == filled[0, 1].sum() == 1


def test_a_true_caption_of_another_image_is_not_held_against_the_model():
    # Both captions are true of both images: equal logits are perfect, up to the entropy of the target.
    loss = contrastive_loss(torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bool))
    assert loss.item() == pytest.approx(torch.log(torch.tensor(2.0)).item())
    own = contrastive_loss(20 * torch.eye(2), torch.eye(2, dtype=torch.bool))
    assert own.item() < 1e-6


def test_the_pool_is_the_same_however_many_processes_draw_it():
    (alone, names), (shared, again) = (draw_pool(6, workers=workers, progress=False) for workers in (0, 2))
    assert torch.equal(alone, shared)
    assert names == again
    assert alone.shape == (6, 3, 64, 64)


def test_pre_training_saves_a_model_and_its_tokenizer(tmp_path):
    options = {"steps": 2, "batch_size": 4, "num_images": 8, "workers": 0, "progress": False, "device": "cpu"}
    model = pretrain_clip(tmp_path, **options)
    loaded, tokenizer = CLIPModel.from_pretrained(tmp_path), CLIPTokenizer.from_pretrained(tmp_path)
    assert loaded.config.text_config.eos_token_id == tokenizer.eos_token_id
    torch.testing.assert_close(loaded.visual_projection.weight, model.visual_projection.weight)
    again = pretrain_clip(tmp_path, **options)
    torch.testing.assert_close(again.visual_projection.weight, model.visual_projection.weight)


def test_a_pool_smaller_than_a_batch_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="num_images=4"):
        pretrain_clip(tmp_path, batch_size=8, num_images=4)
