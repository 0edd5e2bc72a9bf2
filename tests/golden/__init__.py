"""Adapters as earlier versions wrote them, one folder a version of the format; every later version reads them.

    python tests/golden/write.py 1

writes, into tests/golden/1, the kinds that have no folder there yet; it never touches one that is there. What each
computes stands beside it in expected.json, in plain numbers that `formula.py` (NumPy, float64) worked out from the
files. `kinds.py` says what kinds there are.
"""
