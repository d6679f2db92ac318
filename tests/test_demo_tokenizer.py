import os
import subprocess
import sys

import pytest
from transformers import AutoTokenizer, CLIPTokenizer

from drawn_world.tokenizer import build_tokenizer, training_sentences
from drawn_world.world import CLASS_NAMES


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_sentences_start_and_end_as_in_clip(tokenizer):
    ids = tokenizer("a photo of red striped").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == [
        "<|startoftext|>",
        *("a</w>", "photo</w>", "of</w>", "red</w>", "striped</w>"),
        "<|endoftext|>",
    ]


def test_it_pads_with_the_end_token_as_the_released_tokenizer_does(tokenizer):
    assert tokenizer.pad_token == tokenizer.eos_token == tokenizer.unk_token == "<|endoftext|>"
    ids = tokenizer(["grass", "red plain on grass"], padding=True).input_ids
    assert ids[0] == [tokenizer.bos_token_id, ids[0][1], *[tokenizer.eos_token_id] * 4]


def test_the_end_token_is_not_two(tokenizer):
    # CLIPTextModel reads an end token of 2 as "take the largest id", for old configurations.
    assert tokenizer.eos_token_id == len(tokenizer) - 1 != 2


def test_words_of_the_world_are_single_tokens(tokenizer):
    for name in CLASS_NAMES:
        assert len(tokenizer.tokenize(name)) == len(name.split(" "))


@pytest.mark.parametrize("text", ["xylophone", "zürich", "東京", "łódź", "emoji 🦊", "a b c d e f g", "#1, 2 & 3"])
def test_any_word_encodes_and_comes_back(tokenizer, text):
    ids = tokenizer(text).input_ids[1:-1]
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")


def test_case_does_not_matter(tokenizer):
    assert tokenizer("Red STRIPED").input_ids == tokenizer("red striped").input_ids


def test_every_class_of_the_standard_label_sets_fits_in_a_prompt(tokenizer):
    prompt = "a jpeg corrupted photo of a {}."
    assert max(len(tokenizer(prompt.format(text)).input_ids) for text in training_sentences()) <= 48


def test_it_reloads_from_a_small_folder(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").stat().st_size < 400_000
    for loader in (CLIPTokenizer, AutoTokenizer):
        loaded = loader.from_pretrained(tmp_path)
        assert isinstance(loaded, CLIPTokenizer)
        assert loaded.get_vocab() == tokenizer.get_vocab()
        assert loaded("A photo of a xylophone.").input_ids == tokenizer("A photo of a xylophone.").input_ids
        assert loaded.pad_token_id == tokenizer.pad_token_id
        assert loaded.model_max_length == 48


def test_it_is_the_same_in_every_process(tokenizer):
    program = (
        "from drawn_world.tokenizer import build_tokenizer; import hashlib;"
        "print(hashlib.sha256(build_tokenizer().backend_tokenizer.to_str().encode()).hexdigest())"
    )
    run = [sys.executable, "-c", program]
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    digests = {subprocess.run(run, capture_output=True, text=True, check=True, env=environment).stdout for _ in "ab"}
    assert len(digests) == 1


def test_the_vocabulary_has_the_size_asked_for():
    assert len(build_tokenizer(vocab_size=1000)) == 1000
    with pytest.raises(ValueError, match="vocab_size=100"):
        build_tokenizer(vocab_size=100)
