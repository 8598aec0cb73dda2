"""The limits that keep the package readable: parameters, lengths, full folders, circles of imports, shared names."""

import ast
from pathlib import Path

import pytest

import diffusion_align

PACKAGE = Path(diffusion_align.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
PARAMETERS, BODY, FILE, FOLDER = 9, 60, 250, 16


def name_of(path):
    """The dotted name of a file's module."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {name_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def functions():
    """(where, node) of every function."""
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{module}.{node.name}", node


def parameters(function):
    """How many parameters a caller sees: not self, and *names and **names count one each."""
    args = function.args
    named = [*args.posonlyargs, *args.args, *args.kwonlyargs, *filter(None, (args.vararg, args.kwarg))]
    return len(named) - (bool(named) and named[0].arg in ("self", "cls"))


def body_lines(function):
    """Lines of the body without the docstring."""
    body = function.body
    if ast.get_docstring(function) is not None and len(body) > 1:
        body = body[1:]
    return body[-1].end_lineno - body[0].lineno + 1


def imports(module):
    """Modules of the package that a module imports, anywhere in its file."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in TREES)
        elif isinstance(node, ast.ImportFrom):
            yield from imported_from(module, node)


def imported_from(module, node):
    base = node.module or ""
    if node.level:
        parts = module.split(".")
        home = parts if (PACKAGE.parent / Path(*parts)).is_dir() else parts[:-1]
        home = home[: len(home) - node.level + 1]
        base = ".".join([*home, base] if base else home)
    for alias in node.names:
        if f"{base}.{alias.name}" in TREES:
            yield f"{base}.{alias.name}"
        elif base in TREES:
            yield base


def circles(graph):
    """Groups of nodes that reach one another (Tarjan's strongly connected components of more than one node)."""
    index, low, stack, found = {}, {}, [], []

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def test_functions_take_at_most_nine_parameters():
    assert {where: parameters(node) for where, node in functions() if parameters(node) > PARAMETERS} == {}


def test_function_bodies_have_at_most_sixty_lines():
    assert {where: body_lines(node) for where, node in functions() if body_lines(node) > BODY} == {}


def test_files_have_at_most_250_lines():
    lengths = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {path: length for path, length in lengths.items() if length > FILE} == {}


def test_folders_have_at_most_sixteen_files():
    folders = {path.parent for path in FILES}
    assert {str(f): len(list(f.glob("*.py"))) for f in folders if len(list(f.glob("*.py"))) > FOLDER} == {}


def test_no_files_import_each_other_in_a_circle():
    # A package's __init__ imports its own modules, and they may import what it names: python resolves that.
    graph = {module: {name for name in imports(module) if not inside(module, name)} for module in TREES}
    assert circles(graph) == []


def inside(module, name):
    """Whether a package imports a module of its own."""
    return name.startswith(module + ".") and name_is_package(module)


def name_is_package(module):
    return (PACKAGE.parent / Path(*module.split("."))).is_dir()


def test_the_checks_find_what_they_look_for():
    """Each on a made case: a check that finds nothing anywhere checks nothing."""
    tree = ast.parse(
        "def f(a, b, *, c, **more):\n    'words'\n    x = 1\n    return x\nclass C:\n    def g(self, a): pass\n"
    )
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert [parameters(node) for node in found] == [4, 1] and body_lines(found[0]) == 2
    assert circles({"a": ["b"], "b": ["c"], "c": ["a"], "d": ["a"]}) == [["a", "b", "c"]]
    relative = ast.parse("from ..names import UsageError\nfrom . import common").body
    assert list(imported_from("diffusion_align.options.train.dpo", relative[0])) == ["diffusion_align.options.names"]
    assert list(imported_from("diffusion_align.options.train.dpo", relative[1])) == [
        "diffusion_align.options.train.common"
    ]


@pytest.mark.parametrize(
    "method", sorted(p.stem for p in (PACKAGE / "methods").glob("*.py") if p.stem not in ("__init__", "entry", "kto"))
)
def test_every_method_says_what_the_command_asks(method):
    from importlib import import_module

    from diffusion_align.methods.entry import Entry
    from diffusion_align.options import VERBS

    entry = import_module(f"diffusion_align.methods.{method}").METHOD
    assert isinstance(entry, Entry) and VERBS[entry.verb].entry() is entry
