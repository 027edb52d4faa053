"""Benchmarks: ours against what people write and install, as ratios taken in one run. See `benchmarks.run`."""
