"""The parts of `recipes/hostile/fuzz.py`."""
