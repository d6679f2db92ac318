"""Labels and label files as people and tools write them: read rightly, or refused in one sentence."""

import builtins

import numpy as np
import pytest

from modeling_san.processing import labels_san
from modeling_san.processing.labels_san import repair_prompt

WRITTEN_AND_READ = {
    "men’s room": "men's room",  # noqa: RUF001
    "“sky”": '"sky"',
    "ＳＫＹ": "sky",  # noqa: RUF001
    "ﬁre truck": "fire truck",
    "fire &amp; rescue": "fire & rescue",
    "fire &amp;amp; rescue": "fire & rescue",
    "caf&eacute;": "café",
    "sky\ufeff": "sky",
    "\x1b[31msky": "sky",
    "sky\x00": "sky",
    "red&nbsp;truck": "red truck",
    "red\u3000truck": "red truck",
    "空": "空",
}


@pytest.mark.parametrize(("written", "read"), WRITTEN_AND_READ.items())
def test_prompts_are_read_as_clips_own_tokenizer_reads_them(processor, written, read):
    assert repair_prompt(f"a photo of {written}.").lower() == f"a photo of {read}."
    tokens = [processor.tokenize_labels([label], ["{}"])["input_ids"].tolist() for label in (written, read)]
    assert tokens[0] == tokens[1]


def test_labels_are_shown_as_they_were_written():
    assert labels_san.normalize_labels(["Men’s room", "fire &amp; rescue"]) == ["men’s room", "fire &amp; rescue"]  # noqa: RUF001


def test_templates_are_repaired_too(processor):
    written, read = (processor.tokenize_labels(["sky"], [template])["input_ids"] for template in ("ａ {}．", "a {}."))  # noqa: RUF001
    assert np.array_equal(written, read)


def test_without_ftfy_other_letters_are_read_as_they_are_and_that_is_said_once(monkeypatch):
    imported = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "ftfy":
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    labels_san._ftfy.cache_clear()
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.warns(UserWarning, match="pip install ftfy") as caught:
        assert [repair_prompt(text) for text in ("sky", "“sky” &amp; sea", "ciel é")] == [
            "sky",
            "“sky” & sea",
            "ciel é",
        ]
    assert len(caught) == 1
    labels_san._ftfy.cache_clear()
