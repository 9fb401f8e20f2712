"""Executors: where plans run."""
