"""Who may import whom: imports point down or sideways as engine/README.md draws them, never up.

Read from the syntax (imports inside functions count, those under TYPE_CHECKING do not); imports nothing it checks.
"""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass, field

from scripts.lints import Tree

# A folder may import these folders of ours and itself. engine/__init__.py and engine/*.py are listed by file.
# engine.runner.batch is a row of its own: the message that a step passes down through models to attention.
OURS = {
    "engine.core": set(),
    "engine.runner.batch": {"engine.core"},
    "engine.tokenization": {"engine.core", "engine.tokenization.patched"},
    "engine.tokenization.patched": {"engine.core", "engine.tokenization", "engine.patching"},
    "engine.patching": {"engine.core", "engine.tokenization", "engine.tokenization.patched", "engine.loading"},
    "engine.loading": {"engine.core", "engine.tokenization"},
    "engine.attention": {"engine.core", "engine.loading", "engine.runner.batch", "tessera_kernels"},
    "engine.kv": {"engine.core", "engine.loading", "engine.runner.batch", "vattention_ext", "tessera_kernels"},
    # beside attention: parts hands its pieces out, the runner opens and closes its sessions
    "engine.scx": {"engine.core", "engine.loading", "engine.runner.batch", "engine.attention", "tessera_kernels"},
    "engine.parts": {"engine.core", "engine.loading", "engine.runner.batch", "engine.attention", "engine.kv",
                     "engine.scx", "tessera_kernels"},
    "engine.models": {"engine.core", "engine.loading", "engine.runner.batch", "engine.parts"},
    "engine.runner": {"engine.core", "engine.runner.batch", "engine.loading", "engine.parts", "engine.models",
                      "engine.attention", "engine.kv", "engine.scx", "tessera_kernels", "vattention_ext"},
    "engine.exec": {"engine.core", "engine.loading", "engine.parts", "engine.models", "engine.attention", "engine.kv",
                    "engine.runner", "tessera_kernels", "vattention_ext"},
    "tessera_kernels": set(),
    "vattention_ext": set(),
}  # fmt: skip
TOP = {"engine.serve", "engine.api_server", "engine.build", "engine.gpu", "engine"}  # may import everything of ours
NO_TORCH = ("engine.core", "engine.tokenization", "engine.tokenization.patched", "engine.patching", "engine.loading",
            "vattention_ext")
NO_TORCH_EXCEPT = ("engine/loading/weights.py", "engine/patching/train.py", "engine/patching/train_step.py")
STANDARD_ONLY = ("engine.core",)
EXPLAIN = "see `Who may import whom` in engine/README.md"


@dataclass(frozen=True)
class Rules:
    """The table above, as an argument, so that a test can plant another."""

    ours: dict[str, set[str]] = field(default_factory=lambda: OURS)


def offences(tree: Tree, rules: Rules | None = None) -> list[str]:
    """One line per import that points where it may not."""
    rules = rules or Rules()
    found = []
    for name in tree.named(".py", under=("engine", "kernels", "vattention_ext")):
        module = _module_of(name)
        owner = _owner(module, rules)
        for line, target in imports(ast.parse(tree.text(name)), module, is_package=name.endswith("__init__.py")):
            why = _forbidden(name, owner, target, rules)
            if why:
                found.append(f"{name}:{line}: {owner} imports {target}, {why}; {EXPLAIN}")
    return found


def _forbidden(name: str, owner: str, target: str, rules: Rules) -> str | None:
    top = target.partition(".")[0]
    if top == "kernels":
        return "which is another project's package; ours is tessera_kernels"
    if top == "torch" and owner in NO_TORCH and name not in NO_TORCH_EXCEPT:
        return "which must not load torch"
    if owner in STANDARD_ONLY and top not in sys.stdlib_module_names and not target.startswith(owner):
        return "which is neither of the standard library nor of this folder"
    if top in ("scripts", "tests"):
        return "which the wheel does not ship"
    if owner in rules.ours and top in ("engine", "tessera_kernels", "vattention_ext"):
        towards = _owner(target, rules)
        if towards not in {owner, *rules.ours[owner]}:
            return "which is above it or beside it"
    return None


def _module_of(name: str) -> str:
    """engine/core/plan.py -> engine.core.plan; kernels/rope.py -> tessera_kernels.rope."""
    parts = name.removesuffix(".py").split("/")
    if parts[0] == "kernels":
        parts[0] = "tessera_kernels"
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _owner(module: str, rules: Rules) -> str:
    """The row of the table that a module belongs to."""
    known = [row for row in (*rules.ours, *TOP) if module == row or module.startswith(row + ".")]
    return max(known, key=len, default=module)


def imports(syntax: ast.Module, module: str, is_package: bool) -> list[tuple[int, str]]:
    """(line, absolute dotted name) of every import outside `if TYPE_CHECKING:`."""
    found: list[tuple[int, str]] = []
    package = module if is_package else module.rpartition(".")[0]

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for other in node.orelse:
                visit(other)
            return
        if isinstance(node, ast.Import):
            found.extend((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            found.extend((node.lineno, f"{source}.{alias.name}") for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(syntax)
    return found
