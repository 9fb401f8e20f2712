"""What `python -m scripts.bench` is made of: one question, one file."""
