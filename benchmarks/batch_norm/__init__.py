"""The parts of `python -m benchmarks update_bn`."""
