"""Rewrites of programs for one target alone: the same numbers by other operators. Each counts what it matched."""
