"""All benchmarks one after the other; `make bench`.

    python -m benchmarks.run             demo, mid of every backbone, the canvas's cost, start-up, install size
    python -m benchmarks.run --quick     tiny checkpoints and few steps: proves that the scripts run, in some minutes
    python -m benchmarks.run --real      SANA-1.6B too: needs 24 GiB of memory and 60 GB of disk
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks import canvas_cost, end_to_end, install_size, lora, mid, real, report, startup


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny, few steps, no timing worth keeping")
    parser.add_argument("--real", action="store_true", help="SANA-1.6B at 1024 px as well")
    parser.add_argument("--optimum-python", type=Path, help="interpreter of an environment with optimum-onnx")
    parser.add_argument("--work", type=Path, help="where checkpoints and bundles are kept; in the cache by default")
    parser.add_argument("--results", type=Path, help="where reports go; benchmarks/results by default")
    arguments = parser.parse_args(argv)
    shared = [f"--results={arguments.results}"] if arguments.results else []
    kept = [*shared, *([f"--work={arguments.work}"] if arguments.work else [])]
    optimum = [f"--optimum-python={arguments.optimum_python}"] if arguments.optimum_python else []
    if arguments.quick:
        end_to_end.main(["--size=tiny", "--quick", *kept])
        end_to_end.main(["--size=tiny", "--stock", "--quick", *kept])
        for name in mid.SUBJECTS:
            end_to_end.main([f"--size=tiny-{name}", "--quick", *kept])
        canvas_cost.main(["--size=tiny", "--quick", *kept])
        return
    results = [
        end_to_end.main(["--size=demo", "--rounds=15", *kept]),
        end_to_end.main(["--size=mid", *kept]),
        end_to_end.main(["--size=mid", "--stock", *optimum, *kept]),
        *(end_to_end.main([f"--size=mid-{name}", *kept]) for name in mid.SUBJECTS),
        *(canvas_cost.main([f"--size={size}", *kept]) for size in ("mid", *(f"mid-{name}" for name in mid.SUBJECTS))),
        startup.main(shared),
        lora.main(kept),
        install_size.main(shared),
    ]
    if arguments.real:
        real.main(kept)
    report.console.print("\n[bold]all bars[/bold]")
    for result in results:
        report.print_bars(result.get("bars", ()))


if __name__ == "__main__":
    main()
