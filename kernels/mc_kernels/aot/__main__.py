"""`python -m mc_kernels.aot docs/kernels.md`: compiles every case and rewrites the document's tables."""

from __future__ import annotations

import sys
from pathlib import Path

from mc_kernels.aot.cases import CAPABILITIES
from mc_kernels.aot.report import rows_for_capability, table_from_rows, with_table


def main(arguments: list[str]) -> int:
    """Rewrites the one file named; returns the exit status."""
    if len(arguments) != 1:
        print("usage: python -m mc_kernels.aot docs/kernels.md", file=sys.stderr)
        return 2
    path = Path(arguments[0])
    document = path.read_text(encoding="utf-8")
    for capability in CAPABILITIES:
        rows = rows_for_capability(capability)
        document = with_table(document, capability, table_from_rows(rows))
        print(f"sm_{capability}: {len(rows)} kernels compiled")
    path.write_text(document, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
