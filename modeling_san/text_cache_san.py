"""Label embeddings kept in a file: a vocabulary is encoded once, not again by every process that uses it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from huggingface_hub import constants
from torch import Tensor, nn
from transformers import __version__ as transformers_version

from .prompt_encoder import find_ends

try:
    import sqlite3
except ImportError:
    # Python can be built without it
    sqlite3 = None  # type: ignore[assignment]

SWITCH = "SAN_TEXT_CACHE"
"""Environment variable: a folder to use, or one of the words that turn the cache off (or on, as it is unset)."""

_OFF, _ON = ("", "0", "off", "false", "no"), ("1", "on", "true", "yes")

MAX_BYTES = 256 * 2**20
"""How large the file may grow; what was used longest ago leaves first."""

FORMAT = 1
"""Goes up whenever the same weights and tokens mean another embedding."""

# What decides whether keeping pays, in terms of the work that encoding is. On two cores of a server hashing a byte of
# the weights takes as long as 64 operations, and the file about 10 ms: fifteen prompts of CLIP B/16 are worth it.
_HASHING_FLOP = 64
_FILE_FLOP = 1e9

_CONFIG_FIELDS = ("hidden_act", "num_attention_heads", "layer_norm_eps", "eos_token_id", "_attn_implementation")
"""What changes embeddings of the same weights; the other fields are the weights' shapes, or are for training."""

_PLAIN_MODULES = ("torch.nn.modules.", "transformers.models.clip.", "transformers.activations")
_PLAIN_HOOKS = "transformers.utils.output_capturing"

_CHUNK_BYTES = 2**22
_THREADS = 4
_SAMPLES = 32

_FILE_NAME = f"class_embeds_{FORMAT}.sqlite3"
_SCHEMA = "CREATE TABLE class_embeds (key BLOB PRIMARY KEY, used REAL NOT NULL, embedding BLOB NOT NULL)"
_UPSERT = (
    "INSERT INTO class_embeds (key, used, embedding) VALUES (?, ?, ?) "
    "ON CONFLICT (key) DO UPDATE SET used = excluded.used, embedding = excluded.embedding"
)
# Beside its embedding a row takes about 128 bytes: its key, twice, and what SQLite adds
_EVICT = (
    "DELETE FROM class_embeds WHERE key IN (SELECT key FROM (SELECT key, sum(length(embedding) + 128) "
    "OVER (ORDER BY used DESC, rowid DESC) AS total FROM class_embeds) WHERE total > ?)"
)
_PAGE_BYTES = 2**14
_KEYS_PER_QUERY = 500
_ROWS_PER_TRANSACTION = 1000
_READ_TIMEOUT, _WRITE_TIMEOUT = 0.5, 5.0
_DAY = 24 * 60 * 60.0

_logger = logging.getLogger(__name__)
_Result = TypeVar("_Result")
_Vectors = dict[bytes, np.ndarray]

_digests: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], bytes]] = weakref.WeakKeyDictionary()
_given_up: set[tuple[Path, str]] = set()
"""Files, and whether to read or to write them did not work in this process."""


class TextEncoder(Protocol):
    """The part of a model that turns prompts into embeddings."""

    text_model: Any
    text_projection: Any

    def text_trains(self) -> bool:
        """Whether gradients reach it."""


def cached_class_embeds(
    model: TextEncoder,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    encode: Callable[[Tensor, Tensor | None], Tensor],
) -> Tensor:
    """
    Embeddings of classes, each from the file where it is there, encoded and put there where it is not.

    Where keeping them cannot be right (gradients, dropout, modules or hooks that are not CLIP's own), does not pay
    (accelerators, few words, small models) or is switched off, all are encoded. Trouble with the file is told in one
    line of the log and does not stop anything.

    Args:
        model: the text encoder.
        input_ids: `(classes, prompts, tokens)`.
        attention_mask: same shape; prompts whose row is all 0 do not count.
        encode: makes unit vectors `(classes, projection_dim)` in float32 of some classes' `input_ids` and
            `attention_mask`.

    Returns:
        unit vectors `(classes, projection_dim)`.
    """
    # First of all: a graph holds the encoder, not what one file said on one day
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return encode(input_ids, attention_mask)
    path = _cache_file()
    keys = None if path is None else _label_keys(model, input_ids, attention_mask)
    if path is None or keys is None:
        return encode(input_ids, attention_mask)

    length = len(model.text_projection.weight)
    vectors, outdated = _attempt(path, "read", functools.partial(_read, path, keys, length)) or ({}, {})
    missing = [index for index, key in enumerate(keys) if key not in vectors]
    encoded: _Vectors = {}
    if missing:
        mask = None if attention_mask is None else attention_mask[missing]
        rows = encode(input_ids[missing], mask).numpy()
        encoded = {keys[index]: row for index, row in zip(missing, rows, strict=True)}
    if encoded or outdated:
        _attempt(path, "write", functools.partial(_write, path, encoded | outdated))
    vectors |= encoded
    return torch.from_numpy(np.stack([vectors[key] for key in keys]))


def _cache_file() -> Path | None:
    choice = os.environ.get(SWITCH, "on")
    if sqlite3 is None or choice.lower() in _OFF:
        return None
    if choice.lower() in _ON:
        # Where huggingface_hub.cached_assets_path has libraries keep files; that would make the folder only to look
        return Path(constants.HF_ASSETS_CACHE, "modeling_san", "class_embeds", "default", _FILE_NAME)
    return Path(os.path.expanduser(os.path.expandvars(choice)), _FILE_NAME)


def _label_keys(model: TextEncoder, input_ids: Tensor, attention_mask: Tensor | None) -> list[bytes] | None:
    """A key for each class; None where embeddings must not be kept, or encoding is less work than looking."""
    words = model.text_model.get_input_embeddings().weight
    weights = _weights_without(words, model)
    if not _is_plain(model) or not _are_plain([input_ids, attention_mask, words, *weights.values()]):
        return None
    ids = input_ids.numpy()
    kept = _tokens_that_count(model, ids, None if attention_mask is None else attention_mask.numpy())
    if kept is None:
        return None
    work = 2.0 * int(kept.sum()) * sum(tensor.numel() for tensor in weights.values())
    if work <= _FILE_FLOP:
        return None
    state, known = _state(weights), _digests.get(model.text_model)
    if state is not None and known is not None and known[0] == state:
        digest = known[1]
    elif work <= _FILE_FLOP + _HASHING_FLOP * sum(tensor.nbytes for tensor in weights.values()):
        return None
    else:
        digest = _digest(weights)
        if state is not None:
            _digests[model.text_model] = (state, digest)
    return _hash_labels(digest + _settings(model), words, ids, kept)


def forget_digests() -> None:
    """Hash the weights again when they are next needed, as a new process does."""
    _digests.clear()


# Whether to use it


def _is_plain(model: TextEncoder) -> bool:
    """Whether tokens and weights decide what the text encoder says, and nobody wants its gradients."""
    if model.text_model.training or (torch.is_grad_enabled() and model.text_trains()):
        return False
    for module in (*model.text_model.modules(), model.text_projection):
        # Adapters, quantized layers and hooks do things that parameters and buffers do not tell
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if (
            not type(module).__module__.startswith(_PLAIN_MODULES)
            or "forward" in vars(module)
            or any(getattr(hook, "__module__", None) != _PLAIN_HOOKS for hook in hooks)
        ):
            return False
    return True


def _are_plain(tensors: Iterable[Tensor | None]) -> bool:
    """Whether all have their values in memory: none on other devices, none that stand for values only."""
    return all(
        tensor is None or (type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu")
        for tensor in tensors
    )


def _tokens_that_count(model: TextEncoder, ids: np.ndarray, mask: np.ndarray | None) -> np.ndarray | None:
    """Which of `(classes, prompts, tokens)` change embeddings; None for what the encoder refuses."""
    config, vocab_size = model.text_model.config, len(model.text_model.get_input_embeddings().weight)
    if (
        ids.dtype.kind != "i"
        or ids.min() < 0
        or ids.max() >= vocab_size
        or ids.shape[-1] > config.max_position_embeddings
        or not isinstance(config.eos_token_id, int)
        or (mask is not None and mask.shape != ids.shape)
    ):
        return None
    end = find_ends(model.text_model, torch.from_numpy(ids)).numpy()
    kept = np.arange(ids.shape[-1]) <= end[..., None]
    return kept if mask is None else kept & mask.any(-1, keepdims=True)


# Keys


def _weights_without(words: Tensor, model: TextEncoder) -> dict[str, Tensor]:
    """All that embeddings depend on but the tokens' vectors, which are two fifths of CLIP's, and go by the tokens."""
    parts = {"text_model": model.text_model, "text_projection": model.text_projection}
    named = (
        pair
        for prefix, part in parts.items()
        for pair in (*part.named_parameters(prefix), *part.named_buffers(prefix))
    )
    return {name: tensor for name, tensor in named if tensor is not words}


def _settings(model: TextEncoder) -> bytes:
    """What makes other embeddings of the same weights and tokens."""
    config = model.text_model.config
    # How products are rounded; asking for all backends at once raises where they differ
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    settings = {
        "format": FORMAT,
        "transformers": transformers_version,
        "config": {name: getattr(config, name, None) for name in _CONFIG_FIELDS},
        "autocast": str(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else None,
        "precision": torch.get_float32_matmul_precision() if matmul is None else matmul.fp32_precision,
    }
    return json.dumps(settings, sort_keys=True).encode()


def _hash_labels(start: bytes, words: Tensor, ids: np.ndarray, kept: np.ndarray) -> list[bytes]:
    used = np.flatnonzero(np.bincount(ids[kept]))
    # NumPy's indexing: PyTorch's would wait for its threads
    vectors = _bytes_of(words).reshape(len(words), -1)[used]
    digests = b"".join(hashlib.sha256(vector.data).digest() for vector in vectors)
    table = np.zeros((len(words), hashlib.sha256().digest_size), np.uint8)
    table[used] = np.frombuffer(digests, np.uint8).reshape(len(used), -1)
    tokens = table[ids[kept]]
    common = hashlib.sha256(str(words.dtype).encode() + start)
    keys = []
    lengths = kept.sum(-1)
    for own_lengths, own_tokens in zip(lengths, np.split(tokens, lengths.sum(-1).cumsum()[:-1]), strict=True):
        key = common.copy()
        key.update(str([length for length in own_lengths.tolist() if length]).encode())
        key.update(own_tokens.data)
        keys.append(key.digest())
    return keys


def _digest(tensors: Mapping[str, Tensor]) -> bytes:
    """A hash of names, shapes, dtypes and values; hashlib lets other threads run meanwhile."""
    shapes = [(name, str(tensor.dtype), list(tensor.shape)) for name, tensor in tensors.items()]
    chunks: list[memoryview] = []
    for tensor in tensors.values():
        values = _bytes_of(tensor).data
        # All of one size, whatever the threads: their hashes make the digest
        chunks.extend(values[start : start + _CHUNK_BYTES] for start in range(0, len(values), _CHUNK_BYTES))
    with ThreadPoolExecutor(_THREADS) as pool:
        parts = pool.map(lambda chunk: hashlib.sha256(chunk).digest(), chunks)
        return hashlib.sha256(json.dumps(shapes).encode() + b"".join(parts)).digest()


def _bytes_of(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()


def _state(tensors: Mapping[str, Tensor]) -> tuple[Any, ...] | None:
    """
    What is no longer the same after a change of the tensors: where they are, how often they were written to, and, as
    writing to `tensor.data` is not counted, some of their values. None where writing is never counted.
    """
    if any(tensor.is_inference() for tensor in tensors.values()):
        return None
    places = [(name, tensor.data_ptr(), tensor._version, tensor.dtype) for name, tensor in tensors.items()]
    samples = [tensor.detach().flatten()[:: tensor.numel() // _SAMPLES + 1] for tensor in tensors.values()]
    return (*places, _bytes_of(torch.cat(samples)).tobytes())


# The file


def _attempt(path: Path, action: str, use: Callable[[], _Result]) -> _Result | None:
    """What `use` returns; None where the file does not let it, from then on without another try."""
    if (path, action) in _given_up:
        return None
    warned = any(path == given_up for given_up, _ in _given_up)
    try:
        return use()
    except (sqlite3.Error, OSError) as failure:
        error: Exception = failure
    # Its subclasses are for other trouble: this one is raised for files that are no database, or a damaged one
    if type(error) is sqlite3.DatabaseError and (path, "replace") not in _given_up:
        _given_up.add((path, "replace"))
        try:
            # The journal first: it belongs to the old file, and SQLite would apply it to the next
            path.with_name(f"{path.name}-journal").unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        except OSError as failure:
            error = failure
        else:
            _logger.warning("%s is damaged (%s): label embeddings are collected anew.", path, error)
            return None
    # What cannot be read is not written either
    _given_up.update([(path, action), (path, "write")])
    if not warned:
        _logger.warning(
            "%s cannot be used (%s): labels are encoded again. Set %s to another folder, or to 0 to do without.",
            path,
            error,
            SWITCH,
        )
    return None


@contextlib.contextmanager
def _open(path: Path, timeout: float) -> Iterator[sqlite3.Connection]:
    # One for each use: connections are neither for several threads nor for processes that forked
    with contextlib.closing(sqlite3.connect(path, timeout=timeout, isolation_level=None)) as connection:
        yield connection


def _has_table(connection: sqlite3.Connection) -> bool:
    """Whether the file is ready, or else empty; others are refused, as views and triggers could do anything."""
    tables = {sql for (sql,) in connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")}
    if tables - {_SCHEMA}:
        raise sqlite3.DatabaseError("it holds other tables")
    return bool(tables)


def _read(path: Path, keys: Sequence[bytes], length: int) -> tuple[_Vectors, _Vectors]:
    """Vectors by key, of those that are there, and among them those to write again: not noted as used for a day."""
    if not path.exists():
        return {}, {}
    rows: list[tuple[bytes, float, bytes]] = []
    with _open(path, _READ_TIMEOUT) as connection:
        if not _has_table(connection):
            return {}, {}
        for start in range(0, len(keys), _KEYS_PER_QUERY):
            part = keys[start : start + _KEYS_PER_QUERY]
            marks = ", ".join("?" * len(part))
            rows += connection.execute(
                "SELECT key, used, embedding FROM class_embeds WHERE length(embedding) = ? "
                f"AND typeof(embedding) = 'blob' AND typeof(used) = 'real' AND key IN ({marks})",
                (4 * length, *part),
            )
    vectors = np.frombuffer(b"".join(embedding for _, _, embedding in rows), np.float32).reshape(-1, length)
    good = _are_unit(vectors)
    found = {key: vector for (key, _, _), vector, is_good in zip(rows, vectors, good, strict=True) if is_good}
    now = time.time()
    return found, {key: found[key] for key, used, _ in rows if key in found and abs(now - used) > _DAY}


def _write(path: Path, vectors: _Vectors) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # For the user alone: words that images were searched for are nobody else's business. SQLite keeps the mode
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    good = _are_unit(np.stack(list(vectors.values())))
    rows = [(key, vector.tobytes()) for (key, vector), is_good in zip(vectors.items(), good, strict=True) if is_good]
    with _open(path, _WRITE_TIMEOUT) as connection:
        # A page holds seven embeddings of CLIP B/16; of the default size it would hold one, and be half empty
        connection.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
        connection.execute("PRAGMA synchronous = NORMAL")
        for start in range(0, len(rows), _ROWS_PER_TRANSACTION):
            part, now = rows[start : start + _ROWS_PER_TRANSACTION], time.time()
            connection.execute("BEGIN IMMEDIATE")
            if not _has_table(connection):
                connection.execute(_SCHEMA)
            connection.executemany(_UPSERT, [(key, now, embedding) for key, embedding in part])
            if _used_bytes(connection) > MAX_BYTES:
                # Somewhat below the limit, so that not every time something has to go
                connection.execute(_EVICT, (MAX_BYTES * 3 // 4,))
            connection.execute("COMMIT")


def _used_bytes(connection: sqlite3.Connection) -> int:
    pages, free, size = (
        connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
    )
    return (pages - free) * size


def _are_unit(vectors: np.ndarray) -> np.ndarray:
    """Which of `(classes, projection_dim)` are what an encoder gives: finite, and of length 1."""
    return np.abs(np.linalg.norm(vectors.astype(np.float64), axis=-1) - 1) < 1e-3
