"""Scheduling core: standard library only, no torch (tests/core/test_floors.py holds it to that)."""
