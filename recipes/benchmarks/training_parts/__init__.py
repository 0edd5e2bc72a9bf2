"""The parts of recipes/benchmarks/training.py; what times and reports is serving_parts'."""
