"""The benchmarks of pbfx: `python -m benchmarks NAME`."""
