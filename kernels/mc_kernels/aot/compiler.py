"""One recorded launch to machine code and what can be read off it, with Triton's own ptxas and nvdisasm; no GPU, no driver."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mc_kernels.launch import Launch

WARP = 32
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float8_e4m3fn: "*fp8e4nv",
}
ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Compiled:
    """What the machine code of one kernel says.

    Args:
        registers: of a thread.
        shared_bytes: of a program.
        spilled_bytes: of a thread: its stack, which is where spilled registers go.
        load_bits: global loads by width in bits: number of instructions.
        store_bits: likewise.
    """

    registers: int
    shared_bytes: int
    spilled_bytes: int
    load_bits: dict[int, int]
    store_bits: dict[int, int]


def signature_from_launch(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], list[list[Any]]]]:
    """Types, compile-time values and alignments, by the rules that Triton applies to a launch of its own.

    Pointers are aligned to 16 bytes (every allocation of PyTorch is), an int divisible by 16 is known to be, an int of 1
    becomes a constant, and parameters annotated `tl.int64` are 64 bits wide.
    """
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    alignments: dict[tuple[int, ...], list[list[Any]]] = {}
    positional = iter(launch.arguments)
    for index, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            types[name], constants[name] = "constexpr", launch.options[name]
            continue
        value = next(positional)
        if isinstance(value, torch.Tensor):
            types[name] = POINTERS[value.dtype]
            alignments[(index,)] = ALIGNED
        elif isinstance(value, float):
            types[name] = "fp32"
        elif value == 1 and not parameter.annotation_type:
            types[name], constants[name] = "constexpr", 1
        else:
            types[name] = parameter.annotation_type or "i32"
            if value % 16 == 0:
                alignments[(index,)] = ALIGNED
    return types, constants, alignments


def compile_launch(launch: Launch, capability: int, *, aligned: bool = True, maxnreg: int | None = None) -> Compiled:
    """Compiles for a compute capability and inspects the result.

    Args:
        launch: what to compile.
        capability: 90 for 9.0.
        aligned: pass on what is known of pointers and sizes; a launch always does.
        maxnreg: limit a thread's registers; a launch never does.

    Raises:
        RuntimeError: the disassembler failed; its message is passed on.
    """
    types, constants, alignments = signature_from_launch(launch)
    source = ASTSource(launch.kernel, types, constexprs=constants, attrs=alignments if aligned else {})
    options = {"num_warps": launch.options["num_warps"], "maxnreg": maxnreg}
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, WARP), options=options)
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(kernel.asm["cubin"])
        usage = _tool("cuobjdump", "--dump-resource-usage", str(binary))
        code = _tool("nvdisasm", str(binary))
    registers, stack, local = (int(_found(rf"{field}:(\d+)", usage)) for field in ("REG", "STACK", "LOCAL"))
    return Compiled(registers, int(kernel.metadata.shared), stack + local, _widths("LDG(?:STS)?", code), _widths("STG", code))


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([path, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr.strip()}")
    return done.stdout


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"nothing matches {pattern} in:\n{text}")
    return match.group(1)


def _widths(instruction: str, code: str) -> dict[int, int]:
    """Counts an instruction by its width suffix: none is 32 bits, U8 and U16 less, 64 and 128 more."""
    widths: dict[int, int] = {}
    for suffixes in re.findall(rf"\b{instruction}\.([A-Z0-9.]+)", code):
        bits = next((int(part.lstrip("US")) for part in suffixes.split(".") if re.fullmatch(r"[US]?(8|16|64|128)", part)), 32)
        widths[bits] = widths.get(bits, 0) + 1
    return dict(sorted(widths.items(), reverse=True))
