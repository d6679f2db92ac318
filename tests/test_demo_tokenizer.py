import hashlib
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


def test_sentences_start_and_end_as_in_clip_and_case_does_not_matter(tokenizer):
    ids = tokenizer("a photo of red striped").input_ids
    words = ["a</w>", "photo</w>", "of</w>", "red</w>", "striped</w>"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|startoftext|>", *words, "<|endoftext|>"]
    assert tokenizer("A photo of Red STRIPED").input_ids == ids


def test_it_pads_with_the_end_token_as_the_released_tokenizer_does(tokenizer):
    assert tokenizer.pad_token == tokenizer.eos_token == tokenizer.unk_token == "<|endoftext|>"
    ids = tokenizer(["grass", "red plain on grass"], padding=True).input_ids
    assert ids[0] == [tokenizer.bos_token_id, ids[0][1], *[tokenizer.eos_token_id] * 4]
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


def test_every_class_of_the_standard_label_sets_fits_in_a_prompt(tokenizer):
    prompt = "a jpeg corrupted photo of a {}."
    assert max(len(tokenizer(prompt.format(text)).input_ids) for text in training_sentences()) <= 48


@pytest.mark.parametrize("loader", [CLIPTokenizer, AutoTokenizer])
def test_it_reloads_from_a_small_folder(tokenizer, tmp_path, loader):
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").stat().st_size < 400_000
    loaded = loader.from_pretrained(tmp_path)
    assert isinstance(loaded, CLIPTokenizer)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded("A photo of a xylophone.").input_ids == tokenizer("A photo of a xylophone.").input_ids
    assert (loaded.pad_token_id, loaded.model_max_length) == (tokenizer.pad_token_id, 48)


def test_it_is_the_same_in_every_process(tokenizer):
    program = "from drawn_world.tokenizer import *; print(build_tokenizer().backend_tokenizer.to_str(), end='')"
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, env=environment).stdout
    own = tokenizer.backend_tokenizer.to_str().encode()
    assert hashlib.sha256(other).hexdigest() == hashlib.sha256(own).hexdigest()


def test_the_vocabulary_has_the_size_asked_for():
    assert len(build_tokenizer(vocab_size=1000)) == 1000
    with pytest.raises(ValueError, match="vocab_size=100"):
        build_tokenizer(vocab_size=100)
