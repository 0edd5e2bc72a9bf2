"""What `recipes/paper/run.py` is made of."""
