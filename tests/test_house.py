"""The house rules of CONTRIBUTING.md: sizes, rooms, old paths, and no name of a model outside its declaration."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import diffusion_backbones as db
from diffusion_backbones import _moved

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "diffusion_backbones"
FILES = sorted(PACKAGE.rglob("*.py"))
ROOMS = sorted(folder.name for folder in PACKAGE.iterdir() if (folder / "__init__.py").is_file())
BESIDE = {"__init__.py", "_moved.py", "_version.py", "configs", "py.typed"}
"""What may stand at the package's top beside the rooms."""
FILE_LINES, FUNCTION_LINES, MOST_ROOMS = 400, 60, 14


def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), str(file))


def lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function from ``def`` to its end, without its docstring."""
    assert function.end_lineno
    first = function.body[0]
    documented = ast.get_docstring(function, clean=False) is not None
    docstring = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
    return function.end_lineno - function.lineno + 1 - docstring


def functions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function in a syntax tree, nested ones too, by its qualified name."""
    for child in ast.iter_child_nodes(node):
        name = f"{prefix}{getattr(child, 'name', '')}"
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield name, child
        deeper = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        yield from functions(child, f"{name}." if deeper else prefix)


def test_no_file_is_too_long():
    long = {str(file.relative_to(ROOT)): n for file in FILES if (n := len(file.read_text().splitlines())) > FILE_LINES}
    assert not long, f"a file has at most {FILE_LINES} lines, and these have more; split them by what they do: {long}"


def test_no_function_is_too_long():
    long = {
        f"{file.relative_to(ROOT)}:{function.lineno} {name}": n
        for file in FILES
        for name, function in functions(tree(file))
        if (n := lines(function)) > FUNCTION_LINES
    }
    assert not long, (
        f"a function has at most {FUNCTION_LINES} lines without its docstring, and these have more; give their steps "
        f"names: {long}"
    )


def test_the_top_of_the_package_holds_its_rooms():
    assert len(ROOMS) <= MOST_ROOMS, f"the package has at most {MOST_ROOMS} rooms, and there are {len(ROOMS)}: {ROOMS}"
    here = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    strays = here - {*ROOMS} - BESIDE
    assert not strays, f"what stands at the package's top is a room or one of {sorted(BESIDE)}; move {sorted(strays)}"


def test_contributing_lists_the_rooms_in_the_order_of_their_imports():
    """Every room of the layers contract, from the bottom up, and no other."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    listed = re.findall(r"^\| `(\w+)/`", text, re.M)
    contract = (ROOT / "pyproject.toml").read_text().partition("layers = [")[2].partition("]")[0]
    layers = [name for name in re.findall(r'"(\w+)"', contract) if name != "_version"]
    assert sorted(layers) == ROOMS, f"pyproject's layers contract has {sorted(layers)}, and the package {ROOMS}"
    assert listed == layers[::-1], (
        f"CONTRIBUTING lists the rooms from the bottom up as {layers[::-1]} in the layers contract; it has {listed}"
    )


def test_what_is_set_at_an_old_path_is_set_where_it_moved(monkeypatch):
    old = import_module(f"{_moved.PACKAGE}.registry")
    new = import_module(f"{_moved.PACKAGE}.spec.registry")
    monkeypatch.setattr(new, "_declarations", new._declarations)  # put back afterwards
    old._declarations = {}
    assert new._declarations == {}


@pytest.mark.parametrize("old", _moved.MOVED)
def test_an_old_module_path_gives_what_moved_with_a_warning(old):
    path = f"{_moved.PACKAGE}.{old}"
    sys.modules.pop(path, None)
    with pytest.warns(DeprecationWarning, match=f"{re.escape(path)} moved to"):
        module = import_module(path)
    for place in module.places:
        new = import_module(f"{_moved.PACKAGE}.{place}")
        defined = [name for name, value in vars(new).items() if getattr(value, "__module__", None) == new.__name__]
        other = [name for name in defined if getattr(module, name) is not getattr(new, name)]
        assert not other, f"{path} gives something else than {new.__name__} for {other}"
    with pytest.raises(AttributeError, match="has no attribute 'nothing'; it moved to"):
        _ = module.nothing


def test_no_room_compares_the_name_of_a_model():
    """A declaration that needs an ``if`` wants a parameter of its family."""
    models = {*db.list_checkpoints(), *db.list_models(include_tags=True)}
    found = [
        f"{file.relative_to(ROOT)}:{node.lineno} compares with {sorted(named)}"
        for file in FILES
        if file.relative_to(PACKAGE).parts[0] != "models"
        for node in ast.walk(tree(file))
        if isinstance(node, ast.Compare | ast.MatchValue) and (named := models & {*_strings(node)})
    ]
    assert not found, f"the name of a model is compared outside models/; give its family a parameter: {found}"


def _strings(node: ast.AST) -> Iterator[str]:
    """Every string constant in a comparison, those in tuples, lists and sets too."""
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.value


def test_the_checks_of_this_file_find_what_they_look_for():
    long = ast.parse("def f():\n    '''Doc\n    string.'''\n" + "    x = 1\n" * FUNCTION_LINES)
    [(name, function)] = functions(long)
    assert (name, lines(function)) == ("f", FUNCTION_LINES + 1)
    [compared] = (node for node in ast.walk(ast.parse("x in ('sd15', y)")) if isinstance(node, ast.Compare))
    assert {*_strings(compared)} == {"sd15"}
