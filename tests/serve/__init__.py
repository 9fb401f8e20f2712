"""Tests of the server: configuration, wire, HTTP, processes."""
