"""`python -m benchmarks`: measure, print tables, write JSON, compare with an earlier run."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import NoReturn

import torch

from modeling_san.commands.models import quiet_libraries
from modeling_san.commands.parser import CommandParser, positive_integer, positive_number
from modeling_san.processing.device import pick_device
from modeling_san.processing.wording_san import one_line

from .agreement import format_agreement, measure_agreement
from .compare import check_comparable, format_comparison, is_regression, judge
from .machine import describe_machine, load_average
from .measure import Meter
from .others import LABELS, format_others, measure_others
from .profiling import count_flops, profile_stage
from .report import Report, format_machine, format_rates, format_stages
from .scaling import AXES, format_scaling, measure_scaling
from .settings import COMPILE_MODES, DTYPES, SIZE_DIVISOR, Settings
from .stages import STAGES
from .workload import Workload

_DESCRIPTION = """\
Measure how fast SAN is and how much memory it takes, stage by stage, with random weights. Times on a CPU are also
given as cost: seconds times the GFLOP/s of a float32 product of two 2048 x 2048 matrices measured in the same run, so
that figures of different machines can be compared. benchmarks/README.md explains the tables.
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
_TITLES = {name: stage.title for name, stage in STAGES.items()}

EXIT_REGRESSION, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130


class _Parser(CommandParser):
    """Says what is wrong under this command's own name."""

    def error(self, message: str) -> NoReturn:
        """End with exit code 2."""
        sys.exit(_report_error(f"{message} (see python -m benchmarks --help)"))


def make_parser() -> argparse.ArgumentParser:
    """The parser. Settings that are not given are None: `--compare` takes them from the older run."""
    parser = _Parser(prog="python -m benchmarks", description=_DESCRIPTION, epilog=_EXAMPLE)
    default, count = Settings(), {"type": positive_integer}

    what = parser.add_argument_group("what is measured").add_argument
    what("--model", metavar="NAME_OR_FOLDER", help=f"vit_b_16, vit_l_14 or a folder (default: {default.model})")
    what("--size", type=_side, help=f"side of the square image in pixels (default: {default.size})")
    what("--batch", **count, help="images at once (default: 1)")
    what("--classes", **count, help=f"labels (default: {default.classes})")
    target = "size of the label maps (default: {} {})".format(*default.target)
    what("--target", **count, nargs=2, metavar=("HEIGHT", "WIDTH"), help=target)
    what("--queries", **count, help="masks per image (default: as the model has)")
    what("--dtype", choices=DTYPES, help=f"(default: {default.dtype})")
    what("--compile", nargs="?", const="default", choices=COMPILE_MODES, help="torch.compile's mode (default: eager)")
    what("--threads", **count, help="of the CPU (default: as many as cores)")
    what("--device", help=f'"cpu", "cuda" or "cuda:1" (default: {default.device})')
    what("--stages", nargs="+", metavar="STAGE", help=f"some of {', '.join(STAGES)}; or none (default: all)")

    how = parser.add_argument_group("how").add_argument
    how("--rounds", **count, default=5, help="runs that count, after a warm-up (default: 5)")
    seconds = {"type": positive_number, "metavar": "SECONDS", "default": 60.0}
    how("--budget", **seconds, help="no round begins after it (default: 60)")

    more = parser.add_argument_group("more").add_argument
    more("--flops", action="store_true", help="count floating-point operations")
    more("--profile", action="store_true", help="show operators by time, and write a trace of each stage")
    more("--scaling", nargs="*", metavar="AXIS[=N,N]", help=f"growth with some of {', '.join(AXES)} (default: all)")
    others = "other models, small and large, with these numbers of labels (default: 1 20 171)"
    more("--others", **count, nargs="*", metavar="LABELS", help=others)
    same = "how many pixels get the label that they get in float32, eager; needs --model FOLDER"
    more("--agreement", nargs="+", type=Path, metavar="IMAGE", help=same)
    earlier = "an earlier run's file to compare with; with a second file nothing is measured"
    more("--compare", nargs="+", type=Path, metavar="JSON", help=earlier)
    growth = "growth of cost or memory that is no regression, as a share (default: 0.15)"
    more("--tolerance", type=positive_number, default=0.15, help=growth)
    more("--output", type=Path, default=_DEFAULT_OUTPUT, metavar="JSON", help=f"(default: {_DEFAULT_OUTPUT})")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run the benchmarks; `argv` are the process's own arguments by default.

    Returns:
        exit code: 0, 1 for a regression, 2 for bad input, 130 after Ctrl-C.
    """
    args = make_parser().parse_args(argv)
    try:
        return run(args)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except (OSError, ValueError) as error:
        return _report_error(one_line(error))


def run(args: argparse.Namespace) -> int:
    """
    Measure and compare as the arguments say.

    Raises:
        ValueError or OSError: something has to be given differently; the message says what.
    """
    files = args.compare or []
    if len(files) > 2:
        raise ValueError(f"--compare got {len(files)} files: pass an older one, and a newer one or none")
    old, *newer = map(Report.load, files) if files else [None]
    if old and newer:
        return _compare(old, newer[0], args.tolerance)
    settings, names, axes = choose_settings(args, old), _choose_stages(args.stages, old), _choose_axes(args.scaling)
    _check_output(args)
    new = _measure(args, settings, names, axes)
    print(f"\nWritten to {args.output}\n")
    return _compare(old, new, args.tolerance) if old else 0


def choose_settings(args: argparse.Namespace, old: Report | None) -> Settings:
    """
    What to measure: as given, else as in the older run, else the defaults.

    Raises:
        ValueError: what is given differs from the older run's.
    """
    given = {field.name: getattr(args, field.name) for field in fields(Settings)}
    given = {name: tuple(value) if name == "target" else value for name, value in given.items() if value is not None}
    if old is None:
        cores = torch.get_num_threads() if "OMP_NUM_THREADS" in os.environ else os.cpu_count() or 1
        return Settings(**{"threads": cores, **given})
    for name in old.settings.differences(replace(old.settings, **given)):
        raise ValueError(
            f"--{name} {given[name]}: {args.compare[0]} was measured with {getattr(old.settings, name)}: leave "
            f"--{name} out, or measure without --compare"
        )
    return old.settings


def _measure(
    args: argparse.Namespace, settings: Settings, names: Sequence[str], axes: dict[str, Sequence[int]]
) -> Report:
    """Measure all that is asked for into one report, whose file is written anew after each part."""
    quiet_libraries()
    device = pick_device(settings.device)
    torch.set_num_threads(settings.threads)
    report = Report(settings, describe_machine(device))
    # Compiled functions and the memory pools of GPUs settle over a few runs
    warmups = 3 if settings.compile is not None or device.type == "cuda" else 1
    meter = Meter(device, args.rounds, args.budget, warmups, rates=report.rates)

    def done(what: str) -> None:
        report.load_average = load_average()
        report.save(args.output)
        print(f"  measured: {what}", file=sys.stderr, flush=True)

    def show(*tables: str) -> None:
        report.save(args.output)
        for table in tables:
            print(f"\n{table}", flush=True)

    print(format_machine(report), flush=True)
    with tempfile.TemporaryDirectory(prefix="san-benchmarks-") as name, torch.inference_mode():
        folder = Path(name)
        work = Workload(settings, folder)
        tables = []
        for key in names:
            stage = STAGES[key]
            prepared = stage.prepare(work)
            measured = meter.measure(prepared, in_process=stage.in_process)
            if args.flops and stage.is_network:
                eager = Workload(replace(settings, compile=None), folder, model=work.model)
                measured = replace(measured, flops=count_flops(stage.prepare(eager)))
            report.stages[key] = measured
            if args.profile and stage.in_process:
                trace = args.output.with_name(f"{args.output.stem}_{key}.trace.json")
                tables.append(f"{stage.title}\n{profile_stage(prepared, trace, device)}Trace written to {trace}")
            done(stage.title.strip())
        if names:
            show(format_stages(report.stages, _TITLES), *tables)
        for axis, value, by_stage in measure_scaling(settings, axes, folder, meter):
            report.scaling.setdefault(axis, {})[str(value)] = by_stage
            done(f"{axis} {value}")
        show(*(format_scaling(axis, points) for axis, points in report.scaling.items()))
        if args.others is not None:
            for title, count, measured in measure_others(settings, args.others or LABELS, folder, meter):
                report.others.setdefault(title, {})[str(count)] = measured
                done(f"{title}, {count} labels")
            show(format_others(report.others, settings))
        if args.agreement is not None:
            for path, share in measure_agreement(settings, args.agreement, folder):
                report.agreement[str(path)] = share
                done(f"{path}: {share:.2%}")
            show(format_agreement(report.agreement, settings))
    show(format_rates(report))
    return report


def _compare(old: Report, new: Report, tolerance: float) -> int:
    check_comparable(old, new)
    verdicts = {name: judge(measured, new.stages.get(name), tolerance) for name, measured in old.stages.items()}
    for when, machine in (("Before", old.machine), ("After", new.machine)):
        print(f"{when}: commit {machine.get('commit')}, {machine.get('processor')}, {machine.get('date')}")
    print(f"\n{format_comparison(old, new, verdicts, _TITLES)}")
    if any(map(is_regression, verdicts.values())):
        print(f"\nA stage grew by more than {tolerance:.0%}.")
        return EXIT_REGRESSION
    return 0


def _choose_stages(given: Sequence[str] | None, old: Report | None) -> list[str]:
    if given is None:
        return [name for name in STAGES if old is None or name in old.stages]
    if given == ["none"]:
        return []
    if unknown := [name for name in given if name not in STAGES]:
        raise ValueError(f"--stages {unknown[0]}: there is no such stage: choose of {', '.join(STAGES)}, or none")
    return [name for name in STAGES if name in given]


def _choose_axes(given: Sequence[str] | None) -> dict[str, Sequence[int]]:
    axes: dict[str, Sequence[int]] = {}
    for text in [] if given is None else given or AXES:
        axis, _, values = text.partition("=")
        if axis not in AXES:
            raise ValueError(f"--scaling {text}: there is no such axis: choose of {', '.join(AXES)}")
        convert = _side if axis == "size" else positive_integer
        try:
            axes[axis] = [convert(value) for value in values.split(",")] if values else AXES[axis][0]
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"--scaling {text}: {error}") from error
    return axes


def _check_output(args: argparse.Namespace) -> None:
    """Hours of measuring must not end at a file that cannot be written, or on top of the file to compare with."""
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


def _report_error(message: str) -> int:
    print(f"benchmarks: error: {one_line(message)}", file=sys.stderr)
    return EXIT_BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
