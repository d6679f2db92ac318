"""The benchmarks: what they record, how they compare two runs, and what they refuse. Nothing here asserts a time."""

import dataclasses
import gc
import json
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import __main__ as cli
from benchmarks import measure, others, profiling, stages, workload
from benchmarks.measure import Measurement
from benchmarks.report import Report
from benchmarks.settings import Settings
from modeling_san import BUILTIN_MODEL

pytestmark = pytest.mark.slow

TINY = ("--model", str(BUILTIN_MODEL), "--size", "64", "--classes", "3", "--target", "48", "64", "--rounds", "1")
NETWORK_STAGES = ("text", "clip", "side_adapter", "recognition", "network")
OTHER_STAGES = ("preprocessing", "pil", "post_processing", "end_to_end", "full_scores")
MACHINE = {"processor": "A", "commit": "abc", "date": "today", "gpu": None, "load_average": 0.0}


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fixed_rate(monkeypatch):
    """A machine whose matrix product always runs at 10 GFLOP/s, and takes no time here."""
    monkeypatch.setattr(measure, "product_rates", lambda count: [10.0] * count)
    # Before each stage garbage is collected, which is not to look at everything that other tests have left
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def run(fixed_rate, tmp_path):
    """Runs the command on the built-in model; returns its exit code and the report it wrote."""

    def run(*arguments):
        output = tmp_path / "new.json"
        code = cli.main([*TINY, "--threads", "1", "--output", str(output), *arguments])
        return code, Report.load(output)

    return run


@pytest.fixture
def compare(tmp_path, capsys):
    """Runs --compare on the files of two reports; returns the exit code and what was printed."""

    def compare(old, new, *arguments):
        code = cli.main(["--compare", saved(tmp_path, "old.json", old), saved(tmp_path, "new.json", new), *arguments])
        return code, "".join(capsys.readouterr())

    return compare


def make_report(settings=None, gpu=None, **measured):
    return Report(settings or Settings(), MACHINE | {"gpu": gpu}, [100.0], measured)


def saved(folder, name, report):
    report.save(folder / name)
    return str(folder / name)


def test_a_run_has_time_cost_and_memory_of_every_stage(run, capsys):
    code, written = run("--stages", *NETWORK_STAGES, *OTHER_STAGES, "--flops")
    assert code == 0
    assert set(written.stages) == {*NETWORK_STAGES, *OTHER_STAGES}
    has_memory = sys.platform == "linux"
    for name, measured in written.stages.items():
        assert len(measured.seconds) == 1
        assert measured.cost == pytest.approx(10 * measured.seconds[0])
        assert (measured.peak_memory is not None) == (measured.added_memory is not None) == has_memory
        assert (measured.flops is not None) == (name in NETWORK_STAGES)
    parts = [written.stages[name].flops for name in ("clip", "side_adapter", "recognition")]
    # The rest of the network is the product of masks and classes
    assert sum(parts) < written.stages["network"].flops < 1.01 * sum(parts)
    assert {"commit", "processor", "python", "date", "load_average"} <= set(written.machine)
    assert written.settings == Settings(str(BUILTIN_MODEL), size=64, classes=3, target=(48, 64), threads=1)
    printed = capsys.readouterr().out
    assert all(stages.STAGES[name].title in printed for name in written.stages)


def test_a_report_comes_back_from_its_file_as_it_was(tmp_path):
    measured = Measurement((1.0, 4.0, 2.0), 50.0, 300, 20, warmed_up=False, flops=7)
    made = make_report(network=measured)
    made.scaling = {"size": {"320": {"network": measured}}}
    made.others = {"CLIPSeg": {"20": dataclasses.replace(measured, gflops=None, peak_memory=None)}}
    made.agreement, made.load_average = {"street.jpg": 0.5}, 1.5
    path = Path(saved(tmp_path, "report.json", made))
    assert Report.load(path) == made
    network = json.loads(path.read_text())["stages"]["network"]
    assert (network["median"], network["spread"], network["cost"]) == (2.0, 1.5, 100.0)


def memory(added):
    return Measurement((1.0,), 100.0, 10**9, added * 10**6)


@pytest.mark.parametrize(
    ("old", "new", "code", "verdict"),
    [
        pytest.param(Measurement((2.0,), 100.0), Measurement((1.0,), 200.0), 0, "ok", id="same work, faster machine"),
        pytest.param(
            Measurement((1.0,), 100.0), Measurement((1.0,), 200.0), 1, "SLOWER", id="same time, twice as fast"
        ),
        pytest.param(Measurement((1.0,), 100.0), Measurement((1.1,), 100.0), 0, "ok", id="within the tolerance"),
        pytest.param(Measurement((1.0,), 100.0), Measurement((1.3,), 100.0), 1, "SLOWER", id="beyond the tolerance"),
        pytest.param(Measurement((1.0,), None), Measurement((1.3,), None), 1, "SLOWER", id="without cost, by seconds"),
        pytest.param(memory(200), memory(260), 1, "LARGER", id="more memory"),
        pytest.param(memory(1), memory(6), 0, "ok", id="a little more of hardly any memory"),
        pytest.param(memory(200), Measurement((1.0,), 100.0), 0, "ok", id="memory not known"),
    ],
)
def test_growth_beyond_the_tolerance_is_a_regression(compare, old, new, code, verdict):
    found, printed = compare(make_report(network=old, text=old), make_report(network=new), "--tolerance", "0.2")
    assert found == code
    assert verdict in printed
    assert "not measured" in printed  # text, which is no regression


def test_a_comparison_measures_as_the_older_run_did(run, tmp_path):
    _, first = run("--stages", "pil", "post_processing")
    again = tmp_path / "again.json"
    for seconds, code in ((1e3, 0), (1e-9, 1)):
        earlier = {name: dataclasses.replace(one, seconds=(seconds,)) for name, one in first.stages.items()}
        before = saved(tmp_path, "old.json", dataclasses.replace(first, stages=earlier))
        # No setting is given: all come from the file
        assert cli.main(["--compare", before, "--rounds", "1", "--output", str(again)]) == code
        assert Report.load(again).settings == first.settings
        assert list(Report.load(again).stages) == ["pil", "post_processing"]


@pytest.mark.parametrize(
    ("old", "fact"),
    [
        (make_report(Settings(size=320), network=Measurement((1.0,))), "size 320 and 640"),
        (make_report(text=Measurement((1.0,))), "text"),
        (make_report(), "none"),
        (make_report(gpu="B", network=Measurement((1.0,))), "GPU"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(compare, old, fact):
    code, printed = compare(old, make_report(network=Measurement((1.0,))))
    assert code == 2
    assert fact in printed


SETTINGS_OF_ANOTHER_KIND = '{"format": 1, "settings": {"size": 3}, "machine": {}, "rates": [], "stages": {}}'
NO_TIMES = (
    '{"format": 1, "settings": {"target": [3, 4]}, "machine": {}, "rates": [], "stages": {"text": {"seconds": []}}}'
)


@pytest.mark.parametrize(
    "text", ["", "no JSON", "[]", "{}", '{"format": 99}', SETTINGS_OF_ANOTHER_KIND, NO_TIMES, "[" * 100_000]
)
def test_a_file_of_another_kind_is_refused_in_one_line(tmp_path, capsys, text):
    path = tmp_path / "old.json"
    path.write_text(text)
    assert cli.main(["--compare", str(path)]) == 2
    error = capsys.readouterr().err
    assert str(path) in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        (["--size", "100"], "32"),
        (["--threads", "x"], "'x'"),
        (["--dtype", "float16"], "float16"),
        (["--tolerance", "nan"], "'nan'"),
        (["--stages", "networks"], "networks"),
        (["--scaling", "width"], "width"),
        (["--scaling", "size=33"], "33"),
        (["--scaling", "classes=0"], "'0'"),
        (["--model", "nowhere", "--stages", "clip"], "nowhere"),
        (["--device", "nonsense"], "nonsense"),
        (["--compare", "nowhere.json"], "nowhere.json"),
        (["--compare", "a", "b", "c"], "3 files"),
        (["--compare", "old.json", "--size", "320"], "--size 320"),
        (["--compare", "old.json", "--output", "old.json"], "old.json"),
        (["--output", "nowhere/new.json"], "nowhere"),
        (["--output", "."], "folder"),
        (["--agreement", "drawn.png", "--model", "vit_b_16"], "vit_b_16"),
        (["--agreement", "missing.png"], "missing.png"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(fixed_rate, tmp_path, monkeypatch, capsys, arguments, fact):
    monkeypatch.chdir(tmp_path)
    workload.make_image(32, 32).save("drawn.png")
    old = make_report(Settings(str(BUILTIN_MODEL), 64, 1, 3, (48, 64)), network=Measurement((1.0,)))
    before = Path(saved(tmp_path, "old.json", old)).read_bytes()
    try:
        code = cli.main([*TINY, "--stages", "none", *arguments])
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    error = capsys.readouterr().err
    assert fact in error
    assert error.count("\n") == 1
    assert Path("old.json").read_bytes() == before


def test_the_peak_counts_memory_that_was_freed_again():
    memory = measure.PeakMemory(torch.device("cpu"))
    memory.start()
    torch.ones(16 * 2**20).sum()
    peak, added = memory.read()
    if peak is None:
        pytest.skip("this system keeps no mark of the largest memory that can be reset")
    assert peak > added > 60_000_000
    memory.start()
    assert memory.read()[1] < 30_000_000


def test_a_first_run_beyond_the_budget_is_the_only_one(fixed_rate):
    for budget, rounds, calls_made in ((1e-3, 1, 1), (60, 3, 1 + 3)):
        calls = []
        meter = measure.Meter(torch.device("cpu"), rounds=3, budget=budget)
        measured = meter.measure(lambda calls=calls: (calls.append(None), time.sleep(0.002)))
        assert (len(calls), len(measured.seconds), measured.warmed_up) == (calls_made, rounds, rounds > 1)


def test_operations_of_products_and_attention_are_counted():
    assert profiling.count_flops(lambda: torch.ones(3, 5) @ torch.ones(5, 7)) == 2 * 3 * 5 * 7
    tokens = torch.ones(1, 2, 11, 4)
    attention = profiling.count_flops(lambda: nn.functional.scaled_dot_product_attention(tokens, tokens, tokens))
    assert attention == 2 * (2 * 2 * 11 * 11 * 4)


def test_profiling_shows_operators_and_writes_a_trace(run, tmp_path, capsys):
    run("--stages", "recognition", "--profile")
    assert "aten::" in capsys.readouterr().out
    trace = json.loads((tmp_path / "new_recognition.trace.json").read_text())
    assert any(event.get("name", "").startswith("aten::") for event in trace["traceEvents"])


def test_scaling_measures_each_value(run):
    _, written = run("--stages", "none", "--scaling", "classes=2,4", "queries=3", "size=32")
    assert {axis: list(points) for axis, points in written.scaling.items()} == {
        "classes": ["2", "4"],
        "queries": ["3"],
        "size": ["32"],
    }
    assert set(written.scaling["classes"]["2"]) == {"network", "post_processing", "text"}
    assert set(written.scaling["queries"]["3"]) == {"network", "post_processing"}


def test_others_are_measured_beside_san(run, monkeypatch):
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 16}
    decoder = {"reduce_dim": 8, "extract_layers": [0], "decoder_num_attention_heads": 2}
    vision = {**layers, "num_hidden_layers": 2, "patch_size": 16, "image_size": 32}
    clipseg = {"vision_config": vision, "text_config": layers, "projection_dim": 16, "decoder_intermediate_size": 16}
    monkeypatch.setattr(others, "CLIPSEG", clipseg | decoder)
    eomt = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "num_blocks": 1}
    monkeypatch.setattr(others, "EOMT", eomt)
    swin = {"model_type": "swin", "embed_dim": 8, "depths": [1] * 4, "num_heads": [1] * 4, "window_size": 2}
    swin["out_features"] = ["stage1", "stage2", "stage3", "stage4"]
    sizes = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "decoder_layers": 2, "encoder_layers": 1}
    monkeypatch.setattr(others, "MASK2FORMER", {**sizes, "backbone_config": swin, "num_attention_heads": 2})
    monkeypatch.setattr(others, "MASK2FORMER_SIDE", 64)
    small = ["lightweight", "SegFormer-B0"]
    _, written = run("--stages", "none", "--others", "1", "2")
    assert list(written.others) == ["SAN", "SAN's text, once", *small, "CLIPSeg", "EoMT-B", "Mask2Former"]
    assert all(list(by_labels) == ["1", "2"] for by_labels in written.others.values())


def test_full_scores_give_the_segmentation_that_post_processing_gives(tmp_path):
    settings = Settings(model=str(BUILTIN_MODEL), size=128, classes=7, target=(96, 150))
    work = workload.Workload(settings, tmp_path)
    outputs = work.outputs(classes=7, size=128)
    [plain] = stages.label_maps_from_full_scores(outputs, (96, 150))
    [ours] = work.processor.post_process_semantic_segmentation(outputs, target_sizes=[(96, 150)])
    assert plain.shape == ours.shape == (96, 150)
    # Rounding may decide between two classes whose scores are equal
    assert (plain == ours).float().mean() > 0.999
    assert len(ours.unique()) > 2


def test_agreement_is_the_share_of_pixels_with_the_same_label(run, tmp_path):
    image = tmp_path / "drawn.png"
    workload.make_image(64, 96).save(image)
    for dtype, least in (("bfloat16", 0.9), ("float32", 1.0)):
        code, written = run("--stages", "none", "--dtype", dtype, "--agreement", str(image))
        assert code == 0
        assert least <= written.agreement[str(image)] <= 1
