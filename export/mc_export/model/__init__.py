"""The reference model: planner, context connector, canvas connector, and how the canvas enters a backbone."""
