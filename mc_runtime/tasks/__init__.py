"""What a caller can ask for: one validated request type a task."""
