"""Benchmarks of our ops and layers against common torch code and installed packages. Start at `benchmarks.run`."""
