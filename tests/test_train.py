"""Training runs: they continue exactly, lose nothing, agree with `Trainer` and with themselves on two processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from safetensors.torch import load_file
from transformers import TrainingArguments

from drawn_world.make_model import SAN_OPTIONS, make_processor
from drawn_world.tokenizer import build_tokenizer
from modeling_san import SANForOpenVocabSegmentation, SANProcessor
from modeling_san.commands.main import main
from modeling_san.commands.train import parse_recipe
from modeling_san.training import train as train_module
from modeling_san.training.augmentation import Augmentation
from modeling_san.training.data import Collator, EndlessOrder, TrainingImages, load_images
from modeling_san.training.evaluate import evaluate
from modeling_san.training.label_sets import load_label_set
from modeling_san.training.metrics import ConfusionMatrix
from modeling_san.training.recipe import Recipe, read_recipe, recipe_names
from modeling_san.training.callbacks import read_metrics
from modeling_san.training.train import NonFiniteLossError, train
from modeling_san.training.trainer import SANTrainer, SeedEachStep, StreamingMeanIoU

pytestmark = pytest.mark.usefixtures("one_thread")

LABELS = ["dark", "light"]
SIZE = (48, 64)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A folder with a tiny untrained model, six images as parquet, and their label names."""
    from transformers import CLIPModel

    from drawn_world.pretrain_clip import demo_clip_config

    folder = tmp_path_factory.mktemp("start")
    processor = make_processor(build_tokenizer(600))
    torch.manual_seed(0)
    clip = CLIPModel(demo_clip_config(processor.tokenizer))
    model = SANForOpenVocabSegmentation.from_clip(clip, **{**SAN_OPTIONS, "num_queries": 4, "train_num_points": 64})
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    images = [two_tone(seed) for seed in range(6)]
    columns = {"image": [pair[0] for pair in images], "annotation": [pair[1] for pair in images]}
    features = Features({"image": ImageFeature(), "annotation": ImageFeature()})
    Dataset.from_dict(columns, features=features).to_parquet(folder / "data.parquet")
    (folder / "labels.json").write_text(json.dumps(LABELS))
    return folder


def two_tone(seed):
    """An image that is dark on the left and light on the right of a random column, with its label map."""
    labels = np.zeros(SIZE, np.uint8)
    labels[:, int(np.random.default_rng(seed).integers(16, 48)) :] = 1
    image = np.where(labels[..., None] == 1, np.uint8(230), np.uint8(30)).repeat(3, axis=2)
    return Image.fromarray(image), Image.fromarray(labels)


@pytest.fixture
def options(start, tmp_path):
    """Fields of a recipe for a tiny run on the CPU."""
    return {
        "model": str(start / "model"),
        "dataset": str(start / "data.parquet"),
        "labels": str(start / "labels.json"),
        "output_dir": str(tmp_path / "run"),
        "short_side": 48,
        "steps": 6,
        "batch_size": 2,
        "learning_rate": 1e-3,
        "max_grad_norm": 1.0,
        "checkpoint_every": 3,
        "log_every": 1,
        "workers": 0,
        "cpu": True,
    }


def run(options, **changes):
    recipe = Recipe(**{**options, **changes})
    train(recipe, progress=False)
    return Path(recipe.output_dir)


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same(first, second):
    assert first.keys() == second.keys()
    different = [name for name, value in first.items() if not torch.equal(value, second[name])]
    assert not different


def as_arguments(options):
    return [f"--{name}={value}" for name, value in options.items()]


def start_process(options, **environment):
    arguments = [sys.executable, "-m", "modeling_san.training.train", *as_arguments(options)]
    return subprocess.Popen(
        arguments,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(condition, process, seconds=120):
    """Poll until `condition()` is true; false if the process ended before."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    raise AssertionError("nothing happened")


# ---------------------------------------- a whole run


def test_a_run_leaves_a_model_that_loads_with_its_labels(start, options):
    folder = run(options, validation=options["dataset"], overlays=2, evaluate_every=3)
    model = SANForOpenVocabSegmentation.from_pretrained(folder)
    assert model.config.id2label == dict(enumerate(LABELS))
    assert SANProcessor.from_pretrained(folder).image_processor.size["shortest_edge"] == 48
    assert set(json.loads((folder / "results.json").read_text())["per_class_iou"]) == set(LABELS)
    with Image.open(folder / "curves.png") as curves:
        assert min(curves.size) > 300
    drawn = [sorted(path.name for path in step.iterdir()) for step in sorted((folder / "overlays").iterdir())]
    assert len(drawn) == 2
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 2
    assert not list(folder.rglob("*unfinished*"))


def test_weights_can_be_read_by_whom_the_folder_is_open_to(options):
    folder = run(options, steps=1)
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode


def test_each_term_of_each_output_is_logged_by_name(options):
    lines = read_metrics(run(options) / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    terms = ["loss_cross_entropy", "loss_mask", "loss_dice"]
    names = [*terms, *(f"{term}_0" for term in terms)]
    for line in lines:
        assert line["loss"] == pytest.approx(sum(line[name] for name in names), rel=1e-5)
        assert line["images_per_second"] > 0
        assert 0.05 < line["peak_memory_gb"] < 100
        assert line["grad_norm"] > 0
    # Polynomial decay of power 0.9 to 0 at step 6, after the step that the line is of
    assert [line["learning_rate"] for line in lines] == pytest.approx([1e-3 * (1 - k / 6) ** 0.9 for k in range(1, 7)])


def test_training_makes_the_loss_fall(options):
    lines = read_metrics(run(options, steps=30, checkpoint_every=30) / "metrics.jsonl")
    losses = [line["loss"] for line in lines]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_accumulated_batches_are_one_batch(options):
    """Mask terms are divided by each part's own number of masks, which is the same here: two in every image."""
    images = {"short_sides": [48], "crop_size": [48, 64], "photometric": False, "flip": 0.0}
    whole = train_module._Run(Recipe(**{**options, **images, "batch_size": 4}), False)
    accumulated = {"batch_size": 4, "gradient_accumulation_steps": 2}
    parts = train_module._Run(Recipe(**{**options, **images, **accumulated}), False)
    with fixed_points():
        first, _, _ = whole._forward_and_backward()
        second, _, _ = parts._forward_and_backward()
    assert first["loss_cross_entropy"] == pytest.approx(second["loss_cross_entropy"], rel=1e-5)
    for one, other in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-4)


# ---------------------------------------- resuming


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_equals_an_uncut_one_bit_for_bit(options, tmp_path, workers):
    whole = run(options, workers=workers)
    cut = tmp_path / "cut" / "checkpoints"
    cut.mkdir(parents=True)
    shutil.copytree(whole / "checkpoints" / "step-00000003", cut / "step-00000003")
    resumed = run(options, output_dir=str(cut.parent), resume="auto", workers=workers)
    assert_same(weights(whole), weights(resumed))
    states = [load_training_state(folder / "checkpoints" / "step-00000006")[0] for folder in (whole, resumed)]
    first, second = (state["optimizer"]["state"] for state in states)
    assert first.keys() == second.keys()
    for index in first:
        assert_same(first[index], second[index])
    # The schedule went on, too: the last three steps had the same losses at the same rates.
    timeless = ("step", "loss", "learning_rate", "grad_norm")
    tails = [
        [{name: line[name] for name in timeless} for line in read_metrics(folder / "metrics.jsonl")[-3:]]
        for folder in (whole, resumed)
    ]
    assert tails[0] == tails[1]


def test_resuming_a_finished_run_changes_nothing(options):
    folder = run(options)
    before = weights(folder), (folder / "metrics.jsonl").read_text()
    run(options, resume="auto")
    assert_same(before[0], weights(folder))
    assert before[1] == (folder / "metrics.jsonl").read_text()


def test_auto_without_a_checkpoint_starts_anew(options):
    assert (run(options, steps=1, resume="auto") / "model.safetensors").is_file()


def test_a_folder_with_a_run_is_not_started_over(options):
    run(options, steps=1)
    with pytest.raises(ValueError, match="already holds a run: continue it with resume: auto"):
        run(options, steps=1)


def test_a_run_can_go_on_for_more_steps(options, capsys):
    run(options, steps=3)
    folder = run(options, steps=5, resume="auto")
    assert [line["step"] for line in read_metrics(folder / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert "steps 3 -> 5" in capsys.readouterr().err


def test_fewer_steps_than_were_done_are_refused(options):
    run(options, steps=3)
    with pytest.raises(ValueError, match="has 3 steps already"):
        run(options, steps=2, resume="auto")


def test_going_back_to_an_older_checkpoint_leaves_the_other_course_behind(options):
    folder = run(options, checkpoint_every=2, keep_checkpoints=3)
    abandoned = weights(folder / "checkpoints" / "step-00000006")
    run(options, checkpoint_every=2, keep_checkpoints=3, seed=1, resume=str(folder / "checkpoints" / "step-00000002"))
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    later = ["step-00000004", "step-00000006"]
    assert names == [*(f"abandoned-{name}" for name in later), "step-00000002", *later]
    assert_same(abandoned, weights(folder / "checkpoints" / "abandoned-step-00000006"))
    assert_same(weights(folder), weights(folder / "checkpoints" / "step-00000006"))
    assert [line["step"] for line in read_metrics(folder / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_a_new_weight_decay_holds_from_the_resumed_step_on(options):
    folder = run(options, steps=3)
    run(options, steps=4, weight_decay=0.5, resume="auto", checkpoint_every=4)
    state, _ = load_training_state(folder / "checkpoints" / "step-00000004")
    assert [group["weight_decay"] for group in state["optimizer"]["param_groups"]] == [0.5, 0.0]


def test_resuming_with_other_parameters_is_refused(options):
    run(options, steps=3)
    with pytest.raises(ValueError, match="resume with the `trainable` it was started with"):
        run(options, steps=5, resume="auto", trainable="everything")


@pytest.mark.parametrize("damage", ["missing", "cut", "pickle"])
def test_a_damaged_checkpoint_is_refused_in_one_sentence(options, damage):
    folder = run(options, steps=3)
    state = folder / "checkpoints" / "step-00000003" / "training_state.pt"
    if damage == "missing":
        state.unlink()
    elif damage == "cut":
        state.write_bytes(state.read_bytes()[:1000])
    else:
        torch.save({"optimizer": subprocess.Popen}, state)
    with pytest.raises(ValueError, match="cannot be resumed from"):
        run(options, resume="auto")


# ---------------------------------------- nothing lost


def test_a_run_killed_while_it_writes_a_checkpoint_goes_on_as_if_it_had_not_been(options, tmp_path):
    uncut = run(options, output_dir=str(tmp_path / "uncut"), checkpoint_every=1)
    checkpoints = Path(options["output_dir"]) / "checkpoints"
    process = start_process({**options, "checkpoint_every": 1, "keep_checkpoints": 10})

    def writes_the_third():
        return len(list(checkpoints.glob("step-*[0-9]"))) >= 2 and any(checkpoints.glob("step-*.unfinished-*"))

    assert wait_for(writes_the_third, process), process.stderr.read()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    left = [path for path in checkpoints.iterdir() if path.name[-1].isdigit() and "unfinished" not in path.name]
    assert left
    for checkpoint in left:
        load_training_state(checkpoint)
        SANForOpenVocabSegmentation.from_pretrained(checkpoint)
    resumed = run(options, resume="auto", checkpoint_every=1)
    assert not list(checkpoints.glob("*unfinished*"))
    assert_same(weights(uncut), weights(resumed))
    assert [line["step"] for line in read_metrics(resumed / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_sigterm_saves_a_checkpoint_and_exits_with_0(options, tmp_path):
    uncut = run(options, output_dir=str(tmp_path / "uncut"), steps=40, checkpoint_every=1000)
    folder = Path(options["output_dir"])
    process = start_process({**options, "steps": 40, "checkpoint_every": 1000})
    metrics = folder / "metrics.jsonl"
    assert wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2, process), process.stderr.read()
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "a checkpoint is saved" in said
    [checkpoint] = (folder / "checkpoints").iterdir()
    assert 2 <= load_training_state(checkpoint)[1]["step"] < 40
    assert not (folder / "model.safetensors").exists()
    assert_same(weights(uncut), weights(run(options, steps=40, checkpoint_every=1000, resume="auto")))


def test_a_signal_to_the_whole_group_loses_nothing_either(options):
    """As schedulers and terminals send it: the processes that prepare images get it, too."""
    folder = Path(options["output_dir"])
    process = start_process({**options, "steps": 400, "checkpoint_every": 1000, "workers": 2})
    metrics = folder / "metrics.jsonl"
    assert wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2, process), process.stderr.read()
    os.killpg(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    [checkpoint] = (folder / "checkpoints").iterdir()
    load_training_state(checkpoint)


def test_an_error_in_the_middle_saves_the_steps_before(options, monkeypatch):
    taken = []

    def fail_at_the_third(self):
        taken.append(self.step)
        if self.step == 2:
            raise RuntimeError("out of memory")
        return forward_and_backward(self)

    forward_and_backward = train_module._Run._forward_and_backward
    monkeypatch.setattr(train_module._Run, "_forward_and_backward", fail_at_the_third)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(options, checkpoint_every=1000)
    assert taken == [0, 1, 2]
    [checkpoint] = (Path(options["output_dir"]) / "checkpoints").iterdir()
    assert load_training_state(checkpoint)[1]["step"] == 2


def test_a_gradient_that_is_not_finite_does_not_reach_the_weights(options, monkeypatch):
    def break_one(self):
        terms, indices, _ = forward_and_backward(self)
        if self.step == 1:
            self.model.background_embedding.grad.fill_(float("inf"))
            return terms, indices, float("inf")
        return terms, indices, 1.0

    forward_and_backward = train_module._Run._forward_and_backward
    monkeypatch.setattr(train_module._Run, "_forward_and_backward", break_one)
    with pytest.raises(NonFiniteLossError, match=r"step 2 is not finite .*grad_norm inf"):
        run(options)
    [checkpoint] = (Path(options["output_dir"]) / "checkpoints").iterdir()
    assert all(value.isfinite().all() for value in weights(checkpoint).values())


@pytest.fixture
def make_small_disk(tmp_path):
    """Makes a folder on a file system of so many bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def make(size):
        mount = ["mount", "-t", "tmpfs", "-o", f"size={int(size)}", "tmpfs", str(folder)]
        mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
        if mounted.returncode:
            pytest.skip(f"needs the right to mount a small file system: {mounted.stderr.strip()}")
        return folder

    yield make
    subprocess.run(["umount", str(folder)], capture_output=True, check=False)


def size_of(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_a_full_disk_costs_checkpoints_but_not_the_run(options, make_small_disk, capsys):
    once = run(options, checkpoint_every=6)
    checkpoint, model = (size_of(once / "checkpoints"), (once / "model.safetensors").stat().st_size)
    # Room for a checkpoint and the model, not for two checkpoints
    disk = make_small_disk(checkpoint + model + min(model, checkpoint - model) / 2 + 2**18)
    folder = run(options, output_dir=str(disk / "run"), checkpoint_every=2, keep_checkpoints=1)
    assert_same(weights(once), weights(folder))
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000002"]
    said = capsys.readouterr().err
    assert said.count("Training goes on") == 2
    assert "checkpoint of step 4 cannot be written" in said


def test_a_model_that_does_not_fit_on_the_disk_can_be_saved_later(options, make_small_disk, tmp_path):
    once = run(options, checkpoint_every=6)
    disk = make_small_disk(size_of(once / "checkpoints") + 2**18)
    with pytest.raises(OSError, match="cannot be saved"):
        run(options, output_dir=str(disk / "run"), steps=6, checkpoint_every=3, keep_checkpoints=1)
    assert not (disk / "run" / "model.safetensors").exists()
    shutil.copytree(disk / "run", tmp_path / "larger")
    assert_same(weights(once), weights(run(options, output_dir=str(tmp_path / "larger"), resume="auto")))


def test_a_loss_that_is_not_finite_stops_the_run_after_saving(options):
    with pytest.raises(NonFiniteLossError) as caught:
        run(options, learning_rate=1e30, max_grad_norm=1e30)
    folder = Path(options["output_dir"])
    report = json.loads((folder / "non_finite.json").read_text())
    assert f"step {report['step']} " in str(caught.value)
    assert "loss_mask nan" in str(caught.value)
    assert len(report["images"]) == 2
    assert str(report["images"]) in str(caught.value)
    _, progress = load_training_state(Checkpoints(folder / "checkpoints", 2).latest())
    assert progress["step"] == report["step"] - 1


def test_the_best_checkpoint_and_the_last_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step, best in ((1, None), (2, 2), (3, 2), (4, 2), (5, 2), (6, 6)):
        checkpoints.save(step, lambda folder: None, {}, {"best_step": best})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000005", "step-00000006"]
    for step in (7, 8, 9):
        checkpoints.save(step, lambda folder: None, {}, {"best_step": 6})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000006", "step-00000008", "step-00000009"]
    assert checkpoints.latest() == tmp_path / "step-00000009"


def test_the_best_is_kept_whenever_it_was_measured(options, monkeypatch):
    scores = iter([0.1, 0.9, 0.2, 0.3, 0.4, 0.5])
    figures = {"mean_accuracy": 0.0, "overall_accuracy": 0.0, "per_class_iou": {}}
    monkeypatch.setattr(train_module, "evaluate", lambda *args, **kwargs: {"mean_iou": next(scores), **figures})
    changes = {"evaluate_every": 1, "checkpoint_every": 4, "keep_checkpoints": 1, "overlays": 0}
    folder = run(options, validation=options["dataset"], **changes)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000002", "step-00000006"]
    assert load_training_state(folder / "checkpoints" / "step-00000006")[1]["best_step"] == 2


def test_a_checkpoint_that_cannot_be_written_leaves_the_older_ones(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, lambda folder: None, {}, {})

    def fail(folder):
        (folder / "half").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        checkpoints.save(2, fail, {}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


# ---------------------------------------- many processes


class fixed_points:
    """Chance without chance: the same points for every mask, whatever is drawn together."""

    def __enter__(self):
        self.rand = torch.rand
        torch.rand = self._fixed

    def __exit__(self, *error):
        torch.rand = self.rand

    def _fixed(self, *size, device=None, dtype=None, **kwargs):
        size = tuple(size[0]) if isinstance(size[0], (tuple, list, torch.Size)) else size
        generator = torch.Generator().manual_seed(size[-2])
        values = self.rand(*size[1:], generator=generator)
        return values.expand(size).clone().to(device=device, dtype=dtype)


def _gradients(rank, world_size, options, port, results):
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size), ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    torch.set_num_threads(1)
    whole_run = train_module._Run(Recipe(**options), False)
    with fixed_points():
        terms, indices, norm = whole_run._forward_and_backward()
    gradients = {
        name: parameter.grad for name, parameter in whole_run.model.named_parameters() if parameter.grad is not None
    }
    torch.save({"terms": terms, "indices": indices, "norm": norm, "gradients": gradients}, f"{results}-{rank}")


def test_two_processes_have_the_gradients_of_one_with_twice_the_batch(options, start, tmp_path):
    # Images with one and with two labels, so that processes hold different numbers of masks
    pairs = [two_tone(seed) for seed in range(4)]
    pairs[1] = (pairs[1][0], Image.new("L", SIZE[::-1], 1))
    columns = {"image": [pair[0] for pair in pairs], "annotation": [pair[1] for pair in pairs]}
    features = Features({"image": ImageFeature(), "annotation": ImageFeature()})
    Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "uneven.parquet")
    options = {
        **options, "dataset": str(tmp_path / "uneven.parquet"), "batch_size": 4, "trainable": "everything",
        "short_sides": [48], "crop_size": [48, 64], "photometric": False, "max_grad_norm": 1e9,
    }  # fmt: skip
    results = str(tmp_path / "result")
    mp.spawn(_gradients, args=(2, {**options, "output_dir": str(tmp_path / "two")}, free_port(), results), nprocs=2)
    both = [torch.load(f"{results}-{rank}", weights_only=True) for rank in range(2)]
    alone = train_module._Run(Recipe(**options), False)
    with fixed_points():
        _, indices, norm = alone._forward_and_backward()
    assert sorted(both[0]["indices"] + both[1]["indices"]) == sorted(indices)
    assert both[0]["norm"] == pytest.approx(norm, rel=1e-4)
    compared = 0
    for name, parameter in alone.model.named_parameters():
        if parameter.grad is not None:
            for one in both:
                torch.testing.assert_close(one["gradients"][name], parameter.grad, atol=1e-5, rtol=1e-4)
            compared += 1
    assert compared > 50


def free_port():
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_launched_on_two_processes_it_is_the_same_program(options):
    # `accelerate launch` starts several processes on GPUs only; on a CPU it hands over to torchrun or mpirun
    launch = ["--nproc_per_node", "2", "--master_port", str(free_port()), "-m", "modeling_san.training.train"]
    arguments = as_arguments({**options, "validation": options["dataset"]})
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *launch, *arguments],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes, cpu" in done.stderr
    folder = Path(options["output_dir"])
    assert [line["step"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert done.stdout.count("mean IoU") == 1
    SANForOpenVocabSegmentation.from_pretrained(folder)


# ---------------------------------------- recipes


@pytest.mark.parametrize("name", ["coco_stuff_vit_b_16", "coco_stuff_vit_l_14", "fine_tune", "fine_tune_everything"])
def test_shipped_recipes_can_be_read(name):
    assert name in recipe_names()
    recipe = parse_recipe(["--config", name, "--dataset", "x", "--output-dir", "y"])
    assert Recipe(**vars(recipe)) == recipe


def test_every_recipe_is_tested():
    assert recipe_names() == ("coco_stuff_vit_b_16", "coco_stuff_vit_l_14", "fine_tune", "fine_tune_everything")


@pytest.mark.parametrize("templates", [["a photo of a {}."], ["vild"], ["templates.txt"]])
def test_templates_are_given_by_name_by_file_or_themselves(options, tmp_path, monkeypatch, templates):
    monkeypatch.chdir(tmp_path)
    Path("templates.txt").write_text("a photo of a {}.\n")
    saved = SANProcessor.from_pretrained(run(options, steps=1, templates=templates)).templates
    assert len(saved) == (14 if templates == ["vild"] else 1)


def test_templates_that_are_nowhere_are_refused(options):
    with pytest.raises(ValueError, match="nor a file of templates"):
        run(options, templates=["vildd"])


def test_the_papers_recipe_is_the_papers():
    recipe = parse_recipe(["--config", "coco_stuff_vit_b_16"])
    assert (recipe.steps, recipe.batch_size, recipe.power, recipe.warmup_steps) == (60_000, 32, 0.9, 0)
    assert (recipe.weight_decay, recipe.crop_size, recipe.max_long_side) == (1e-4, [640, 640], 2560)
    assert recipe.short_sides == [320, 384, 448, 512, 576, 640, 704, 768, 832, 896, 960]
    large = parse_recipe(["--config", "coco_stuff_vit_l_14"])
    assert large.san_options["clip_input_scale"] == 0.7
    assert large.san_options["sls_start_layer"] == 18


def test_options_win_over_the_file(tmp_path):
    (tmp_path / "recipe.yaml").write_text("steps: 10\nlearning_rate: 1e-3\ncrop_size: [32, 64]\nsan: {}\n")
    recipe = parse_recipe(["--config", str(tmp_path / "recipe.yaml"), "--steps", "20", "--no_photometric"])
    # 1e-3 without a dot is a text to YAML
    assert (recipe.steps, recipe.learning_rate, recipe.crop_size) == (20, 1e-3, [32, 64])
    assert not recipe.photometric


def test_the_recipe_of_a_run_starts_it_again(options, tmp_path):
    folder = run(options, steps=1)
    recipe = parse_recipe(["--config", str(folder / "recipe.yaml")])
    assert recipe == Recipe(**{**options, "steps": 1})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config", "missing.yaml"], "cannot be read"),
        (["--steps", "0"], "steps is 0"),
        (["--steps", "many"], "invalid int value"),
        (["--learning_rate", "nan"], "learning_rate"),
        (["--learning_rate", "-1"], "learning_rate"),
        (["--batch_size", "3", "--gradient_accumulation_steps", "2"], "does not divide"),
        (["--mixed_precision", "int4"], "mixed_precision"),
        (["--san", "[1]", "--clip", "x"], "JSON object"),
        (["--san", "{", "--clip", "x"], "not valid JSON"),
        (["--model", "a", "--clip", "b"], "both model and clip"),
        (["--dataset", "x"], "output_dir is missing"),
        (["--output_dir", "x"], "dataset is missing"),
        (["--nonsense"], "nonsense"),
    ],
)
def test_a_wrong_recipe_is_one_line_and_exit_code_2(arguments, said, capsys):
    try:
        code = main(["train", *arguments])
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("steps: [", "not valid YAML"),
        ("- 1", "no `key: value` lines"),
        ("lerning_rate: 1", "did you mean learning_rate"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_a_malformed_recipe_file_is_refused(tmp_path, content, said):
    (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises(ValueError, match=said):
        read_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    ("trainable", "trained", "frozen"),
    [
        ("paper", "vision_model.embeddings.position_embedding.weight", "visual_projection.weight"),
        ("side-adapter", "side_adapter.", "vision_model.embeddings.position_embedding.weight"),
        ("prompts", "prompt_embedding", "vision_model.embeddings.position_embedding.weight"),
        ("everything", "text_model.", "nothing"),
        ("visual_projection", "visual_projection.weight", "vision_model.embeddings.position_embedding.weight"),
    ],
)
def test_the_recipe_chooses_what_trains(options, start, trainable, trained, frozen):
    folder = run(options, steps=2, trainable=trainable, num_clip_prompts=3)
    before, after = weights(start / "model"), weights(folder)
    changed = {name for name, value in after.items() if name not in before or not torch.equal(value, before[name])}
    assert any(name.startswith(trained) for name in changed)
    assert not any(name.startswith(frozen) for name in changed)
    assert any(name.startswith("side_adapter.") for name in changed)
    SANForOpenVocabSegmentation.from_pretrained(folder)


def test_a_parameter_that_is_not_there_is_named(options):
    with pytest.raises(ValueError, match="visual_projektion"):
        run(options, trainable="visual_projektion")


def test_a_crop_that_the_patches_do_not_fill_is_refused(options):
    with pytest.raises(ValueError, match="multiples of 8"):
        run(options, crop_size=[50])


def test_streamed_data_trains_and_continues(options, tmp_path):
    whole = run(options, streaming=True, steps=4, checkpoint_every=2)
    cut = tmp_path / "cut" / "checkpoints"
    cut.mkdir(parents=True)
    shutil.copytree(whole / "checkpoints" / "step-00000002", cut / "step-00000002")
    resumed = run(options, streaming=True, steps=4, checkpoint_every=2, output_dir=str(cut.parent), resume="auto")
    assert_same(weights(whole), weights(resumed))


def test_a_tracker_gets_the_figures(options):
    pytest.importorskip("tensorboard")
    folder = run(options, steps=2, trackers=["tensorboard"])
    assert list(folder.rglob("events.out.tfevents*"))


def test_mixed_precision_ends_with_training(options):
    """What is measured at the end is what is saved, not that under autocast."""
    folder = run(options, steps=2, mixed_precision="bf16", validation=options["dataset"])
    label_set = load_label_set(options["labels"])
    model = SANForOpenVocabSegmentation.from_pretrained(folder).eval()
    images = load_images(options["dataset"])
    again = evaluate(model, SANProcessor.from_pretrained(folder), images, label_set, progress=False)
    assert again["per_class_iou"] == json.loads((folder / "results.json").read_text())["per_class_iou"]


# ---------------------------------------- transformers' Trainer


@pytest.fixture
def trainer_parts(options, start):
    """Model, processor and images, as a user of `Trainer` makes them."""
    model = SANForOpenVocabSegmentation.from_pretrained(start / "model")
    processor = SANProcessor.from_pretrained(start / "model")
    processor.image_processor.size = {"shortest_edge": 48, "longest_edge": 192}
    model.set_labels(LABELS, processor)
    dataset = TrainingImages(
        load_images(options["dataset"]),
        load_label_set(options["labels"]),
        processor.image_processor,
        Augmentation.for_size(48, (48, 64)),
        seed=0,
    )
    return model, processor, dataset


def make_arguments(folder, **changes):
    return TrainingArguments(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 2,
            "label_names": ["labels"],
            "remove_unused_columns": False,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
            "seed": 0,
            **changes,
        }
    )


def test_trainer_and_san_train_have_the_same_losses(options, trainer_parts, tmp_path):
    steps = 20
    ours = read_metrics(run(options, steps=steps, checkpoint_every=steps) / "metrics.jsonl")
    model, _, dataset = trainer_parts
    order = list(islice(EndlessOrder(len(dataset), seed=0, batch_size=2), 2 * steps))
    trainer = SANTrainer(
        model=model,
        args=make_arguments(
            tmp_path / "trainer",
            max_steps=steps,
            learning_rate=options["learning_rate"],
            weight_decay=1e-4,
            lr_scheduler_type="polynomial",
            lr_scheduler_kwargs={"power": 0.9, "lr_end": 0.0},
            max_grad_norm=1.0,
            logging_steps=1,
            logging_first_step=True,
            train_sampling_strategy="sequential",
        ),
        train_dataset=[dataset[number] for number in order],
        data_collator=Collator(),
        callbacks=[SeedEachStep()],
    )
    trainer.train()
    theirs = [line for line in trainer.state.log_history if "loss" in line]
    assert len(theirs) == len(ours) == steps
    for one, other in zip(ours, theirs, strict=True):
        assert one["loss"] == pytest.approx(float(other["loss"]), rel=1e-5)


def test_trainer_evaluates_batch_by_batch(trainer_parts, tmp_path):
    model, processor, dataset = trainer_parts
    metrics = StreamingMeanIoU(processor, len(LABELS))
    trainer = SANTrainer(
        model=model,
        args=make_arguments(tmp_path, batch_eval_metrics=True),
        eval_dataset=dataset,
        data_collator=Collator(),
        compute_metrics=metrics,
        preprocess_logits_for_metrics=metrics.to_label_map,
    )
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first["eval_mean_iou"] == second["eval_mean_iou"]
    confusion = ConfusionMatrix(len(LABELS))
    model.eval()
    with torch.no_grad():
        for number in range(len(dataset)):
            item = dataset[number]
            outputs = model(pixel_values=item["pixel_values"][None])
            size = tuple(item["labels"].shape)
            [predicted] = processor.post_process_semantic_segmentation(outputs, target_sizes=[size])
            confusion.update(predicted, item["labels"])
    assert first["eval_mean_iou"] == pytest.approx(confusion.mean_iou(), abs=1e-6)
    assert np.isfinite(first["eval_loss"])


def test_trainer_predicts_label_maps(trainer_parts, tmp_path):
    model, processor, dataset = trainer_parts
    metrics = StreamingMeanIoU(processor, len(LABELS))
    trainer = SANTrainer(
        model=model, args=make_arguments(tmp_path), data_collator=Collator(),
        preprocess_logits_for_metrics=metrics.to_label_map,
    )  # fmt: skip
    assert trainer.predict(dataset).predictions.shape == (6, 48, 64)


def test_the_streaming_metric_reads_logits_of_semantic_segmentation_too(trainer_parts):
    _, processor, dataset = trainer_parts
    metrics = StreamingMeanIoU(processor, len(LABELS))
    labels = dataset[0]["labels"][None]
    one_hot = torch.nn.functional.one_hot(labels.where(labels != 255, 0), len(LABELS)).movedim(-1, 1).float()
    found = metrics.to_label_map(one_hot, labels)
    assert torch.equal(found[labels != 255], labels[labels != 255])


def test_a_tracker_that_is_not_there_is_named(options):
    with pytest.raises(ValueError, match="nonsense"):
        run(options, trackers=["nonsense"])


def test_curves_can_be_drawn_while_a_run_goes_on(options, capsys):
    pytest.importorskip("matplotlib")
    folder = run(options, steps=2)
    (folder / "curves.png").unlink()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert main(["curves", str(folder)]) == 0
    assert (folder / "curves.png").is_file()
    assert main(["curves", str(folder / "nothing")]) == 2
