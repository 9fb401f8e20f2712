"""The pieces models are built from; `parts.py` is the only file that knows all the seams."""
