"""Benchmarks: README.md says what they measure."""
