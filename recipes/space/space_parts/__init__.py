"""The parts of recipes/space/make.py: the tasks and their data, the scores, and what is written."""
