"""The rules of CONTRIBUTING that a machine can check, on the sources alone (ast, tokenize; nothing is imported).

python tests/support/house.py [PATH ...]    # prints what breaks a rule in the given files or folders (default: all)
"""

from __future__ import annotations

import ast
import functools
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("fastvst", "kernels", "examples", "tools", "bench", "tests")

# From the bottom up. A module imports from its own level and from levels below it, never from above.
LEVELS = (
    ("fastvst_kernels",),
    ("fastvst.atomic", "fastvst.batch", "fastvst.checksum", "fastvst.config", "fastvst.html", "fastvst.jsonl")
    + ("fastvst.helper", "fastvst.processes", "fastvst.supervisor"),
    ("fastvst.spatial", "fastvst.vla"),
    ("fastvst.model",),
    ("fastvst.data",),
    ("fastvst.scenes",),
    ("fastvst.tasks",),
    ("fastvst.reasoning",),
    ("fastvst.generate",),
    ("fastvst.train",),
    ("fastvst.rollout", "fastvst.vllm_plugin"),
    ("fastvst.evaluate",),
    ("fastvst.rl",),
    ("fastvst.cli",),
    ("fastvst.__main__",),
    ("examples", "tools", "bench", "tests"),
)
MAX_FILE = 500
MAX_FUNCTION = 60
MAX_CLASS = 200
OLD_WORDS = re.compile(
    r"\b(pictures?|essays?|whoever|forsake|hungry|lanes?|beside|vst-spec|VST §|goes on|what it knows|does not stand)\b",
    re.IGNORECASE,
)


def sources() -> list[Path]:
    """Every Python file of the repository, relative to its root."""
    return sorted(p.relative_to(ROOT) for folder in FOLDERS for p in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    """kernels/fastvst_kernels/norm/op.py -> fastvst_kernels.norm.op; a package is named by its folder."""
    parts = path.with_suffix("").parts
    parts = parts[1:] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def import_graph() -> dict[str, set[str]]:
    """module -> the repository's modules that it imports, imports inside functions included."""
    modules = {module_name(path): path for path in sources()}
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        found: set[str] = set()
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    found.add(full if full in modules else node.module)
            elif isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
        graph[name] = {other for other in found if other in modules and other != name}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components with more than one module (Tarjan, 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in graph[name]:
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            component = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(component) > 1:
                found.append(sorted(component))

    for name in graph:
        if name not in index:
            visit(name)
    return found


def level(module: str) -> int | None:
    """The level of a module in LEVELS; None for the bare package `fastvst`, which holds only the version."""
    for number, prefixes in enumerate(LEVELS):
        if any(module == prefix or module.startswith(prefix + ".") for prefix in prefixes):
            return number
    return None


def upward_imports(graph: dict[str, set[str]]) -> list[str]:
    """Imports from a level above, and modules that belong to no level."""
    found = []
    for name, others in graph.items():
        own = level(name)
        if own is None:
            found += [] if name == "fastvst" else [f"{name} belongs to no level"]
            continue
        found += [f"{name} imports {other}" for other in others if (level(other) or 0) > own]
    return sorted(found)


def private_imports(path: Path) -> Iterator[str]:
    """`from module import _name`, and `module._name` of an imported module of ours."""
    tree = parse(path)
    ours = {"fastvst", "fastvst_kernels", "bench", "tools", "examples"}
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ours:
            for alias in node.names:
                imported.add(alias.asname or alias.name)
                if alias.name.startswith("_") and not alias.name.startswith("__"):
                    yield f"{path}:{node.lineno}: imports {alias.name} from {node.module}"
    modules = {module_name(p).rpartition(".")[2] for p in sources()}
    names = imported & modules
    for node in ast.walk(tree):
        of_name = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names
        if of_name and re.match("_[^_]", node.attr):
            yield f"{path}:{node.lineno}: uses {node.value.id}.{node.attr}"


def tuple_assignments(path: Path) -> Iterator[str]:
    """`a, b = x, y` of unrelated values; swaps are allowed, and unpacking has no tuple display on its right."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            for target in node.targets:
                if isinstance(target, ast.Tuple):
                    left = sorted(ast.unparse(e) for e in target.elts)
                    if left != sorted(ast.unparse(e) for e in node.value.elts):
                        yield f"{path}:{node.lineno}: {ast.unparse(node)[:80]}"


def _own_lines(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> int:
    """Lines from `def` to the end, without the docstring."""
    assert node.end_lineno is not None
    first = node.body[0]
    lines = node.end_lineno - node.lineno + 1
    if ast.get_docstring(node) is not None and first.end_lineno is not None:
        lines -= first.end_lineno - first.lineno + 1
    return lines


def too_long(path: Path) -> Iterator[str]:
    """Files, classes and functions over their limits. Triton kernels and the two training scripts' `run` are free."""
    count = len((ROOT / path).read_text(encoding="utf-8").splitlines())
    if count > MAX_FILE:
        yield f"{path}: {count} lines"
    scripts = path.name in ("sft.py", "rl.py") and path.parts[0] == "examples"
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.ClassDef) and (lines := (node.end_lineno or 0) - node.lineno + 1) > MAX_CLASS:
            yield f"{path}:{node.lineno}: class {node.name} has {lines} lines"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (lines := _own_lines(node)) > MAX_FUNCTION:
            is_kernel = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
            if not is_kernel and not (scripts and node.name == "run"):
                yield f"{path}:{node.lineno}: {node.name} has {lines} lines"


def format_skips(path: Path) -> Iterator[str]:
    marker = "# fmt:" + " skip"
    for number, line in enumerate((ROOT / path).read_text(encoding="utf-8").splitlines(), 1):
        if marker in line or "# fmt:" + " off" in line:
            yield f"{path}:{number}: {marker}"


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of every comment and docstring."""
    text = (ROOT / path).read_text(encoding="utf-8")
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for number, line in enumerate((ast.get_docstring(node, clean=False) or "").splitlines()):
            yield node.body[0].lineno + number, line


def old_words(path: Path) -> Iterator[str]:
    """Words of the old private dialect in comments and docstrings."""
    for number, line in prose(path):
        if match := OLD_WORDS.search(line):
            yield f"{path}:{number}: {match.group(0)!r} in {line.strip()[:90]}"


def main(arguments: list[str]) -> int:
    asked = [Path(a).resolve().relative_to(ROOT) for a in arguments]
    chosen = [p for p in sources() if not asked or any(p == a or a in p.parents for a in asked)]
    names = {module_name(p) for p in chosen}
    graph = import_graph()
    problems = [f"circle: {' <-> '.join(c)}" for c in circles(graph) if names & set(c)]
    problems += [line for line in upward_imports(graph) if line.split()[0] in names]
    for path in chosen:
        for rule in (private_imports, tuple_assignments, too_long, format_skips, old_words):
            problems += rule(path)
    print(*problems, f"{len(problems)} problems", sep="\n")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
