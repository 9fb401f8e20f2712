"""Relative links in the documents lead somewhere: the file exists and, after a #, so does the heading.

Links to other sites are not followed (the checks need no network).
"""

from __future__ import annotations

import posixpath
import re

from scripts.lints import Tree

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#{1,6}\s+(.+?)\s*#*$", re.MULTILINE)


def offences(tree: Tree) -> list[str]:
    """One line per link that leads nowhere."""
    found = []
    folders = {posixpath.dirname(name) for name in tree.files}
    known = {*tree.files, *folders, *(parent for folder in folders for parent in _parents(folder))}
    for name in tree.named(".md"):
        for target in LINK.findall(FENCE.sub("", tree.text(name))):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, heading = target.partition("#")
            full = posixpath.normpath(posixpath.join(posixpath.dirname(name), path)) if path else name
            if full not in known:
                found.append(f"{name}: the link {target} leads nowhere")
            elif heading and full.endswith(".md") and heading not in anchors(tree.text(full)):
                found.append(f"{name}: {full} has no heading for #{heading}")
    return found


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of a document's headings."""
    plain = (re.sub(r"[`*_]", "", title) for title in HEADING.findall(FENCE.sub("", text)))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in plain}


def _parents(folder: str) -> list[str]:
    parts = folder.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]
