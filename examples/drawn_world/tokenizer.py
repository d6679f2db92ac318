"""The built-in model's small tokenizer: CLIP's kind of byte-pair encoding with a vocabulary of a few thousand."""

from __future__ import annotations

import json
from collections.abc import Iterator

from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import CLIPTokenizer

from drawn_world.captions import ON_BACKGROUND_TEMPLATES, SEVERAL_TEMPLATES, SINGLE_TEMPLATES
from drawn_world.world import CLASS_NAMES
from modeling_san.processing import load_vocabulary, prompt_templates, vocabulary_names

BOS_TOKEN = "<|startoftext|>"
EOS_TOKEN = "<|endoftext|>"
WORD_END = "</w>"


def build_tokenizer(vocab_size: int = 3000, model_max_length: int = 48) -> CLIPTokenizer:
    """Learn a `CLIPTokenizer` from the world's words, the prompt templates and the names of the standard label sets.

    Like the released tokenizer of CLIP it lower-cases, works on bytes (so that any word encodes, if need be letter by
    letter) and pads with the end token. The result is the same on every call.

    Args:
        vocab_size: number of tokens with the 512 byte tokens and the 2 special ones, which come first and last.
        model_max_length: of sentences in tokens, start and end token included.

    Raises:
        ValueError: if `vocab_size` leaves no room beside byte and special tokens.
    """
    alphabet = _byte_alphabet()
    learned = vocab_size - 2 * len(alphabet) - 2
    if learned < 0:
        raise ValueError(f"vocab_size={vocab_size}: expected at least {vocab_size - learned}, the bytes' own tokens.")
    merges = _learn_merges(vocab_size)[:learned]
    tokens = [*alphabet, *(letter + WORD_END for letter in alphabet), *("".join(pair) for pair in merges)]
    tokens = list(dict.fromkeys(tokens))
    vocabulary = {token: position for position, token in enumerate([*tokens, BOS_TOKEN, EOS_TOKEN])}
    # A list of pairs is what byte-pair models take; the annotation of `merges` knows only lists of strings.
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=model_max_length)  # type: ignore[arg-type]


def training_sentences() -> Iterator[str]:
    """The text that the vocabulary is learned from, always in the same order."""
    for template in [*SINGLE_TEMPLATES, *SEVERAL_TEMPLATES, *prompt_templates("vild")]:
        for name in CLASS_NAMES:
            yield template.format(name)
    for template in ON_BACKGROUND_TEMPLATES:
        for name in CLASS_NAMES:
            yield template.format(name, name)
    yield from (template.format("") for template in prompt_templates("imagenet"))
    for name in vocabulary_names():
        yield from load_vocabulary(name).classes


def _byte_alphabet() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _learn_merges(vocab_size: int) -> list[tuple[str, str]]:
    """Byte pairs in the order in which they are to be joined."""
    empty = CLIPTokenizer().backend_tokenizer
    tokenizer = Tokenizer(BPE(end_of_word_suffix=WORD_END))
    # CLIP's own way to split text into words, so that merges never cross what it keeps apart.
    tokenizer.normalizer, tokenizer.pre_tokenizer = empty.normalizer, empty.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=2 * vocab_size,
        min_frequency=1,
        initial_alphabet=_byte_alphabet(),
        end_of_word_suffix=WORD_END,
        # Ties between pairs are broken by token number. Naming the word-end letters first fixes their numbers, which
        # would otherwise follow the order of a hash map and differ from run to run.
        special_tokens=[letter + WORD_END for letter in _byte_alphabet()],
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_sentences(), trainer)
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
