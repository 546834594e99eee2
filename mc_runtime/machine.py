"""What this machine is: the card that benchmarks print, `doctor` shows and a bundle is checked against.

Only the standard library is used and no engine library is imported, so a card costs milliseconds.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

#: CPU features that change which kernels an engine picks, by the names Linux gives them in /proc/cpuinfo.
FEATURES_THAT_MATTER = (
    "avx2",
    "fma",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    # Arm, as /proc/cpuinfo's `Features` line has them
    "asimd",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)

#: Distributions whose versions belong on a card.
LIBRARIES = (
    "mc-runtime",
    "numpy",
    "tokenizers",
    "Pillow",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "tensorrt-rtx",
    "torch",
    "diffusers",
    "transformers",
    "onnx",
    "onnxscript",
    "nncf",
    "peft",
)


@dataclass(frozen=True)
class Machine:
    """One machine, as far as engines care. `memory` is in bytes, 0 where the system does not tell."""

    arch: str
    os: str
    cpu: str
    cores: int
    features: tuple[str, ...]
    memory: int
    python: str

    def as_dict(self) -> dict[str, Any]:
        """The card as JSON-ready values."""
        return {**asdict(self), "features": list(self.features)}

    def __str__(self) -> str:
        memory = f", {self.memory / 2**30:.0f} GiB" if self.memory else ""
        features = " ".join(self.features) or "no known features"
        return f"{self.cpu}, {self.cores} cores ({features}){memory}, {self.os}"


@cache
def this_machine() -> Machine:
    """The card of the machine this process runs on; read once a process."""
    fields = _cpuinfo()
    present = set((fields.get("flags") or fields.get("Features") or "").split())
    return Machine(
        arch=platform.machine() or "unknown",
        os=platform.system().lower() or "unknown",
        cpu=fields.get("model name") or platform.processor() or platform.machine() or "unknown",
        cores=usable_cores(),
        features=tuple(name for name in FEATURES_THAT_MATTER if name in present),
        memory=_memory(),
        python=platform.python_version(),
    )


def usable_cores() -> int:
    """Cores this process may use, which in a container or under taskset are fewer than the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def installed_versions(names: Iterable[str] = LIBRARIES) -> dict[str, str]:
    """Versions of those of `names` that are installed, read from their metadata without importing them."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _cpuinfo() -> dict[str, str]:
    """The first processor's fields of /proc/cpuinfo; empty where there is no such file."""
    fields: dict[str, str] = {}
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return fields
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip(), value.strip())
    return fields


def _memory() -> int:
    """Bytes this process can have: the machine's, or the control group's limit where that is lower."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total
