"""The libraries that run engines: one small class each, imported only when a bundle needs it."""

import os

# onnxruntime from 1.29 on reports sessions to its maker unless this is set before it is imported. Whoever wants that says 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
