"""Every test module stands in exactly one list of tests/manifests; the complaint ends with the line to add."""

from __future__ import annotations

from scripts.lints import Tree

LISTS = ("cpu", "gpu", "multi_gpu")


def offences(tree: Tree) -> list[str]:
    """Modules in no list or several, lines without a module, and lines written twice."""
    found = []
    where: dict[str, list[str]] = {}
    for which in LISTS:
        path = f"tests/manifests/{which}.txt"
        if path not in tree.files:
            found.append(f"{path} is missing; create it")
            continue
        for number, line in enumerate(tree.text(path).splitlines(), 1):
            entry = line.strip()
            if not entry or entry.startswith("#"):
                continue
            if entry not in tree.files:
                found.append(f"{path}:{number}: there is no {entry}; remove the line")
            where.setdefault(entry, []).append(which)
    for entry, lists in where.items():
        if len(lists) > 1:
            found.append(f"{entry} is listed {len(lists)} times ({', '.join(lists)}); keep one")
    for module in tree.named(".py", under=("tests",)):
        leaf = module.rpartition("/")[2]
        if leaf.startswith("test_") and module not in where:
            found.append(f"{module} is in no list; add to tests/manifests/cpu.txt (no GPU needed) the line:\n{module}")
    return found
