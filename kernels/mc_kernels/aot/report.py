"""The table of `docs/kernels.md`: one row for each launch, one part for each compute capability."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mc_kernels.aot.cases import CASES
from mc_kernels.aot.compiler import Compiled, compile_launch

HEADER = (
    "| kernel | case | registers | shared memory | spills | loads | stores |\n| --- | --- | ---: | ---: | ---: | --- | --- |\n"
)


@dataclass(frozen=True)
class Row:
    """One launch for one compute capability."""

    kernel: str
    case: str
    compiled: Compiled

    def markdown(self) -> str:
        """Sizes in bytes; loads and stores as count x bits of the instruction."""
        it = self.compiled
        cells = [
            f"`{self.kernel}`", self.case, str(it.registers), str(it.shared_bytes), str(it.spilled_bytes),
            _instructions(it.load_bits), _instructions(it.store_bits),
        ]  # fmt: skip
        return f"| {' | '.join(cells)} |\n"


def rows_for_capability(capability: int) -> list[Row]:
    """Compiles every case that the capability has types for."""
    rows = []
    for case in CASES:
        if capability >= case.first_capability:
            for launch in case.launches():
                name = launch.kernel.__name__.removesuffix("_kernel")
                rows.append(Row(name, case.name, compile_launch(launch, capability)))
    return rows


def table_from_rows(rows: list[Row]) -> str:
    """Markdown."""
    return HEADER + "".join(row.markdown() for row in rows)


def committed_table(document: str, capability: int) -> str:
    """What the document says for a capability.

    Raises:
        ValueError: the document has no part for it.
    """
    match = _part(capability).search(document)
    if match is None:
        raise ValueError(f"no table between the markers `sm_{capability}` and `end sm_{capability}`; see mc_kernels.aot.report")
    return match.group(2)


def with_table(document: str, capability: int, table: str) -> str:
    """The document with one capability's table replaced."""
    committed_table(document, capability)
    return _part(capability).sub(lambda match: match.group(1) + table + match.group(3), document)


def _part(capability: int) -> re.Pattern[str]:
    return re.compile(rf"(<!-- sm_{capability} -->\n)(.*?)(<!-- end sm_{capability} -->)", re.DOTALL)


def _instructions(widths: dict[int, int]) -> str:
    return ", ".join(f"{count} x {bits}" for bits, count in widths.items())
