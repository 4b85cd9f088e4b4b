"""Benchmarks that a stranger can repeat: `python -m benchmarks`; see README.md beside this."""
