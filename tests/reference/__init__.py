"""The reference implementation's numbers, and what makes its weights, images and tokens without a download."""

import hashlib
import json
from pathlib import Path

from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

REFERENCE = Path(__file__).parent


def clip_tokenizer() -> CLIPTokenizer:
    """The tokenizer of the released CLIP models (49408 tokens), rebuilt from the merges that define it.

    CLIP numbers its tokens in the order of how they come about: the 256 bytes, the same at the end of a word, one
    token for each merge, and the two special ones. `save_pretrained` makes the folder that commands ask for.
    """
    lines = (REFERENCE / "clip_merges.txt").read_text(encoding="utf-8").split("\n")[1:]  # the first names a version
    merges = [tuple(line.split(" ")) for line in lines if line]
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def fingerprint(path: Path) -> str:
    """SHA-256 of what a JSON file says, however it is laid out."""
    return hashlib.sha256(json.dumps(json.loads(path.read_text()), ensure_ascii=True).encode()).hexdigest()
