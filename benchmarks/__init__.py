"""What is timed, against what, and on which machine: docs/benchmarks.md. Start with `python -m benchmarks.run --help`."""
