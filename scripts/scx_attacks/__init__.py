"""Attacks on encoded keys and values, for measuring what the SCX schemes leak; `python -m scripts.scx leakage`.

An attacker is a function of a PublicModel (weights anyone has) and a View (arrays seen on the untrusted side). Neither
type has a place for a key, and nothing here but `capture` (which runs the engine) and `table` (which scores) ever
meets the true tokens before the guess is made; where an attack is given a known prefix, it is an argument.
"""
