"""What must not stand in a tracked file: secrets, paths of one machine, unfinished places, large files.

It looks at text, not meaning. The patterns are written so that this file does not match itself.
"""

from __future__ import annotations

import re

from scripts.lints import TEXT_ENDINGS, Tree

SECRETS = {
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "an AWS key": re.compile(r"\bAKIA[0-9A-Z]{16}\b"),
    "a GitHub token": re.compile(r"\bgh[pousr]_[A-Za-z0-9]{36}\b|\bgithub_pat_\w{40,}"),
    "a hub token": re.compile(r"\bhf_[A-Za-z0-9]{30,}\b"),
    "an API key": re.compile(r"\bsk-(?:proj-|ant-)?[A-Za-z0-9_-]{32,}\b"),
    "a Slack token": re.compile(r"\bxox[baprs]-[A-Za-z0-9-]{20,}"),
    "a password in an address": re.compile(r"\b[a-z][a-z0-9+]*://[^\s:/@{}<]+:[^\s:/@{}<]{6,}@"),
}
MACHINE = re.compile(r"(?<![\w.])/(?:home|Users|root|w[o]rk|workspace)/[\w.-]")
UNFINISHED = re.compile(r"\b(?:TO[D]O|FIX[M]E|X[X]X|HA[C]K)\b|\braise NotImplemented[E]rror\b")
LARGEST_BYTES = 1 << 20


def offences(tree: Tree) -> list[str]:
    """One line per place."""
    found = []
    for name in tree.files:
        size = (tree.root / name).stat().st_size
        if size > LARGEST_BYTES:
            found.append(f"{name}: {size} bytes, more than {LARGEST_BYTES}; fetch it by script instead")
        if not name.endswith(TEXT_ENDINGS) and "." in name.rpartition("/")[2]:
            continue
        found += _lines(name, tree.text(name))
    return found


def _lines(name: str, text: str) -> list[str]:
    found = []
    code = name.endswith((".py", ".cpp", ".hpp", ".h", ".ipp"))
    for number, line in enumerate(text.splitlines(), 1):
        for what, pattern in SECRETS.items():
            if pattern.search(line):
                found.append(f"{name}:{number}: looks like {what}; remove it and revoke it")
        if match := MACHINE.search(line):
            found.append(f"{name}:{number}: {match.group(0)}... is a path of one machine; use a relative one")
        if code and not name.startswith("tests/") and (match := UNFINISHED.search(line)):
            found.append(f"{name}:{number}: {match.group(0)}: finish it, or write an issue")
    return found
