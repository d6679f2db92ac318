"""Nothing of somebody's own is lost: files that were there before, and folders that two runs want at a time."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from modeling_san.commands.main import main
from modeling_san.processing.files import (
    LOCK_FILE,
    locked_folder,
    new_folder,
    remove_unfinished,
)

MINE = b"mine"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Two labelled images in a parquet file."""
    path = tmp_path_factory.mktemp("data") / "images.parquet"
    rng = np.random.default_rng(0)
    rows = [
        {
            "image": Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)),
            "annotation": Image.fromarray(np.repeat([[0], [1]], 24, 0).repeat(64, 1).astype(np.uint8)),
        }
        for _ in range(2)
    ]
    Dataset.from_list(rows, features=Features(image=ImageFeature(), annotation=ImageFeature())).to_parquet(path)
    return path


COMMANDS = {
    "evaluate": ["evaluate", "--dataset", "DATA", "--labels", "grass, water", "--output", "OUT", "--overlays", "1"],
    "train": [
        *("train", "--dataset", "DATA", "--labels", "LABELS", "--output", "OUT", "--steps", "1", "--batch_size", "1"),
        *("--workers", "0", "--short_side", "32", "--overlays", "1", "--validation", "DATA"),
        *("--validation_split", "train"),
    ],
    "contact-sheet": [
        *("contact-sheet", "--dataset", "DATA", "--labels", "grass, water", "--count", "1"),
        *("--output", "OUT/sheet.png"),
    ],
    "segment-dataset": ["segment-dataset", "--dataset", "DATA", "--labels", "grass, water", "--output", "OUT"],
}


def run(command, dataset, output):
    labels = dataset.with_name("labels.json")
    labels.write_text(json.dumps(["grass", "water"]))
    places = {"DATA": str(dataset), "LABELS": str(labels), "OUT": str(output), "OUT/sheet.png": f"{output}/sheet.png"}
    arguments = [places.get(word, word) for word in COMMANDS[command]]
    if command in ("evaluate", "segment-dataset"):
        arguments += ["--split", "train"]
    return main(arguments)


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_replaces_what_it_wrote_and_nothing_else(command, dataset, tmp_path, capsys):
    written = tmp_path / "written"
    assert run(command, dataset, written) == 0, capsys.readouterr().err
    names = sorted(files_of(written))
    assert names
    assert not any(name.startswith(LOCK_FILE) for name in names)
    # Names of the files at the top, and of one in each folder
    first = {name.split("/")[0]: name for name in reversed(names)}
    for number, name in enumerate(first.values()):
        folder = tmp_path / f"foreign-{number}"
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(MINE)
        (folder / "progress").mkdir()
        (folder / "progress/notes.txt").write_bytes(MINE)
        capsys.readouterr()
        assert run(command, dataset, folder) == 2, name
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert name.split("/")[0] in error
        assert files_of(folder) == {name: MINE, "progress/notes.txt": MINE}


@pytest.mark.parametrize("taken", ["_overlay.png", "_labels.png", ".json"])
@pytest.mark.parametrize("command", ["segment", "demo"])
def test_results_never_take_the_place_of_another_file(command, taken, model_folder, tmp_path):
    Image.new("RGB", (64, 48)).save(image := tmp_path / "demo.png")
    arguments = {
        "segment": ["segment", str(image), "--labels", "sky, road", "--model", str(model_folder)],
        "demo": ["demo"],
    }[command]
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / f"demo{taken}").write_bytes(MINE)
    for _ in range(2):
        assert main([*arguments, "--output", str(folder)]) == 0
        found = files_of(folder)
        assert found.pop(f"demo{taken}") == MINE
        # The second run replaces the results of the first
        assert sorted(found) == sorted(
            f"demo-2{ending}"
            for ending in ("_overlay.png", "_labels.png", ".json", *([".png"] if command == "demo" else []))
        )


def test_a_demo_leaves_an_image_of_its_name_alone(tmp_path):
    (tmp_path / "demo.png").write_bytes(MINE)
    assert main(["demo", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "demo.png").read_bytes() == MINE
    assert (tmp_path / "demo-2.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["evaluate", "contact-sheet", "segment-dataset"])
def test_a_command_may_be_given_again(command, dataset, tmp_path):
    assert run(command, dataset, tmp_path) == 0
    (tmp_path / "notes.txt").write_bytes(MINE)
    before = files_of(tmp_path)
    assert run(command, dataset, tmp_path) == 0
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("command", ["evaluate", "train", "segment-dataset"])
def test_of_two_runs_in_a_folder_the_second_ends_in_a_sentence_that_names_the_first(
    command, dataset, tmp_path, capsys
):
    with locked_folder(tmp_path):
        before = sorted(os.listdir(tmp_path))
        assert run(command, dataset, tmp_path) == 2
        assert sorted(os.listdir(tmp_path)) == before
    assert f"process {os.getpid()} " in capsys.readouterr().err
    assert not os.listdir(tmp_path)


HOLDING = """
import sys, time
from modeling_san.processing.files import locked_folder

with locked_folder(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_a_killed_process_holds_nobody_up(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDING, tmp_path], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=f"process {process.pid} "), locked_folder(tmp_path):
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with locked_folder(tmp_path):
        assert f"process {os.getpid()} " in (tmp_path / f"{LOCK_FILE}.holder").read_text()
    assert os.listdir(tmp_path) == []


def test_children_that_outlive_a_run_do_not_hold_its_folder(tmp_path):
    stop = multiprocessing.get_context("fork").Event()
    with locked_folder(tmp_path):
        child = multiprocessing.get_context("fork").Process(target=stop.wait)
        child.start()
    try:
        with locked_folder(tmp_path):
            pass
    finally:
        stop.set()
        child.join()


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "out").write_bytes(MINE)
    with pytest.raises(ValueError, match="is a file"), locked_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out").read_bytes() == MINE


def test_what_is_half_written_is_removed_by_its_own_names(tmp_path):
    left = f"{tmp_path.joinpath('b.txt')}.unfinished-0123abcd"
    foreign = ["a.unfinished-novel", "c.unfinished-old", "unfinished-12345678.txt"]
    for name in (left, *(tmp_path / name for name in foreign)):
        with open(name, "wb") as file:
            file.write(MINE)
    remove_unfinished(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(foreign)
    with pytest.raises(FileExistsError), new_folder(tmp_path) as beside:
        (beside / "x").write_bytes(b"new")
    assert sorted(os.listdir(tmp_path)) == sorted(foreign)
