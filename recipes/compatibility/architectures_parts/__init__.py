"""What recipes/compatibility/architectures.py is made of."""
