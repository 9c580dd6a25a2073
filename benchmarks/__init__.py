"""Speed and memory of PocketFleet, as ratios measured in one run: `python -m benchmarks`."""
