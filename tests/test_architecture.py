"""Rules that would decay if only written down: import direction, budgets, forbidden constructs, docstrings."""

from __future__ import annotations

import ast
import functools
import io
import itertools
import re
import statistics
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from alignkit.trainers import METHODS

ROOT = Path(__file__).parent.parent
PACKAGES = ("alignkit", "rewards", "data_pipelines")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

# Level of every part: a module imports its own level's part or lower ones, never higher. See docs of the layout.
LEVELS = [
    (
        "errors",
        "escape",
        "records",
        "seeds",
        "protocols",
        "paths",
        "shipped",
        "resolve",
        "yaml_tree",
        "key_names",
        "config",
        "storage",
        "locks",
        "claims",
        "media",
        "clips",
        "columns",
        "provenance",
        "aspects",
        "segments",
        "pairs",
    ),
    ("diffusion", "losses", "precision"),
    ("backbones", "generators", "adapters"),
    ("trainers", "evaluation", "sandbox"),
    ("commands",),
    ("cli", "__main__"),
]
LEVEL = {part: level for level, parts in enumerate(LEVELS) for part in parts}
OUTSIDE_MAY_IMPORT = {"errors", "records", "seeds", "protocols", "paths", "resolve", "storage"} | {
    "claims",
    "escape",
    "locks",
    "media",
    "clips",
    "columns",
    "aspects",
    "segments",
    "pairs",
}
FORBIDDEN_CALLS = {"hasattr", "getattr", "eval", "exec"}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "shelve"}


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path) for path in SOURCES}


def imports(path: Path) -> set[str]:
    """Modules (and module.attribute, for it may be a module) that a file imports."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            # A module taken from its package is no import of what the package's own file defines.
            found |= names if names <= MODULES else {*names, node.module or ""}
    return found


def own(names: set[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] in PACKAGES}


def part(name: str) -> str:
    """`diffusion` of alignkit.diffusion.schedules; "" of alignkit itself."""
    return [*name.split("."), ""][1]


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    yield from (node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


@functools.cache
def code_line_numbers(path: Path) -> frozenset[int]:
    """Lines that hold code: no blank lines, comments or docstrings."""
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        if token.type not in skipped:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree(path)):
        constant = node.value if isinstance(node, ast.Expr) else None
        if isinstance(constant, ast.Constant) and isinstance(constant.value, str):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return frozenset(lines)


def length(path: Path, function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    lines = range(function.lineno, (function.end_lineno or function.lineno) + 1)
    return len(code_line_numbers(path).intersection(lines))


ALL_FUNCTIONS = [(path, function) for path in SOURCES for function in functions(path)]


def where(path: Path, node: ast.stmt | ast.expr | ast.excepthandler, text: str) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno}: {text}"


# --- import direction -----------------------------------------------------------------------------------------------


def test_every_part_has_a_level():
    parts = {path.stem if path.is_file() else path.name for path in (ROOT / "alignkit").iterdir()}
    assert parts - {"__init__", "__pycache__"} <= set(LEVEL)


def test_alignkit_imports_downwards():
    wrong = []
    for path in SOURCES:
        name = module_name(path)
        if not name.startswith("alignkit."):
            continue
        for imported in own(imports(path)):
            is_inside = imported.startswith("alignkit.") and part(imported) in LEVEL
            if is_inside and part(imported) != part(name) and LEVEL[part(imported)] > LEVEL[part(name)]:
                wrong.append(f"{name} imports {imported}")
            if not imported.startswith("alignkit") and part(name) != "commands":
                wrong.append(f"{name} imports {imported}; only commands may")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", ["rewards", "data_pipelines"])
def test_rewards_and_data_know_only_the_seams(package):
    wrong = []
    for path in (path for path in SOURCES if path.relative_to(ROOT).parts[0] == package):
        for imported in own(imports(path)) - {"alignkit"}:
            is_seam = imported.startswith("alignkit.") and part(imported) in OUTSIDE_MAY_IMPORT
            if not is_seam and imported.split(".")[0] != package:
                wrong.append(f"{module_name(path)} imports {imported}")
    assert not wrong, "\n".join(wrong)


def test_no_import_cycles():
    modules = {module_name(path): path for path in SOURCES}
    edges = {name: own(imports(path)) & set(modules) - {name} for name, path in modules.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for imported in sorted(edges[name]):
                visit(imported, (*trail, name))
            done.add(name)

    for name in modules:
        visit(name, ())


@pytest.mark.parametrize(
    "module", ["alignkit", "alignkit.cli", "alignkit.config", "alignkit.records", "alignkit.protocols", "rewards"]
)
def test_imports_without_torch(module):
    heavy = "('torch', 'transformers', 'diffusers')"
    code = f"import sys, {module}; sys.exit(any(name in sys.modules for name in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# --- budgets --------------------------------------------------------------------------------------------------------


def test_functions_are_short():
    lengths = {where(path, f, f.name): length(path, f) for path, f in ALL_FUNCTIONS}
    too_long = {name: lines for name, lines in lengths.items() if lines > 60}
    assert not too_long
    assert statistics.median(lengths.values()) <= 9
    assert statistics.quantiles(lengths.values(), n=10)[-1] <= 30


def test_files_are_short():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert not {name: lines for name, lines in lengths.items() if lines > 400}


def test_tests_are_as_long_as_they_should_be():
    def lines(paths):
        return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)

    assert 0.6 <= lines((ROOT / "tests").rglob("*.py")) / lines(SOURCES) <= 1.0


def test_positional_parameters_are_few():
    wrong = []
    for path, function in ALL_FUNCTIONS:
        names = [a.arg for a in [*function.args.posonlyargs, *function.args.args] if a.arg not in ("self", "cls")]
        if len(names) > 6:
            wrong.append(where(path, function, f"{function.name} takes {len(names)}"))
    assert not wrong, "\n".join(wrong)


def lines_without_imports(path: Path) -> list[int]:
    """Numbers of the lines that hold code, less those of import statements."""
    imported: set[int] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            imported |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return sorted(code_line_numbers(path) - imported)


def test_no_block_of_ten_lines_twice():
    seen: dict[tuple[str, ...], str] = {}
    wrong = []
    for path in SOURCES:
        text = path.read_text(encoding="utf-8").splitlines()
        numbers = lines_without_imports(path)
        stripped = [(n, text[n - 1].strip()) for n in numbers if text[n - 1].strip()]
        for window in zip(*(itertools.islice(stripped, k, None) for k in range(10)), strict=False):
            block = tuple(line for _, line in window)
            place = f"{path.relative_to(ROOT)}:{window[0][0]}"
            if block in seen:
                wrong.append(f"{place} repeats {seen[block]}")
            seen.setdefault(block, place)
    assert not wrong, "\n".join(wrong)


# --- one place per name ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", list(METHODS))
def test_a_methods_name_is_in_its_file_and_in_the_table_alone(method):
    """Docstrings and comments may name it; code elsewhere reads the table."""
    allowed = {f"alignkit/trainers/{name}.py" for name in ("__init__", method)}
    wrong = []
    for path in SOURCES:
        place = path.relative_to(ROOT).as_posix()
        text = path.read_text(encoding="utf-8").splitlines()
        named = [n for n in lines_without_imports(path) if re.search(rf"\b{method}\b", text[n - 1])]
        wrong += [f"{place}:{n}: {text[n - 1].strip()}" for n in named if place not in allowed]
    assert not wrong, "\n".join(wrong)


# --- habits ---------------------------------------------------------------------------------------------------------
# Two habits of older code that new code does not take up. The bounds are today's counts: lower them, never raise them.

SMALL_HELPERS = 85
SEVERAL_COMPREHENSIONS = 58
COMPREHENSIONS = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp


def test_small_private_helpers_that_are_called_once_become_fewer():
    """A function of five lines or fewer that one place calls is read by jumping; it belongs in that place.

    One that stands in a table of functions, or is passed on, is not called there and does not count.
    """
    small = []
    for path in SOURCES:
        called = [node.func for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
        calls, uses = Counter(map(_name_of, called)), Counter(map(_name_of, ast.walk(tree(path))))
        for function in functions(path):
            is_private = function.name.startswith("_") and not function.name.startswith("__")
            if is_private and length(path, function) <= 5 and calls[function.name] == uses[function.name] == 1:
                small.append(where(path, function, function.name))
    assert len(small) <= SMALL_HELPERS, f"{len(small)} small helpers, at most {SMALL_HELPERS}:\n" + "\n".join(small)


def _name_of(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _own_comprehensions(statement: ast.stmt) -> int:
    """Comprehensions in a statement, those of statements inside it left out."""
    count, todo = 0, list(ast.iter_child_nodes(statement))
    while todo:
        node = todo.pop()
        if not isinstance(node, ast.stmt):
            count += isinstance(node, COMPREHENSIONS)
            todo += ast.iter_child_nodes(node)
    return count


def test_statements_with_several_comprehensions_become_fewer():
    several = [
        where(path, node, "several comprehensions in one statement")
        for path in SOURCES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.stmt) and _own_comprehensions(node) > 1
    ]
    assert len(several) <= SEVERAL_COMPREHENSIONS, f"{len(several)}, at most {SEVERAL_COMPREHENSIONS}"


# --- forbidden constructs -------------------------------------------------------------------------------------------


def _forbidden(node: ast.AST) -> str | None:
    if isinstance(node, ast.Global):
        return "global"
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
        return f"{node.func.id}()"
    if isinstance(node, ast.ExceptHandler):
        names = ast.walk(node.type) if node.type else iter([ast.Name("Exception")])
        if any(isinstance(name, ast.Name) and name.id in ("Exception", "BaseException") for name in names):
            return "broad except"
    return None


def test_forbidden_constructs():
    found = [
        where(path, node, reason)  # type: ignore[arg-type]
        for path in SOURCES
        for node in ast.walk(tree(path))
        if (reason := _forbidden(node)) is not None
    ]
    assert not found, "\n".join(found)


def test_no_pickle():
    wrong = [module_name(path) for path in SOURCES if {n.split(".")[0] for n in imports(path)} & FORBIDDEN_MODULES]
    assert not wrong


def test_everything_is_typed():
    wrong = []
    for path, function in ALL_FUNCTIONS:
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
        if bare or function.returns is None:
            wrong.append(where(path, function, f"{function.name}: {bare or 'no return type'}"))
    assert not wrong, "\n".join(wrong)


# --- docstrings -----------------------------------------------------------------------------------------------------


def _public(path: Path) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """A module, and the public functions and classes at its top level."""
    yield tree(path)
    kinds = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    yield from (n for n in tree(path).body if isinstance(n, kinds) and not n.name.startswith("_"))


def test_public_names_have_docstrings():
    wrong = []
    for path in SOURCES:
        is_empty = not path.read_text(encoding="utf-8").strip()
        bare = [node for node in _public(path) if not ast.get_docstring(node)]
        wrong += [] if is_empty else [f"{module_name(path)}:{vars(node).get('name', '')}" for node in bare]
    assert not wrong, "\n".join(wrong)
