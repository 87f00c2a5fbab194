"""Benchmarks: comparison with the peers (`bench.meta_step`), peak memory (`bench.memory`), suites for pytest-benchmark."""
