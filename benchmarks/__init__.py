"""Benchmarks, the demo and the checks that need a compiler or a wheel: `python -m benchmarks --help`."""
