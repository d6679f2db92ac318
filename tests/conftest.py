"""Fixtures shared by all tests: a tiny model, a tiny tokenizer, and the reference numbers."""

import copy
import os

# Before transformers is imported: nothing in these tests may wait for a network.
os.environ["HF_HUB_OFFLINE"] = "1"
# Before torch is: where pytest-xdist runs several processes, each of them and all its threads compute with one thread.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPTokenizer

from modeling_san import SANConfig, SANForOpenVocabSegmentation, SANImageProcessor, SANProcessor
from modeling_san.commands.main import main
from reference import REFERENCE, clip_tokenizer
from reference import weights as reference_module

TINY_VOCABULARY = ["a", "photo", "of", ".", "sky", "road", "car", "tree", "red", "truck"]

TINY_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 64,
    "patch_size": 16,
}
TINY_TEXT = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}
TINY = {
    "projection_dim": 16,
    "sls_start_layer": 2,
    "num_queries": 6,
    "side_hidden_size": 24,
    "side_num_layers": 3,
    "side_num_heads": 3,
    "side_image_size": 128,
    "fusion_map": [[0, 0], [2, 1]],
    "deep_supervision_layers": [2, 3],
    "mask_dim": 16,
    "train_num_points": 256,
}


def trained_names(model):
    """Names of the parameters that train."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def coarse_image(seed, size=(90, 60)):
    """An image of random coarse colours; size is width and height."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size)


def pytest_configure(config):
    # Small tensors gain nothing from many threads, and lose when other work shares the cores.
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture
def one_thread(monkeypatch):
    """Sums over threads depend on their number: what is compared bit for bit with another process takes one."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of processes that the test starts
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tokenizer():
    """CLIP's kind of tokenizer that knows ten words and every letter."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), ".</w>", "|</w>"]
    merges = []
    for word in TINY_VOCABULARY:
        left = word[0]
        for position, letter in enumerate(word[1:], start=1):
            right = letter if position < len(word) - 1 else f"{letter}</w>"
            if (left, right) not in merges:
                merges.append((left, right))
                tokens.append(left + right)
            left += right
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=16)


@pytest.fixture(scope="session")
def processor(tokenizer):
    return SANProcessor(tokenizer=tokenizer, templates=["a photo of a {}.", "{}"])


@pytest.fixture(scope="session")
def make_config(tokenizer):
    """Makes a tiny config; keyword arguments replace its fields."""

    def make(**changes):
        special = {
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        return SANConfig(**{"vision_config": TINY_VISION, "text_config": {**TINY_TEXT, **special}, **TINY, **changes})

    return make


@pytest.fixture(scope="session")
def make_model(make_config):
    """Makes a tiny model in evaluation mode whose weights are large enough to tell inputs apart."""

    def make(seed=0, attn_implementation="sdpa", **changes):
        torch.manual_seed(seed)
        config = make_config(**changes)
        model = SANForOpenVocabSegmentation._from_config(config, attn_implementation=attn_implementation)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.5 if "embedding" in name else parameter[0].numel() ** -0.5)
        return model.eval()

    return make


@pytest.fixture
def model(make_model):
    return make_model()


@pytest.fixture(scope="session")
def model_folder(make_config, make_model, tokenizer, tmp_path_factory):
    """A tiny model with random weights, no stored labels, and room for long prompts, as save_pretrained writes it."""
    long_tokenizer = copy.deepcopy(tokenizer)
    long_tokenizer.model_max_length = 96
    text_config = {**make_config().text_config.to_dict(), "max_position_embeddings": 96}
    folder = tmp_path_factory.mktemp("model") / "tiny-san"
    make_model(text_config=text_config).save_pretrained(folder)
    image_processor = SANImageProcessor(size={"shortest_edge": 64, "longest_edge": 256})
    SANProcessor(image_processor, long_tokenizer, templates=["a photo of a {}.", "{}"]).save_pretrained(folder)
    return folder


@pytest.fixture
def san(capsys):
    """Runs `san` and returns its exit code and the lines it wrote to standard output and standard error."""

    def run(*arguments):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        written = capsys.readouterr()
        return code, written.out.splitlines(), written.err.splitlines()

    return run


@pytest.fixture
def class_embeds():
    """Unit vectors of five classes for the tiny model."""
    vectors = torch.randn(5, TINY["projection_dim"], generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.normalize(vectors, dim=-1)


@pytest.fixture(scope="session")
def reference():
    """Folder of the reference implementation's numbers."""
    return REFERENCE


@pytest.fixture(scope="session")
def reference_weights():
    """The module that makes the reference's weights and images from names and seeds."""
    return reference_module


@pytest.fixture(scope="session")
def clip_processor():
    """A processor with the released CLIP tokenizer and the released models' templates."""
    return SANProcessor(tokenizer=clip_tokenizer(), templates="vild")
