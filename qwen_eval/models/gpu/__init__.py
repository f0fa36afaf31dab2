"""Triton kernels of the native engine. Each has a plain twin that gives the same numbers; see `check.py`."""
