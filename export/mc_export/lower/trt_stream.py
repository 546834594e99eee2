"""A plan straight to its file: as bytes in memory it would be held beside the library's own copy of the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def build_into(trt: Any, builder: Any, network: Any, config: Any, file: Path) -> int:
    """Builds `network` into `file`.

    Libraries from before streams (TensorRT 10.12) give the plan in one piece. With a stream, weights of 0.8 GB took 1.0 GB
    while they were built, without one 1.7.

    Returns:
        The plan's bytes; 0, and no file, where the library did not build it.

    Raises:
        OSError: the file cannot be written.
    """
    to_stream = getattr(builder, "build_serialized_network_to_stream", None)
    if to_stream is None:
        plan = builder.build_serialized_network(network, config)
        return 0 if plan is None else file.write_bytes(memoryview(plan))
    with file.open("wb") as opened:
        writer = _writer(trt, opened)
        built = to_stream(network, config, writer)
    if built and writer.failed is None:
        return int(writer.written)
    file.unlink()
    if writer.failed is not None:
        raise writer.failed
    return 0


def _writer(trt: Any, opened: Any) -> Any:
    class Writer(trt.IStreamWriter):  # type: ignore[misc]  # the library has no types
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.written = 0
            self.failed: OSError | None = None

        def write(self, data: Any) -> int:
            """Bytes taken; fewer than were given, which ends the build, where the file takes no more."""
            try:
                taken = int(opened.write(data))
            except OSError as error:  # must not pass through the library
                self.failed = error
                return 0
            self.written += taken
            return taken

    return Writer()
