"""What production installs against what the torch pipeline needs: fresh environments, bytes in site-packages.

    python -m benchmarks.install_size

pip's own files and compiled modules (`__pycache__`) are not counted. torch is the CPU build that the constraints name; the
default build from the package index also brings gigabytes of CUDA libraries.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import report

#: Name to what pip is given, in order. `.` is this checkout.
SETS: dict[str, tuple[tuple[str, ...], ...]] = {
    "mc-runtime[cpu]": ((".[cpu]",),),
    "mc-runtime[openvino]": ((".[openvino]",),),
    "torch + diffusers + transformers": (("torch==2.13.0",), ("diffusers", "transformers", "accelerate")),
}


def measure(names: Sequence[str]) -> dict[str, Any]:
    """Install each set into an environment of its own and count."""
    card = report.card()
    found = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = _installed(Path(folder), SETS[name])
        line = f"{name:<36}{found[name]['bytes'] / 2**20:8.0f} MiB, {found[name]['packages']} packages"
        report.console.print(line, markup=False)
    result: dict[str, Any] = {"benchmark": "install_size", **card, "sets": found}
    reference = list(SETS)[-1]
    if reference in found:
        whole = found[reference]["bytes"]
        result["share_of_torch"] = {name: each["bytes"] / whole for name, each in found.items() if name != reference}
    return result


def _installed(folder: Path, steps: tuple[tuple[str, ...], ...]) -> dict[str, Any]:
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    site = next(folder.glob("lib/python*/site-packages"))
    before = _bytes_by_package(site)
    for packages in steps:
        wanted = [str(report.ROOT) + package[1:] if package.startswith(".") else package for package in packages]
        constraints = report.ROOT / "constraints.txt"
        subprocess.run(
            [python, "-m", "pip", "install", "--quiet", "--no-compile", "-c", constraints, *wanted],
            check=True, stderr=subprocess.DEVNULL,
        )  # fmt: skip
    after = {name: size for name, size in _bytes_by_package(site).items() if name not in before}
    largest = dict(sorted(after.items(), key=lambda each: -each[1])[:12])
    packages_found = sum(1 for _ in site.glob("*.dist-info")) - sum(1 for name in before if name.endswith(".dist-info"))
    return {"bytes": sum(after.values()), "packages": packages_found, "largest": largest}


def _bytes_by_package(site: Path) -> dict[str, int]:
    """Bytes of every entry of site-packages, without compiled modules."""
    found = {}
    for entry in site.iterdir():
        if entry.is_file():
            found[entry.name] = entry.stat().st_size
            continue
        files = (Path(root) / name for root, _, names in os.walk(entry) if not root.endswith("__pycache__") for name in names)
        found[entry.name] = sum(file.lstat().st_size for file in files)
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(SETS), help="one set; may be given again")
    parser.add_argument("--results", type=Path, help="where the report goes; benchmarks/results by default")
    arguments = parser.parse_args(argv)
    if shutil.disk_usage(tempfile.gettempdir()).free < 4 << 30:
        parser.error(f"{tempfile.gettempdir()} has less than 4 GiB free; set TMPDIR to a folder that has more")
    result = measure(arguments.only or list(SETS))
    for name, share in result.get("share_of_torch", {}).items():
        report.console.print(f"{name}: {100 * share:.0f} % of torch's", markup=False)
    report.save("install_size", result, arguments.results)
    return result


if __name__ == "__main__":
    main()
