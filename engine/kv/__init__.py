"""Where keys and values live: stores that follow step plans."""
