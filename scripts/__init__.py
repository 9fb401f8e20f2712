"""Commands for people who work on Tessera: `python -m scripts.NAME`. Not in the wheel."""
