"""The parts of benchmarks/makespan.py: sections, both sides, and how results are shown."""
