"""What recipes/compatibility/variants.py is made of."""
