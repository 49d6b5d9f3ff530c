"""What tools/bench_loader.py measures: its data, the loaders, and training on them."""
