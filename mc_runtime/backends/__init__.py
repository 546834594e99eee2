"""The libraries that run engines: one small class each, imported only when a bundle needs it."""
