"""What the documentation shows is so: commands parse, JSON is read, Python runs, links lead somewhere."""

import doctest
import json
import re
import shlex
import shutil
from contextlib import nullcontext
from itertools import groupby
from pathlib import Path

import pytest

from benchmarks.__main__ import make_parser as make_benchmarks_parser
from modeling_san import BUILTIN_MODEL, SANForOpenVocabSegmentation, SANProcessor
from modeling_san.builtin import load_examples
from modeling_san.commands.main import main, make_parser
from modeling_san.commands.train import parse_recipe
from modeling_san.training.label_sets import load_label_set

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[1]
PATTERNS = ("*.md", "docs/*.md", "training/*.md", "hub_card/README.md", "benchmarks/*.md", "examples/**/*.md")
PAGES = sorted({path.relative_to(REPOSITORY) for pattern in PATTERNS for path in REPOSITORY.glob(pattern)})
NOTEBOOKS = sorted(path.relative_to(REPOSITORY) for path in REPOSITORY.glob("examples/*.ipynb"))
BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
BLOCKS = [(page, *block) for page in PAGES for block in BLOCK.findall((REPOSITORY / page).read_text(encoding="utf-8"))]
NOT_RUN = "no-run"

# The example of an export compiles for minutes: test_export makes and runs such programs
FILES_WITH_EXAMPLES = sorted(
    path.relative_to(REPOSITORY)
    for folder in ("modeling_san", "processing", "training", "hub_card")
    for path in (REPOSITORY / folder).rglob("*.py")
    if path.name != "export.py" and ">>> " in path.read_text(encoding="utf-8")
)


def blocks_of(language, page=None):
    return [(on, note.strip(), text) for on, name, note, text in BLOCKS if name == language and page in (None, on)]


def commands_of(text):
    """The arguments of each command in a shell block, whatever joins them."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars="&|;")
        words.whitespace_split = True
        for joins, command in groupby(words, lambda word: set(word) <= set("&|;")):
            if not joins:
                yield list(command)


COMMANDS = [(page, command) for page, _, text in blocks_of("bash") for command in commands_of(text)]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with the files that the pages speak of: images, a labelled data set, models and their evaluation."""
    from datasets import Dataset, Features, Image

    folder = tmp_path_factory.mktemp("workspace")
    examples = load_examples()
    names = sorted({label for example in examples for label in example.labels})
    rows = []
    for example in examples:
        table = [names.index(label) for label in example.labels]
        label_map = example.label_map.point([table[value] if value < len(table) else 255 for value in range(256)], "L")
        rows.append({"image": example.image, "annotation": label_map})
    data = Dataset.from_list(rows, features=Features({"image": Image(), "annotation": Image()}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("train", "val", "photos"):
            data.to_parquet(f"{name}.parquet")
        Path("classes.json").write_text(json.dumps(names))
        examples[0].image.save("street.jpg")
        model = SANForOpenVocabSegmentation.from_pretrained(BUILTIN_MODEL)
        processor = SANProcessor.from_pretrained(BUILTIN_MODEL)
        model.set_labels(["sky", "road"], processor)
        model.save_pretrained("my-model")
        processor.save_pretrained("my-model")
        shutil.copytree("my-model", "me/my-san")
        assert main(["demo"]) == 0
        command = "evaluate --model my-model --dataset val.parquet --split train --labels classes.json"
        assert main(command.split()) == 0
    return folder


@pytest.fixture
def namespace(workspace, monkeypatch):
    """What the pages take as given."""
    monkeypatch.chdir(workspace)
    maps = [[[0, 1], [1, 1]]]
    return {"__name__": "documentation", "predicted_maps": maps, "label_maps": maps}


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of("python", page)], ids=str)
def test_python_of_a_page_runs(page, namespace):
    for _, note, code in blocks_of("python", page):
        if note != NOT_RUN:
            exec(code, namespace)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=str)
def test_a_notebook_runs_from_top_to_bottom(notebook, namespace):
    cells = json.loads((REPOSITORY / notebook).read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") for cell in cells)
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), namespace)


@pytest.mark.parametrize("path", FILES_WITH_EXAMPLES, ids=str)
def test_examples_in_docstrings_run(path, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    # The fences of Markdown, and the end of a docstring, end what an example is to print
    text = re.sub(r'^\s*(```\w*|"""\s*)$', "", (REPOSITORY / path).read_text(encoding="utf-8"), flags=re.MULTILINE)
    examples = doctest.DocTestParser().get_doctest(text, {}, str(path), str(path), 0)
    failed, attempted = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(examples)
    assert attempted
    assert not failed, capsys.readouterr().out


def test_python_that_only_exports_can_provide_for_is_all_that_is_not_run():
    notes = [note for _, note, _ in blocks_of("python")]
    assert set(notes) <= {"", NOT_RUN}
    assert notes.count(NOT_RUN) <= 2  # an ONNX file, and a compiled package: test_export makes and runs both


@pytest.mark.parametrize(("page", "text"), [(page, text) for page, _, text in blocks_of("json")])
def test_json_of_a_page_is_a_label_file(page, text, tmp_path):
    (tmp_path / "labels.json").write_text(text)
    assert load_label_set(str(tmp_path / "labels.json")).names


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=str)
def test_a_command_of_a_page_is_one(page, command, monkeypatch):
    monkeypatch.chdir(REPOSITORY / "examples")  # where the drawn world's recipe lies
    programs = {"modeling_san.commands.main": "san"}
    if "-m" in command:
        module, *arguments = command[command.index("-m") + 1 :]
        command = [programs.get(module, module), *arguments]
    with pytest.raises(SystemExit, match=r"^0$") if "--help" in command else nullcontext():
        if command[:2] == ["san", "train"]:
            parse_recipe(command[2:])
        elif command[0] == "san":
            make_parser().parse_args(command[1:])
        elif command[0] == "benchmarks":
            make_benchmarks_parser().parse_args(command[1:])


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_of_a_page_lead_to_files(page):
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    inside = [link.partition("#")[0] for link in links if "://" not in link]
    assert [link for link in inside if link and not (REPOSITORY / page).parent.joinpath(link).exists()] == []
