"""The libraries that run engines: one small class each, imported only when a bundle needs it."""

import os
import sys

# onnxruntime from 1.29 on reports sessions to its maker unless this is set before it is imported. Whoever wants that says 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
# OpenVINO reports its import, by a package that it does without where there is none. Whoever wants that imports it first.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
