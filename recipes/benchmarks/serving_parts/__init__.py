"""The parts of recipes/benchmarks/serving.py: a file for each section, and what they share."""
