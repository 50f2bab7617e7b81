"""Experiments and benchmarks behind the published results; not part of the installed package."""
