"""Patched vocabularies: what is on disk (artefact), where it comes from (build, upstream), how a model takes it.

It knows tokenizers and files; it knows no requests, schedulers or devices. Names are imported from their modules.
"""
