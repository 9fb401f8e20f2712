"""Attention over slabs: one file is one backend, with declared capabilities."""
