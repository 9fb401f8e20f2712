"""Small habits that keep the tree readable and quiet: docstrings, marked packages, nothing private in logs.

It reads syntax and names; whether a docstring is true it cannot know.
"""

from __future__ import annotations

import ast

from scripts.lints import Tree

CODE = ("engine", "kernels", "vattention_ext", "scripts", "tests", "setup.py")
LOGGERS = {"log", "logger", "_log", "_logger", "LOG", "LOGGER"}
LEVELS = {"debug", "info", "warning", "error", "critical", "exception", "log"}
PRIVATE = {"prompt", "prompts", "text", "token_ids", "prompt_ids", "prompt_token_ids", "input_ids", "output_ids",
           "api_key", "messages", "logits", "body", "authorization"}  # fmt: skip


def offences(tree: Tree) -> list[str]:
    """Modules without a docstring, packages of engine without __init__.py, logs of what nobody may read."""
    found = []
    for name in tree.named(".py", under=CODE):
        syntax = ast.parse(tree.text(name))
        if syntax.body and ast.get_docstring(syntax) is None:
            found.append(f"{name}:1: has no docstring; say what it is and what it deliberately does not know")
        if name.startswith("engine/") and f"{name.rpartition('/')[0]}/__init__.py" not in tree.files:
            found.append(f"{name}: its folder has no __init__.py; add one")
        found += [f"{name}:{line}: {what}" for line, what in _logs(syntax)]
    if "kernels/__init__.py" in tree.files:
        found.append("kernels/__init__.py: remove it; it would hide the package `kernels` that others install")
    return found


def _logs(syntax: ast.Module) -> list[tuple[int, str]]:
    found = []
    for node in ast.walk(syntax):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LEVELS):
            continue
        owner = node.func.value
        name = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else ""
        if name not in LOGGERS | {"logging"}:
            continue
        for argument in node.args:
            shown = argument.attr if isinstance(argument, ast.Attribute) else getattr(argument, "id", "")
            if shown in PRIVATE:
                found.append((node.lineno, f"logs {shown}; logs carry no prompt, id, key or tensor"))
            if isinstance(argument, ast.JoinedStr):
                found.append((node.lineno, "formats a log line eagerly; pass the values as arguments"))
    return found
