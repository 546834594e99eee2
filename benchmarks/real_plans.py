"""One full-size engine as a TensorRT plan: time and peak memory of the whole way from the checkpoint. Needs no GPU.

    python -m benchmarks.real_plans --size real --component step
    python -m benchmarks.real_plans --size real-3b --component planner

A process of its own, ended before the machine runs out of memory; what did not fit is in the report with the memory at which
it was ended. Weights are random; see benchmarks/models.py for the sizes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import process, report
from benchmarks.checkpoints import work_folder

KEEP_FREE = 1 << 30


def build(checkpoint_path: Path, component: str, precision: str) -> dict[str, Any]:
    """In a process of its own: seconds by state, the plan's bytes and its graph's error."""
    from mc_export.build.contents import write_prompting, write_sampler
    from mc_export.build.options import BuildOptions, EngineChoice
    from mc_export.build.parts import limits_of, parts_of, sizes_of
    from mc_export.build.plan import make_plan
    from mc_export.build.progress import State, StateClock
    from mc_export.build.usual import plan_wishes
    from mc_export.checkpoint import load_checkpoint
    from mc_runtime.bundle.manifest import Precision

    checkpoint = load_checkpoint(checkpoint_path)
    choice = EngineChoice("tensorrt-rtx", Precision(precision))
    options = BuildOptions(target=choice.target, precision=choice.precision, max_batch=1, max_steps=20)
    clock = StateClock(lambda state: print(state, file=sys.stderr, flush=True))
    with tempfile.TemporaryDirectory(dir=work_folder(None)) as folder:
        place = Path(folder)
        sizes = sizes_of(checkpoint, options)
        order = write_sampler(checkpoint, sizes, options, place).order
        limits = limits_of(checkpoint, sizes, write_prompting(checkpoint, place), options, order)
        part = next(part for part in parts_of(checkpoint, limits, options) if part.component == component)
        clock.enter(State.LOADING)
        wishes = plan_wishes(component, checkpoint, sizes)
        spec = make_plan(
            part.make, choice, place, wishes, enter=clock.enter, tick=lambda share: None, calibrate=lambda component: []
        )
        seconds = clock.seconds()
        plan = (place / spec.files[0]).stat().st_size
    assert spec.error is not None
    return {
        "bytes": plan,
        "error": {"of": spec.error.of, "relative_l2": spec.error.relative_l2, "max_abs": spec.error.max_abs},
        "seconds": seconds,
        "capabilities": spec.options["capabilities"],
        "profiles": spec.options["profiles"],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["real", "real-3b", "mid"], default="real")
    parser.add_argument("--component", choices=["step", "planner"], default="step")
    parser.add_argument("--precision", choices=["fp32", "fp16", "bf16"], default="bf16")
    parser.add_argument("--work", type=Path, help="where checkpoints are kept; in the cache by default")
    parser.add_argument("--results", type=Path, help="where the report goes; benchmarks/results by default")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child:
        print(json.dumps(build(arguments.child, arguments.component, arguments.precision)))
        return
    work = work_folder(arguments.work)
    card = report.card() | {"available_memory": process.available_memory()}
    checkpoint = work / f"{arguments.size}-metacanvas"
    own = [sys.executable, "-W", "ignore", "-m"]
    process.run([*own, "benchmarks.checkpoints", "--size", arguments.size, "--work", work], keep_free=KEEP_FREE)
    child = [*own, "benchmarks.real_plans", "--child", checkpoint]
    child += ["--component", arguments.component, "--precision", arguments.precision]
    try:
        ran = process.run(child, keep_free=KEEP_FREE)
        found = {"seconds_in_all": ran.seconds, "peak_bytes": ran.peak_bytes, **json.loads(ran.output.splitlines()[-1])}
    except RuntimeError as error:
        found = {"failed": str(error)}
    what = {"size": arguments.size, "component": arguments.component, "precision": arguments.precision}
    report.console.print(what | found)
    report.save(f"plan-{arguments.size}-{arguments.component}", {"benchmark": "real_plans", **what, **card, "plan": found},
                arguments.results)  # fmt: skip


if __name__ == "__main__":
    main()
