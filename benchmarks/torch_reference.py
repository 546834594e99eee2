"""The shortest way to the same picture with torch: what `mc-runtime generate` is compared with.

    python -m benchmarks.torch_reference CHECKPOINT PROMPT OUT.png
"""

from __future__ import annotations

import sys

from mc_export.reference import ReferencePipeline


def main() -> None:
    """Load, draw, save."""
    checkpoint, prompt, out = sys.argv[1:]
    ReferencePipeline.from_checkpoint(checkpoint).generate(prompt, seed=0).images[0].save(out)


if __name__ == "__main__":
    main()
