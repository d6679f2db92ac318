"""Label embeddings that are kept in a file: the same as encoded ones, and never in the way of encoding."""

import contextlib
import multiprocessing
import os
import sqlite3
import stat
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from modeling_san import text_cache_san
from modeling_san.text_cache_san import SWITCH, cached_class_embeds

LABELS = ["sky", "road", "red car", "tree", "truck"]
DAY = 24 * 60 * 60


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """The cache's folder, of a process that begins and that finds keeping worth it even for tiny models."""
    monkeypatch.setenv(SWITCH, str(tmp_path / "cache"))
    monkeypatch.setattr(text_cache_san, "_FILE_FLOP", 0)
    monkeypatch.setattr(text_cache_san, "_HASHING_FLOP", 0)
    begin_process(monkeypatch)
    return tmp_path / "cache"


def begin_process(monkeypatch):
    monkeypatch.setattr(text_cache_san, "_given_up", set())
    monkeypatch.setattr(text_cache_san, "_digests", weakref.WeakKeyDictionary())


@pytest.fixture
def clock(monkeypatch):
    """Time for the cache; `clock.now` sets it."""
    clock = SimpleNamespace(now=1e9)
    monkeypatch.setattr(text_cache_san, "time", SimpleNamespace(time=lambda: clock.now))
    return clock


@pytest.fixture
def inputs(processor):
    return dict(processor(text=LABELS, return_tensors="pt"))


def encode(model, input_ids, attention_mask=None):
    """Class embeddings without a cache."""
    with torch.set_grad_enabled(torch.is_grad_enabled() and model.text_trains()):
        pooled = model.text_model(input_ids.flatten(0, 1)).pooler_output
        prompts = normalize(model.text_projection(pooled).float(), dim=-1).view(*input_ids.shape[:2], -1)
        if attention_mask is not None:
            prompts = prompts * attention_mask.any(-1, keepdim=True)
        return normalize(prompts.sum(1), dim=-1)


def embed(model, input_ids, attention_mask=None):
    """Class embeddings through the cache, and how many classes were encoded for them."""
    calls = []

    def count(ids, mask):
        calls.append(len(ids))
        assert mask is None or mask.shape == ids.shape
        return encode(model, ids, mask)

    embeds = cached_class_embeds(model, input_ids, attention_mask, count)
    assert len(calls) <= 1
    return embeds, sum(calls)


def database(folder):
    [path] = folder.glob("*.sqlite3")
    return contextlib.closing(sqlite3.connect(path, isolation_level=None))


def unit_vectors(count, length=512, seed=0):
    return list(normalize(torch.randn(count, length, generator=torch.Generator().manual_seed(seed)), dim=-1).numpy())


def file_of(folder):
    return folder / text_cache_san._FILE_NAME


# What is kept, and under which key


def test_another_model_with_the_same_weights_encodes_nothing_and_gives_the_same_bits(folder, make_model, inputs):
    first, encoded = embed(make_model(), **inputs)
    assert encoded == len(LABELS)
    assert torch.equal(first, encode(make_model(), **inputs))
    again, encoded = embed(make_model(), **inputs)
    assert encoded == 0
    assert torch.equal(again, first)
    assert again.dtype == torch.float32
    again.zero_()
    assert torch.equal(embed(make_model(), **inputs)[0], first)


def test_only_what_is_missing_is_encoded_whatever_the_order(folder, model, processor):
    few, _ = embed(model, **processor(text=["tree", "sky"], return_tensors="pt"))
    some, encoded = embed(model, **processor(text=["sky", "red car", "tree"], return_tensors="pt"))
    assert encoded == 1
    assert torch.equal(some[[2, 0]], few)
    assert embed(model, **processor(text=LABELS, return_tensors="pt"))[1] == 2


@pytest.mark.parametrize(
    "name",
    [
        "text_model.embeddings.position_embedding.weight",
        "text_model.encoder.layers.0.layer_norm1.bias",
        "text_model.encoder.layers.0.self_attn.q_proj.weight",
        "text_model.encoder.layers.1.mlp.fc2.weight",
        "text_model.encoder.layers.1.mlp.fc2.bias",
        "text_model.final_layer_norm.weight",
        "text_projection.weight",
    ],
)
@pytest.mark.parametrize("in_place", [False, True])
def test_any_weight_of_the_text_encoder_counts(folder, make_model, inputs, name, in_place):
    model = make_model()
    embed(model, **inputs)
    changed = model if in_place else make_model()
    with torch.no_grad():
        # One of many: the last one
        changed.get_parameter(name).flatten()[-1] += 1e-3
    assert embed(changed, **inputs)[1] == len(LABELS)


@pytest.mark.parametrize("how", ["data", "new data", "new parameter", "load_state_dict"])
def test_a_change_of_weights_is_noticed_however_it_is_made(folder, make_model, inputs, how):
    model, other = make_model(), make_model(seed=1)
    embed(model, **inputs)
    layer, new = model.text_model.encoder.layers[0].mlp.fc1, other.text_model.encoder.layers[0].mlp.fc1
    if how == "data":
        layer.weight.data.copy_(new.weight.data)
    elif how == "new data":
        layer.weight.data = new.weight.data
    elif how == "new parameter":
        layer.weight = new.weight
    else:
        model.load_state_dict(other.state_dict())
    embeds, encoded = embed(model, **inputs)
    assert encoded == len(LABELS)
    assert torch.equal(embeds, encode(model, **inputs))


def test_of_the_words_those_of_the_label_count_and_no_others(folder, make_model, processor, tokenizer):
    labels = ["sky", "tree", "red truck"]
    inputs = processor(text=labels, return_tensors="pt")
    embed(make_model(), **inputs)
    model = make_model()
    words = model.text_model.get_input_embeddings().weight
    with torch.no_grad():
        words[tokenizer.convert_tokens_to_ids("car</w>")] += 1
    assert embed(model, **inputs)[1] == 0
    with torch.no_grad():
        words[tokenizer.convert_tokens_to_ids("truck</w>")] += 1
    assert embed(model, **inputs)[1] == 1


def test_what_sees_images_does_not_count(folder, make_model, inputs):
    embed(make_model(), **inputs)
    model = make_model()
    with torch.no_grad():
        for part in (model.vision_model, model.visual_projection, model.side_adapter):
            for parameter in part.parameters():
                parameter.add_(1)
    assert embed(model, **inputs)[1] == 0


@pytest.mark.parametrize("field", ["hidden_act", "layer_norm_eps", "num_attention_heads", "eos_token_id"])
def test_settings_of_the_text_encoder_count(folder, make_model, make_config, inputs, field):
    embed(make_model(), **inputs)
    text_config = make_config().text_config.to_dict()
    # 2 is CLIP's first and wrong one, which finds the same token in another way
    other = {"hidden_act": "gelu", "layer_norm_eps": 1e-3, "num_attention_heads": 4, "eos_token_id": 2}[field]
    model = make_model(text_config={**text_config, field: other})
    embeds, encoded = embed(model, **inputs)
    assert encoded == len(LABELS)
    assert torch.equal(embeds, encode(model, **inputs))


def test_the_precision_counts(folder, make_model, inputs):
    exact, _ = embed(make_model(), **inputs)
    half, encoded = embed(make_model().bfloat16(), **inputs)
    assert encoded == len(LABELS)
    assert not torch.equal(half, exact)
    again, encoded = embed(make_model().bfloat16(), **inputs)
    assert encoded == 0
    assert torch.equal(again, half)
    with torch.autocast("cpu", torch.bfloat16):
        assert embed(make_model(), **inputs)[1] == len(LABELS)
    assert torch.equal(embed(make_model(), **inputs)[0], exact)


def test_templates_count_and_so_does_their_number(folder, model, processor):
    embed(model, **processor.tokenize_labels(LABELS))
    for templates in (["a photo of a {}."], ["{}", "a photo of a {}."], ["a photo of the {}.", "{}"]):
        assert embed(model, **processor.tokenize_labels(LABELS, templates=templates))[1] == len(LABELS)
    assert embed(model, **processor.tokenize_labels(LABELS))[1] == 0


def test_padding_does_not_count(folder, model, processor, inputs):
    embeds, _ = embed(model, **inputs)
    [row] = embed(model, **processor(text=["sky"], return_tensors="pt"))[0]
    assert torch.equal(row, embeds[0])
    assert embed(model, **processor(text=["sky"], return_tensors="pt"))[1] == 0
    # Nor what it is made of, nor whether there is a mask
    ids = torch.nn.functional.pad(inputs["input_ids"], (0, 2), value=3)
    again, encoded = embed(model, ids)
    assert encoded == 0
    assert torch.equal(again, embeds)


def test_prompts_that_are_left_out_do_not_count(folder, model, inputs):
    embeds, _ = embed(model, **inputs)
    more = {name: torch.cat([tensor[:, :1], tensor], dim=1) for name, tensor in inputs.items()}
    assert embed(model, **more)[1] == len(LABELS)
    more["attention_mask"][:, 0] = 0
    again, encoded = embed(model, **more)
    assert encoded == 0
    assert torch.equal(again, embeds)


def test_a_class_without_any_prompt_is_not_kept(folder, model, inputs):
    inputs["attention_mask"][1] = 0
    for _ in range(2):
        embeds, _ = embed(model, **inputs)
        assert not embeds[1].any()
    assert embed(model, **inputs)[1] == 1


def test_the_number_of_threads_does_not_count(folder, make_model, inputs, monkeypatch):
    monkeypatch.setattr(text_cache_san, "_CHUNK_BYTES", 1000)
    embed(make_model(), **inputs)
    monkeypatch.setattr(text_cache_san, "_THREADS", 1)
    assert embed(make_model(), **inputs)[1] == 0


def test_weights_that_were_read_once_are_not_hashed_again(folder, make_model, inputs, monkeypatch):
    model = make_model()
    embed(model, **inputs)
    monkeypatch.setattr(text_cache_san, "_digest", None)
    assert embed(model, **inputs)[1] == 0


def test_weights_of_inference_mode_are_hashed_every_time(folder, make_model, inputs):
    with torch.inference_mode():
        model = make_model()
        first, _ = embed(model, **inputs)
        assert torch.equal(embed(model, **inputs)[0], first)
        model.text_projection.weight[-1, -1] += 1
        assert embed(model, **inputs)[1] == len(LABELS)


# Where nothing is kept


@pytest.mark.parametrize("word", ["", "0", "off", "OFF", "false"])
def test_the_switch_turns_it_off(folder, model, inputs, monkeypatch, word):
    monkeypatch.setenv(SWITCH, word)
    monkeypatch.chdir(folder.parent)
    assert [embed(model, **inputs)[1] for _ in range(2)] == [len(LABELS)] * 2
    assert list(folder.parent.iterdir()) == []


@pytest.mark.parametrize("word", [None, "1"])
def test_without_a_folder_files_lie_with_those_of_the_hub(folder, model, inputs, monkeypatch, tmp_path, word):
    monkeypatch.delenv(SWITCH)
    if word is not None:
        monkeypatch.setenv(SWITCH, word)
    monkeypatch.setattr(text_cache_san.constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    assert [embed(model, **inputs)[1] for _ in range(2)] == [len(LABELS), 0]
    assert len(list((tmp_path / "assets" / "modeling_san").glob("**/*.sqlite3"))) == 1


def test_the_folder_may_start_with_a_tilde(folder, model, inputs, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setenv(SWITCH, "~/mine")
    embed(model, **inputs)
    assert file_of(tmp_path / "mine").is_file()


def test_a_text_encoder_that_learns_is_left_alone(folder, make_model, inputs):
    model = make_model(trainable_clip_parameters=["text_model"])
    for _ in range(2):
        embeds, encoded = embed(model, **inputs)
        assert encoded == len(LABELS)
        assert embeds.requires_grad
    with torch.no_grad():
        model.train()
        assert embed(model, **inputs)[1] == len(LABELS)
        assert not folder.exists()
        model.eval()
        assert [embed(model, **inputs)[1] for _ in range(2)] == [len(LABELS), 0]


def test_training_the_rest_uses_what_is_kept(folder, make_model, inputs):
    model = make_model().train()
    assert [embed(model, **inputs)[1] for _ in range(2)] == [len(LABELS), 0]


def test_models_elsewhere_than_on_the_processor_are_left_alone(folder, make_model, inputs):
    model = make_model().to("meta")
    embeds = cached_class_embeds(
        model, inputs["input_ids"].to("meta"), None, lambda ids, mask: encode(model, ids, mask)
    )
    assert embeds.device.type == "meta"
    assert not folder.exists()


def test_a_compiled_encoder_has_no_file_in_it(folder, model, inputs, monkeypatch):
    monkeypatch.setattr(text_cache_san, "_label_keys", lambda *_: pytest.fail("keys were asked for"))

    def get(ids):
        return cached_class_embeds(model, ids, None, lambda ids, mask: encode(model, ids, mask))

    with torch.no_grad():
        compiled = torch.compile(get, fullgraph=True, backend="eager")(inputs["input_ids"])
    assert torch.allclose(compiled, encode(model, inputs["input_ids"]), atol=1e-6)
    assert not folder.exists()


def test_tiny_encoders_are_faster_than_files(folder, model, inputs, monkeypatch):
    monkeypatch.setattr(text_cache_san, "_FILE_FLOP", 1e9)
    assert [embed(model, **inputs)[1] for _ in range(2)] == [len(LABELS)] * 2
    assert not folder.exists()


def test_a_word_or_two_are_not_worth_reading_all_weights(folder, make_model, processor, inputs, monkeypatch):
    # As much work as 32 tokens; "sky" has 14 in its two prompts
    monkeypatch.setattr(text_cache_san, "_HASHING_FLOP", 16)
    model, word = make_model(), processor(text=["sky"], return_tensors="pt")
    assert embed(model, **word)[1] == 1
    assert not folder.exists()
    embed(model, **inputs)
    # Now they are read
    assert embed(model, **word)[1] == 0


class Doubled(torch.nn.Linear):
    """Has the parameters of a linear layer, and does something else with them."""

    def forward(self, states):
        return 2 * super().forward(states)


@pytest.mark.parametrize("change", ["layer", "hook", "method"])
def test_encoders_that_are_not_what_their_weights_say_are_left_alone(folder, make_model, inputs, change):
    embed(make_model(), **inputs)
    model = make_model()
    projection = model.text_model.encoder.layers[0].mlp.fc2
    if change == "layer":
        projection.__class__ = Doubled
    elif change == "hook":
        projection.register_forward_hook(lambda module, args, output: 2 * output)
    else:
        plain = projection.forward
        projection.forward = lambda states: 2 * plain(states)
    embeds, encoded = embed(model, **inputs)
    assert encoded == len(LABELS)
    assert not torch.allclose(embeds, encode(make_model(), **inputs), atol=1e-3)


def test_hooks_that_record_hidden_states_change_nothing(folder, model, inputs):
    embeds, _ = embed(model, **inputs)
    model.text_model(inputs["input_ids"][0], output_hidden_states=True)
    assert any(layer._forward_hooks for layer in model.text_model.encoder.layers)
    again, encoded = embed(model, **inputs)
    assert encoded == 0
    assert torch.equal(again, embeds)


@pytest.mark.parametrize("wrong", ["unknown token", "negative token", "too long", "floating point"])
def test_prompts_that_the_encoder_refuses_are_refused_still(folder, model, inputs, wrong):
    embed(model, **inputs)
    ids = inputs["input_ids"]
    if wrong == "unknown token":
        ids[0, 0, -1] = 10**6
    elif wrong == "negative token":
        ids[0, 0, -1] = -1
    elif wrong == "too long":
        ids = torch.nn.functional.pad(ids, (0, 20))
    else:
        ids = ids.float()
    with pytest.raises((IndexError, ValueError, RuntimeError)):
        embed(model, ids)


def test_python_without_sqlite_encodes(folder, model, inputs, monkeypatch):
    monkeypatch.setattr(text_cache_san, "sqlite3", None)
    assert [embed(model, **inputs)[1] for _ in range(2)] == [len(LABELS)] * 2


# The file


def test_nobody_else_can_read_it(folder, model, inputs):
    before = os.umask(0)
    try:
        embed(model, **inputs)
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()] == [0o600]


def test_ten_thousand_labels_are_read_and_written_at_once(folder):
    vectors = {index.to_bytes(32, "big"): vector for index, vector in enumerate(unit_vectors(10_000, length=8))}
    text_cache_san._write(file_of(folder), vectors)
    found, outdated = text_cache_san._read(file_of(folder), list(vectors), 8)
    assert found.keys() == vectors.keys()
    assert all(np.array_equal(found[key], vectors[key]) for key in vectors)
    assert outdated == {}


def test_the_file_stays_within_its_bound(folder, monkeypatch):
    monkeypatch.setattr(text_cache_san, "MAX_BYTES", 2**20)
    path, vectors = file_of(folder), unit_vectors(100)
    for part in range(20):
        text_cache_san._write(path, {bytes([part, index]): vector for index, vector in enumerate(vectors)})
    # And what one write brings
    assert path.stat().st_size < 2**20 + 2**18
    keys = [bytes([part, index]) for part in range(20) for index in range(100)]
    found, _ = text_cache_san._read(path, keys, 512)
    assert 300 < len(found) < 500
    # The last ones that were written
    assert list(found) == keys[-len(found) :]


def test_what_was_used_longest_ago_leaves_first(folder, clock, model, processor, monkeypatch):
    monkeypatch.setattr(text_cache_san, "MAX_BYTES", 2**18)
    old, used = (processor(text=[label], return_tensors="pt") for label in ("sky", "road"))
    embed(model, **old)
    embed(model, **used)
    clock.now += 2 * DAY
    assert embed(model, **used)[1] == 0
    clock.now -= DAY
    others = {bytes([index]): vector for index, vector in enumerate(unit_vectors(150))}
    text_cache_san._write(file_of(folder), others)
    assert embed(model, **used)[1] == 0
    assert embed(model, **old)[1] == 1


def test_reading_writes_nothing_until_a_day_has_passed(folder, clock, model, inputs):
    embeds, _ = embed(model, **inputs)
    before = file_of(folder).read_bytes()
    clock.now += DAY - 1
    embed(model, **inputs)
    assert file_of(folder).read_bytes() == before
    clock.now += 2
    assert torch.equal(embed(model, **inputs)[0], embeds)
    with database(folder) as connection:
        assert connection.execute("SELECT DISTINCT used FROM class_embeds").fetchall() == [(clock.now,)]


def _write_much(path, process, vectors):
    for turn in range(10):
        own = {bytes([process, turn, index]): vector for index, vector in enumerate(vectors)}
        common = {bytes([turn, index]): vector for index, vector in enumerate(vectors)}
        text_cache_san._write(path, own | common)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_processes_that_write_at_once_lose_nothing(folder):
    vectors = unit_vectors(5)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_write_much, args=(file_of(folder), index, vectors)) for index in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    own = [bytes([process, turn, index]) for process in range(4) for turn in range(10) for index in range(5)]
    common = [bytes([turn, index]) for turn in range(10) for index in range(5)]
    found, _ = text_cache_san._read(file_of(folder), own + common, 512)
    assert set(found) == set(own + common)
    assert all(np.array_equal(vector, vectors[key[-1]]) for key, vector in found.items())


def test_threads_share_it(folder, model, inputs, caplog):
    expected = encode(model, **inputs)

    def one(index):
        return embed(model, **{name: tensor[index : index + 1] for name, tensor in inputs.items()})[0]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(one, [*range(len(LABELS))] * 6))
    assert torch.allclose(torch.cat(found), expected.repeat(6, 1), atol=1e-6)
    assert embed(model, **inputs)[1] == 0
    assert caplog.records == []


# Files that are not as they should be


def fill_with_garbage(folder):
    file_of(folder).write_bytes(b"not a database" * 1000)


def cut_in_the_middle(folder):
    content = file_of(folder).read_bytes()
    file_of(folder).write_bytes(content[: len(content) // 2])


def overwrite_pages(folder):
    content = bytearray(file_of(folder).read_bytes())
    content[2**14 :] = b"\xff" * (len(content) - 2**14)
    file_of(folder).write_bytes(content)


def make_other_table(folder):
    with database(folder) as connection:
        connection.execute("DROP TABLE class_embeds")
        connection.execute("CREATE TABLE class_embeds (key BLOB, embedding BLOB)")


def make_endless_view(folder):
    with database(folder) as connection:
        connection.execute("DROP TABLE class_embeds")
        connection.execute(
            "CREATE VIEW class_embeds AS WITH RECURSIVE more (key) AS (SELECT 1 UNION ALL SELECT key + 1 FROM more) "
            "SELECT key, 1.0 AS used, zeroblob(64) AS embedding FROM more"
        )


def make_trigger(folder):
    with database(folder) as connection:
        connection.execute("CREATE TRIGGER t AFTER UPDATE ON class_embeds BEGIN DELETE FROM class_embeds; END")


@pytest.mark.parametrize(
    "damage",
    [fill_with_garbage, cut_in_the_middle, overwrite_pages, make_other_table, make_endless_view, make_trigger],
)
def test_a_damaged_file_is_replaced(folder, make_model, inputs, monkeypatch, caplog, damage):
    expected, _ = embed(make_model(), **inputs)
    damage(folder)
    begin_process(monkeypatch)
    for encoded in (len(LABELS), 0, 0):
        embeds, count = embed(make_model(), **inputs)
        assert torch.equal(embeds, expected)
        assert count == encoded
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert str(file_of(folder)) in record.getMessage()
    assert "\n" not in record.getMessage()


@pytest.mark.parametrize(
    "embedding",
    [
        b"",
        bytes(4),
        bytes(64),
        np.full(16, np.nan, np.float32).tobytes(),
        np.full(16, np.inf, np.float32).tobytes(),
        np.full(16, 3e38, np.float32).tobytes(),
        bytes(2**20),
        "x" * 64,
        7,
    ],
    ids=["empty", "short", "zero", "nan", "infinite", "huge", "long", "text", "number"],
)
def test_embeddings_that_are_none_are_encoded_again(folder, model, inputs, caplog, embedding):
    expected, _ = embed(model, **inputs)
    with database(folder) as connection:
        keys = connection.execute("SELECT key FROM class_embeds").fetchall()
        connection.execute("UPDATE class_embeds SET embedding = ? WHERE key = ?", (embedding, *keys[0]))
    for encoded in (1, 0):
        embeds, count = embed(model, **inputs)
        assert torch.allclose(embeds, expected, atol=1e-6)
        assert count == encoded
    assert caplog.records == []


def test_an_empty_file_is_filled(folder, model, inputs, caplog):
    folder.mkdir()
    file_of(folder).touch()
    assert [embed(model, **inputs)[1] for _ in range(2)] == [len(LABELS), 0]
    assert caplog.records == []


def check_that_labels_are_encoded(model, inputs, caplog):
    expected = encode(model, **inputs)
    for _ in range(3):
        embeds, encoded = embed(model, **inputs)
        assert torch.equal(embeds, expected)
        assert encoded == len(LABELS)
    [record] = caplog.records
    assert "\n" not in record.getMessage()
    assert SWITCH in record.getMessage()


def test_a_folder_that_cannot_be_made_is_said_once(folder, model, inputs, caplog):
    folder.write_text("a file")
    check_that_labels_are_encoded(model, inputs, caplog)
    assert folder.read_text() == "a file"


def test_a_folder_in_the_place_of_the_file_is_said_once(folder, model, inputs, caplog):
    file_of(folder).mkdir(parents=True)
    (file_of(folder) / "kept").touch()
    check_that_labels_are_encoded(model, inputs, caplog)
    assert (file_of(folder) / "kept").exists()


def test_a_locked_file_is_said_once_and_waited_for_once(folder, model, inputs, monkeypatch, caplog):
    embed(model, **inputs)
    begin_process(monkeypatch)
    monkeypatch.setattr(text_cache_san, "_READ_TIMEOUT", 0.01)
    # What cannot be read is not tried to be written: that would wait for longer
    monkeypatch.setattr(text_cache_san, "_write", lambda *_: pytest.fail("the file was opened again"))
    with database(folder) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        check_that_labels_are_encoded(model, inputs, caplog)


def open_with(pragma):
    plain = text_cache_san._open

    @contextlib.contextmanager
    def open_file(path, timeout):
        with plain(path, timeout) as connection:
            connection.execute(f"PRAGMA {pragma}")
            yield connection

    return open_file


def test_a_full_disk_is_said_once(folder, model, inputs, monkeypatch, caplog):
    monkeypatch.setattr(text_cache_san, "_open", open_with("max_page_count = 1"))
    check_that_labels_are_encoded(model, inputs, caplog)


def test_a_file_that_can_only_be_read_is_read(folder, model, processor, inputs, clock, monkeypatch, caplog):
    embeds, _ = embed(model, **inputs)
    monkeypatch.setattr(text_cache_san, "_open", open_with("query_only = on"))
    clock.now += 2 * DAY
    for _ in range(2):
        again, encoded = embed(model, **inputs)
        assert encoded == 0
        assert torch.equal(again, embeds)
        assert embed(model, **processor(text=["red tree"], return_tensors="pt"))[1] == 1
    assert len(caplog.records) == 1
