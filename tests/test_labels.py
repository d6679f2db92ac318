"""Labels and label files as people and tools write them: read rightly, or refused in one sentence."""

import builtins
import codecs
import re
from pathlib import Path

import numpy as np
import pytest

from modeling_san.processing import labels_san
from modeling_san.processing.label_files import read_label_file
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


# Files

NAMES = ("sky", "road", "red truck")
COLORS = ((70, 130, 180), (128, 64, 128), (200, 0, 0))

TABLES = {
    "ids and names.csv": "id,name\n0,sky\n1,road\n2,red truck\n",
    "indices and classes.csv": "index,class\n0,sky\n1,road\n2,red truck\n",
    "names and ids in another order.csv": "Name,ID\nred truck,2\nsky,0\nroad,1\n",
    "names alone.csv": "name\nsky\nroad\nred truck\n",
    "names without a header.csv": "sky\nroad\nred truck\n",
    "ids and names without a header.csv": "0,sky\n1,road\n2,red truck\n",
    "quotes.csv": '"id","name"\n"0","sky"\n"1","road"\n"2","red truck"\n',
    "semicolons.csv": "id;name\n0;sky\n1;road\n2;red truck\n",
    "spaces behind commas.csv": "class id, class name\n0, sky\n1, road\n2, red truck\n",
    "windows.csv": "id,name\r\n0,sky\r\n1,road\r\n\r\n2,red truck\r\n",
    "other columns.csv": "value,class,pixels,note\n0,sky,9,\n1,road,8,grey\n2,red truck,7,\n",
    "tabs.tsv": "id\tname\n0\tsky\n1\troad\n2\tred truck\n",
    "tabs without a header.tsv": "0\tsky\n1\troad\n2\tred truck\n",
    "table.txt": "id,name\n0,sky\n1,road\n2,red truck\n",
    "tabs.txt": "0\tsky\n1\troad\n2\tred truck\n",
    "colons.txt": "0: sky\n1: road\n2: red truck\n",
    "spaces.txt": "0 sky\n1 road\n2 red truck\n",
    "lines.txt": "sky\nroad\nred truck\n",
    "one line.txt": "sky, road, red truck\n",
    "no ending": "id,name\n0,sky\n1,road\n2,red truck\n",
}


@pytest.mark.parametrize(("name", "text"), TABLES.items(), ids=TABLES)
def test_names_come_from_tables_as_tools_write_them(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert read_label_file(tmp_path / name) == {"classes": NAMES}


@pytest.mark.parametrize("columns", ["name,r,g,b", "name, red, green, blue"])
def test_colours_come_from_tables_too(tmp_path, columns):
    rows = [f"{name},{red},{green},{blue}" for name, (red, green, blue) in zip(NAMES, COLORS, strict=True)]
    (tmp_path / "class_dict.csv").write_text("\n".join([columns, *rows]))
    assert read_label_file(tmp_path / "class_dict.csv") == {"classes": NAMES, "colors": COLORS}
    numbered = [f"{index},{row}" for index, row in reversed(list(enumerate(rows)))]
    (tmp_path / "numbered.csv").write_text("\n".join([f"id,{columns}", *numbered]))
    assert read_label_file(tmp_path / "numbered.csv") == {"classes": NAMES, "colors": COLORS}


@pytest.mark.parametrize("name", ["classes.csv", "classes.txt", "classes.json"])
@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (b"", "utf-8"),
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
    ],
)
def test_files_are_read_in_every_encoding_that_says_which_it_is(tmp_path, name, mark, encoding):
    text = {".csv": "id,name\n0,café\n1,空\n", ".txt": "café\n空\n", ".json": '["café", "空"]'}[Path(name).suffix]
    (tmp_path / name).write_bytes(mark + text.encode(encoding))
    assert read_label_file(tmp_path / name) == {"classes": ("café", "空")}


REFUSED = {
    "windows.csv": ("id,name\n0,café\n".encode("cp1252"), "not text in UTF-8: save it in that encoding"),
    "windows.txt": ("café\n".encode("cp1252"), "not text in UTF-8"),
    "sixteen bits without a mark.txt": ("sky\nroad\n".encode("utf-16-le"), "not text in UTF-8"),
    "image.txt": (b"\x89PNG\r\n\x1a\n\0\0", "not text in UTF-8"),
    "cut.txt": (codecs.BOM_UTF16_LE + b"s", "not text in UTF-8"),
    "empty.csv": (b"\n \n", "is empty"),
    "header.csv": (b"id,name\n", "there are no labels"),
    "unknown.csv": (b"this,that\nsky,road\n", "none of its columns `name`"),
    "wide.csv": (b"0,sky,70\n1,road,128\n", "none of its columns `name`"),
    "wide.txt": (b"0,sky,70\n1,road,128\n", "none of its columns `name`"),
    "short.csv": (b"id,name\n0,sky\n1\n", "'1' has fewer columns"),
    "from one.csv": (b"id,name\n1,sky\n2,road\n", "none of index 0"),
    "twice.csv": (b"id,name\n0,sky\n0,road\n", "none of index 1"),
    "words.csv": (b"id,name\nzero,sky\n", "`id` holds 'zero'"),
    "colours.csv": (b"name,r,g,b\nsky,70,130,x\n", "the colour"),
    "same.csv": (b"id,name\n0,sky\n1,Sky\n", "'sky' is given 2 times"),
    "nameless.csv": (b"id,name\n0,sky\n1,\n", "label 1"),
    "quotes.csv": (b'id,name\n0,"sky\n1,road\n', "cannot be split"),
    "long.csv": (b"id,name\n0," + b"s" * 200_000 + b"\n", "cannot be split"),
}


@pytest.mark.parametrize(("name", "content", "fact"), [(name, *rest) for name, rest in REFUSED.items()], ids=REFUSED)
def test_what_is_no_list_of_names_is_refused_in_a_sentence(tmp_path, name, content, fact):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"labels file .*{re.escape(name)}.*{re.escape(fact)}") as caught:
        read_label_file(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_names_that_hold_commas_or_numbers_stay_whole(tmp_path):
    (tmp_path / "classes.txt").write_text("building, edifice\nroad, route\n2 door car\n")
    assert read_label_file(tmp_path / "classes.txt")["classes"] == ("building, edifice", "road, route", "2 door car")
    (tmp_path / "classes.csv").write_text('id,name\n0,"building, edifice"\n1,car|automobile\n')
    assert read_label_file(tmp_path / "classes.csv")["classes"] == ("building, edifice", "car|automobile")
