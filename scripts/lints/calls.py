"""No code from data: a walk over the syntax trees for pickle and its kin, eval, and the clock and environment rules.

The rules are docs/security.md's. It reads syntax only and imports nothing that it checks.
"""

from __future__ import annotations

import ast

from scripts.lints import Tree

PACKAGES = ("engine", "kernels", "vattention_ext")
CHECKED = (*PACKAGES, "scripts", "tests", "setup.py")
# path -> modules it may import nevertheless. One file at most: the offline importer of upstream vocabularies.
ALLOWED = {"engine/patching/upstream.py": {"pickle", "pickletools"}}

MODULES = {
    "pickle": "it runs code from data", "_pickle": "it runs code from data", "cloudpickle": "it runs code from data",
    "dill": "it runs code from data", "marshal": "it trusts its input", "shelve": "it is pickle",
    "joblib": "it is pickle", "multiprocessing": "it sends pickle; use subprocess and msgspec over a pipe",
    "concurrent.futures.process": "it is multiprocessing", "torch.multiprocessing": "it is multiprocessing",
}  # fmt: skip
BUILTINS = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = {
    "yaml.load": "use yaml.safe_load", "yaml.full_load": "use yaml.safe_load",
    "yaml.unsafe_load": "use yaml.safe_load", "yaml.load_all": "use yaml.safe_load_all",
    "torch.load": "use safetensors", "torch.save": "use safetensors", "torch.hub.load": "it runs code it downloads",
    "os.system": "use subprocess with a list", "os.popen": "use subprocess with a list", "os.fork": "use subprocess",
    "time.time": "use engine.core.clock.wall_s", "time.time_ns": "use engine.core.clock.wall_s",
    "jinja2.Environment": "use jinja2.sandbox.ImmutableSandboxedEnvironment",
    "jinja2.Template": "use jinja2.sandbox.ImmutableSandboxedEnvironment",
}  # fmt: skip
METHODS = {"recv_pyobj", "send_pyobj"}
CLASSES = {"BaseHTTPMiddleware": "it hides disconnects", "ProcessPoolExecutor": "it is multiprocessing"}
CLOCKS = {"time.monotonic", "time.monotonic_ns", "time.perf_counter", "time.perf_counter_ns", "datetime.datetime.now",
          "datetime.now", "datetime.datetime.utcnow", "datetime.utcnow"}  # fmt: skip
CLOCK_FILE = "engine/core/clock.py"
CLOCK_EXCEPT = {CLOCK_FILE, "vattention_ext/measure.py"}  # the latter knows nothing of engine and only measures
ENVIRONMENT_FILE = "engine/core/config.py"
# The second one reads and writes SCX-vLLM's three variables, which are its users' interface, and nothing else.
ENVIRONMENT_FILES = {ENVIRONMENT_FILE, "engine/scx/environment.py"}
ARGUMENTS = {"trust_remote_code": "it does not exist here", "allow_pickle": "it runs code from data",
             "shell": "use a list of arguments"}  # fmt: skip


def offences(tree: Tree) -> list[str]:
    """One line per offence: `path:line: what; why or what to use`."""
    found = []
    for name in tree.named(".py", under=CHECKED):
        try:
            syntax = ast.parse(tree.text(name))
        except SyntaxError as error:
            found.append(f"{name}:{error.lineno}: does not parse: {error.msg}")
            continue
        found += [f"{name}:{line}: {what}" for line, what in _walk(name, syntax)]
    if len(ALLOWED) > 1:
        found.append("scripts/lints/calls.py: ALLOWED names more than one file")
    return found


def _walk(name: str, syntax: ast.Module) -> list[tuple[int, str]]:
    found: list[tuple[int, str]] = []
    aliases = _aliases(syntax)
    packaged = name.startswith(tuple(f"{top}/" for top in PACKAGES))
    for node in ast.walk(syntax):
        line = getattr(node, "lineno", 0)
        for module in _imported(node):
            why = next((MODULES[known] for known in MODULES if f"{module}.".startswith(f"{known}.")), None)
            if why and module.partition(".")[0] not in ALLOWED.get(name, set()):
                found.append((line, f"imports {module}; {why}"))
            if module in ATTRIBUTES and name != CLOCK_FILE:
                found.append((line, f"imports {module}; {ATTRIBUTES[module]}"))
            if module.rpartition(".")[2] in CLASSES:
                found.append((line, f"imports {module}; {CLASSES[module.rpartition('.')[2]]}"))
        if isinstance(node, ast.Call):
            found += [(line, what) for what in _call(node, aliases)]
        path = _dotted(node, aliases)
        if path in CLOCKS and packaged and name not in CLOCK_EXCEPT:
            found.append((line, f"reads {path}; take a clock (engine/core/clock.py) as an argument"))
        if path in ("os.environ", "os.getenv") and packaged and name not in ENVIRONMENT_FILES:
            found.append((line, f"reads {path}; only {ENVIRONMENT_FILE} reads the environment"))
        if path in ATTRIBUTES and name != CLOCK_FILE:
            found.append((line, f"uses {path}; {ATTRIBUTES[path]}"))
    return found


def _call(node: ast.Call, aliases: dict[str, str]) -> list[str]:
    found = []
    if isinstance(node.func, ast.Name) and node.func.id in BUILTINS and node.func.id not in aliases:
        found.append(f"calls {node.func.id}")
    if isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
        found.append(f"calls {node.func.attr}; it is pickle")
    for keyword in node.keywords:
        on = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
        if keyword.arg in ARGUMENTS and on:
            found.append(f"passes {keyword.arg}=True; {ARGUMENTS[keyword.arg]}")
    return found


def _imported(node: ast.AST) -> list[str]:
    """Every dotted name that an import statement could load."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module and not node.level:
        return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


def _aliases(syntax: ast.Module) -> dict[str, str]:
    """Local name -> what it stands for, over all imports of the file."""
    names: dict[str, str] = {}
    for node in ast.walk(syntax):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _dotted(node: ast.AST, aliases: dict[str, str]) -> str | None:
    """`time.time` for the expression t.time after `import time as t`; None for anything but a chain of names."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or isinstance(node.ctx, ast.Store):
        return None
    known = aliases.get(node.id, node.id)
    if not parts and node.id not in aliases:
        return None
    return ".".join([known, *reversed(parts)])
