"""`python -m benchmarks`: measure, print tables, write JSON, compare with an earlier run."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from modeling_san.commands.errors import CommandError, one_line
from modeling_san.commands.parser import CommandParser, positive_integer, positive_number

from .settings import COMPILE_MODES, DTYPES, SIZE_DIVISOR, Settings

if TYPE_CHECKING:
    from .measure import Meter
    from .report import Report

_DESCRIPTION = """\
Measure how fast SAN is and how much memory it takes, stage by stage, with random weights. Times on a processor are
also given as cost: seconds times the GFLOP/s of a float32 product of two 2048 x 2048 matrices measured in the same
run, so that figures of different machines can be compared. benchmarks/README.md explains the tables.
"""
_EXAMPLE = """\
example:
  python -m benchmarks --threads 2 --output before.json
  python -m benchmarks --compare before.json                measure again the same way; exit code 1 if it got worse
  python -m benchmarks --compare before.json after.json     compare two files without measuring
  python -m benchmarks --stages network post_processing --dtype bfloat16 --compile
  python -m benchmarks --stages network --profile --flops
  python -m benchmarks --stages none --scaling size=320,640 classes
  python -m benchmarks --stages none --others 1 20
  python -m benchmarks --stages none --model outputs/fine-tuned --dtype bfloat16 --agreement photos/*.jpg

Exit code 0, 1 if --compare finds a stage slower or larger, 2 for bad input.
"""

_DEFAULT_OUTPUT = Path("outputs/benchmarks.json")
_DEFAULT_TOLERANCE = 0.15
_NO_STAGES = "none"
_WARMUPS = {"eager": 1, "prepared": 3}

EXIT_REGRESSION = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


class _Parser(CommandParser):
    """Says what is wrong under this command's own name."""

    def error(self, message: str) -> NoReturn:
        """End with exit code 2."""
        print(f"benchmarks: error: {one_line(message)} (see python -m benchmarks --help)", file=sys.stderr)
        raise SystemExit(EXIT_BAD_INPUT)


def make_parser() -> argparse.ArgumentParser:
    """The parser. Settings that are not given are None: `--compare` takes them from the older run."""
    default = Settings()
    parser = _Parser(prog="python -m benchmarks", description=_DESCRIPTION, epilog=_EXAMPLE)
    what = parser.add_argument_group("what is measured")
    what.add_argument(
        "--model", metavar="NAME_OR_FOLDER", help=f"vit_b_16, vit_l_14 or a model's folder (default: {default.model})"
    )
    what.add_argument("--size", type=_side, help=f"side of the square image in pixels (default: {default.size})")
    what.add_argument("--batch", type=positive_integer, help="images at once (default: 1)")
    what.add_argument("--classes", type=positive_integer, help=f"labels (default: {default.classes})")
    what.add_argument(
        "--target",
        type=positive_integer,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="size of the label maps (default: {} {})".format(*default.target),
    )
    what.add_argument("--queries", type=positive_integer, help="masks per image (default: as the model has)")
    what.add_argument("--dtype", choices=DTYPES, help=f"(default: {default.dtype})")
    what.add_argument(
        "--compile",
        nargs="?",
        const=COMPILE_MODES[0],
        choices=COMPILE_MODES,
        help="torch.compile, in one of its modes (default: eager)",
    )
    what.add_argument("--threads", type=positive_integer, help="of the processor (default: as many as cores)")
    what.add_argument("--device", help=f'"cpu", "cuda" or "cuda:1" (default: {default.device})')
    what.add_argument(
        "--tokenizer", metavar="FOLDER", help="CLIP's tokenizer (default: made-up token ids of the same lengths)"
    )
    what.add_argument(
        "--stages",
        nargs="+",
        metavar="STAGE",
        help="some of text, cached_text, preprocessing, pil, clip, side_adapter, recognition, network, "
        "post_processing, post_processing_large, end_to_end, full_scores, import_torch, import_san, "
        "import_model, help; or none (default: all)",
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--rounds", type=positive_integer, default=5, help="runs that count, after a warm-up (default: 5)"
    )
    how.add_argument(
        "--budget",
        type=positive_number,
        default=60.0,
        metavar="SECONDS",
        help="no further round of a stage begins after this (default: 60)",
    )
    more = parser.add_argument_group("more")
    more.add_argument("--flops", action="store_true", help="count floating-point operations")
    more.add_argument("--profile", action="store_true", help="show operators by time, and write a trace of each stage")
    more.add_argument(
        "--scaling",
        nargs="*",
        metavar="AXIS[=N,N]",
        help="time and memory against size, classes, queries and batch (default: all four)",
    )
    more.add_argument(
        "--others",
        nargs="*",
        type=positive_integer,
        metavar="LABELS",
        help="CLIPSeg, EoMT-B and Mask2Former with these numbers of labels (default: 1 20 171)",
    )
    more.add_argument(
        "--agreement",
        nargs="+",
        type=Path,
        metavar="IMAGE",
        help="how many pixels get the label that they get in float32, eager; needs --model FOLDER",
    )
    more.add_argument(
        "--compare",
        nargs="+",
        type=Path,
        metavar="JSON",
        help="an earlier run's file to compare with; with a second file nothing is measured",
    )
    more.add_argument(
        "--tolerance",
        type=positive_number,
        default=_DEFAULT_TOLERANCE,
        help=f"growth of cost or memory that is no regression, as a share (default: {_DEFAULT_TOLERANCE})",
    )
    more.add_argument(
        "--output", type=Path, default=_DEFAULT_OUTPUT, metavar="JSON", help=f"(default: {_DEFAULT_OUTPUT})"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run the benchmarks.

    Args:
        argv: arguments; those of the process by default.

    Returns:
        exit code: 0, 1 for a regression, 2 for bad input, 130 after Ctrl-C.
    """
    args = make_parser().parse_args(argv)
    try:
        return run(args)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except (CommandError, OSError, ValueError) as error:
        print(f"benchmarks: error: {one_line(error)}", file=sys.stderr)
        return EXIT_BAD_INPUT


def run(args: argparse.Namespace) -> int:
    """
    Measure and compare as the arguments say.

    Raises:
        ValueError, OSError or CommandError: something has to be given differently; the message says what.
    """
    # Nothing here may wait for a network
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # What an earlier run left on disk would be measured in place of the encoder
    os.environ["SAN_TEXT_CACHE"] = "off"
    from .report import Report

    if args.compare is not None and len(args.compare) > 2:
        raise ValueError(f"--compare got {len(args.compare)} files: pass an older one, and a newer one or none")
    old = None if args.compare is None else Report.load(args.compare[0])
    if old is not None and len(args.compare) == 2:
        return _compare(old, Report.load(args.compare[1]), args.tolerance)
    settings = choose_settings(args, old)
    names = _choose_stages(args.stages, old)
    axes = _choose_axes(args.scaling)
    _check_output(args)
    new = _measure(args, settings, names, axes)
    print(f"\nWritten to {args.output}")
    if old is None:
        return 0
    print()
    return _compare(old, new, args.tolerance)


def choose_settings(args: argparse.Namespace, old: Report | None) -> Settings:
    """
    What to measure: as given, else as in the older run, else the defaults.

    Raises:
        ValueError: what is given differs from the older run's.
    """
    import torch

    chosen: dict[str, Any] = {} if old is None else {f.name: getattr(old.settings, f.name) for f in fields(Settings)}
    given = {f.name: getattr(args, f.name) for f in fields(Settings) if getattr(args, f.name) is not None}
    if "target" in given:
        given["target"] = tuple(given["target"])
    for name, value in given.items():
        if chosen and chosen[name] != value:
            raise ValueError(
                f"--{name} {value}: {args.compare[0]} was measured with {chosen[name]}: leave --{name} out, or "
                "measure without --compare"
            )
    if not chosen and args.threads is None:
        chosen["threads"] = torch.get_num_threads() if "OMP_NUM_THREADS" in os.environ else os.cpu_count() or 1
    return Settings(**{**chosen, **given})


def _measure(
    args: argparse.Namespace, settings: Settings, names: Sequence[str], axes: dict[str, Sequence[int]]
) -> Report:
    """Measure all that was asked for; the file is written anew after each part."""
    import torch

    from modeling_san.commands.models import quiet_libraries
    from modeling_san.processing.device import pick_device

    from .agreement import format_agreement, measure_agreement
    from .machine import describe_machine, load_average
    from .measure import Meter
    from .others import LABELS, format_others, measure_others
    from .report import Report, format_machine, format_rates, format_stages
    from .scaling import format_scaling, measure_scaling
    from .stages import STAGES
    from .workload import make_workload_folder

    quiet_libraries()
    device = pick_device(settings.device)
    torch.set_num_threads(settings.threads)
    report = Report(settings, describe_machine(device))
    print(format_machine(report), flush=True)
    # Compiled functions and the memory pools of GPUs settle over a few runs
    prepared = settings.compile is not None or device.type == "cuda"

    def make_meter() -> Meter:
        warmups = _WARMUPS["prepared" if prepared else "eager"]
        meter = Meter(device, rounds=args.rounds, budget=args.budget, warmups=warmups)
        meter.rates = report.rates
        return meter

    def save() -> None:
        report.load_average = load_average()
        report.save(args.output)

    titles = {name: stage.title for name, stage in STAGES.items()}
    with make_workload_folder() as folder, torch.inference_mode():
        profiles = _measure_stages(args, report, names, make_meter, Path(folder), save)
        if report.stages:
            print(f"\n{format_stages(report.stages, titles)}", flush=True)
        for name, table in profiles.items():
            print(f"\n{titles[name]}\n{table}")
        for axis, value, measured in measure_scaling(settings, axes, Path(folder), make_meter):
            report.scaling.setdefault(axis, {})[str(value)] = measured
            save()
            _progress(f"{axis} {value}")
        for axis, points in report.scaling.items():
            print(f"\n{format_scaling(axis, points)}", flush=True)
        if args.others is not None:
            for title, count, measurement in measure_others(settings, args.others or LABELS, Path(folder), make_meter):
                report.others.setdefault(title, {})[str(count)] = measurement
                save()
                _progress(f"{title}, {count} labels")
            print(f"\n{format_others(report.others, settings)}", flush=True)
        if args.agreement is not None:
            for path, share in measure_agreement(settings, args.agreement, Path(folder)):
                report.agreement[str(path)] = share
                save()
                _progress(f"{path}: {share:.2%}")
            print(f"\n{format_agreement(report.agreement, settings)}", flush=True)
    save()
    print(f"\n{format_rates(report)}")
    return report


def _measure_stages(
    args: argparse.Namespace,
    report: Report,
    names: Sequence[str],
    make_meter: Callable[[], Meter],
    folder: Path,
    save: Callable[[], None],
) -> dict[str, str]:
    """Measure stages into the report; the operator tables of those that were profiled are returned."""
    from dataclasses import replace

    from .profiling import count_flops, profile_stage
    from .stages import STAGES
    from .workload import Workload

    work = Workload(report.settings, folder)
    eager = Workload(replace(report.settings, compile=None), folder, model=work.model) if names else work
    profiles = {}
    for name in names:
        stage = STAGES[name]
        prepared = stage.prepare(work)
        measured = make_meter().measure(prepared, in_process=stage.in_process)
        if args.flops and stage.is_network:
            measured = measured.with_flops(count_flops(stage.prepare(eager)))
        report.stages[name] = measured
        save()
        if args.profile and stage.in_process:
            trace = args.output.with_name(f"{args.output.stem}_{name}.trace.json")
            profiles[name] = profile_stage(prepared, trace, work.device) + f"Trace written to {trace}"
        _progress(stage.title.strip())
    return profiles


def _compare(old: Report, new: Report, tolerance: float) -> int:
    from .compare import compare_reports, format_comparisons, has_regression
    from .stages import STAGES

    comparisons = compare_reports(old, new, tolerance)
    print(f"Before: commit {old.machine.get('commit')}, {old.machine.get('processor')}, {old.machine.get('date')}")
    print(f"After:  commit {new.machine.get('commit')}, {new.machine.get('processor')}, {new.machine.get('date')}\n")
    print(format_comparisons(comparisons, {name: stage.title for name, stage in STAGES.items()}))
    if has_regression(comparisons):
        print(f"\nA stage grew by more than {tolerance:.0%}.")
        return EXIT_REGRESSION
    return 0


def _choose_stages(given: Sequence[str] | None, old: Report | None) -> list[str]:
    from .stages import STAGES

    if given is None:
        return list(STAGES) if old is None else [name for name in STAGES if name in old.stages]
    if list(given) == [_NO_STAGES]:
        return []
    if unknown := [name for name in given if name not in STAGES]:
        raise ValueError(f"--stages {unknown[0]}: there is no such stage: choose of {', '.join(STAGES)}, or none")
    return [name for name in STAGES if name in given]


def _choose_axes(given: Sequence[str] | None) -> dict[str, Sequence[int]]:
    from .scaling import AXES

    if given is None:
        return {}
    axes: dict[str, Sequence[int]] = {}
    for text in given or AXES:
        axis, _, values = text.partition("=")
        if axis not in AXES:
            raise ValueError(f"--scaling {text}: there is no such axis: choose of {', '.join(AXES)}")
        convert = _side if axis == "size" else positive_integer
        try:
            axes[axis] = [convert(value) for value in values.split(",")] if values else AXES[axis].values
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"--scaling {text}: {error}") from error
    return axes


def _check_output(args: argparse.Namespace) -> None:
    """Hours of measuring must not end at a file that cannot be written, or on top of the file to compare with."""
    import tempfile

    output: Path = args.output
    if output == _DEFAULT_OUTPUT:
        output.parent.mkdir(exist_ok=True)
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder: pass a file's name in it")
    if not output.parent.is_dir():
        raise ValueError(f"--output {output}: there is no folder {output.parent}: make it first")
    if args.compare is not None and output.exists() and output.samefile(args.compare[0]):
        raise ValueError(f"--output {output} is the file to compare with: pass another name")
    with tempfile.TemporaryFile(dir=output.parent):
        pass


def _side(text: str) -> int:
    """An image's side, as an argument's type."""
    side = positive_integer(text)
    if side % SIZE_DIVISOR:
        raise argparse.ArgumentTypeError(f"{side} is not a multiple of {SIZE_DIVISOR}, which images are padded to")
    return side


def _progress(done: str) -> None:
    print(f"  measured: {done}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
