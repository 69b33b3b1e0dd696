"""What users rely on is as ``golden/contract.json`` has it: things may be added, but nothing may change or go."""

from __future__ import annotations

import importlib
import json
from operator import attrgetter

import golden
import pytest

import diffusion_backbones as db

pytestmark = pytest.mark.usefixtures("one_thread")
CONTRACT = json.loads(golden.FILE.read_text())
ADAPTERS = "diffusion_backbones.integrations."
LIBRARIES = {"detectron2": "detectron2", "openmmlab": "mmengine", "smp": "segmentation_models_pytorch"}


def same(part: str) -> None:
    told = list(golden.differences(CONTRACT[part], golden.current(part), part))
    assert told == [], "\n".join(["What must not change did:", *told[:20], *(["and more"] if told[20:] else [])])


@pytest.mark.parametrize("part", golden.PARTS)
def test_nothing_changed(part):
    same(part)


def test_lists_are_printed_as_they_were():
    if [*db.list_models(), *db.list_checkpoints()] != [*CONTRACT["backbones"], *CONTRACT["checkpoints"]]:
        pytest.skip("something was registered, so lists are longer; test_nothing_changed compares each of their lines")
    same("printed_of_all")


def marked(name):
    """An adapter needs the library of an extra, which is not there at the lowest versions of what is always needed."""
    extra = name.removeprefix(ADAPTERS) in LIBRARIES or name == f"{ADAPTERS}transformers"
    return pytest.param(name, marks=pytest.mark.newer) if extra else name


@pytest.mark.parametrize("name", map(marked, CONTRACT["modules"]))
def test_a_module_is_imported_by_its_old_name(name):
    """With what pickles name in it, whatever that is, and of an adapter with all that it defined."""
    library = LIBRARIES.get(name.removeprefix(ADAPTERS))
    if library:
        pytest.importorskip(library)
    module = importlib.import_module(name)
    needed = [*CONTRACT["pickled"].get(name, []), *(CONTRACT["modules"][name] if name.startswith(ADAPTERS) else [])]
    lost = [what for what in needed if not has(module, what)]
    assert lost == [], f"{name} has no {', '.join(lost)} any more, which old pickles or users import from there"


def has(module: object, name: str) -> bool:
    try:
        attrgetter(name)(module)
    except AttributeError:
        return False
    return True


def test_the_comparison_sees_what_changed():
    """It tells what is missing or different at any depth, and not what is new or the last digits of a number."""
    old = {"a": {"b": "x", "gone": 1}, "names": ["one", "two"], "number": 1.0, "kind": {}}
    new = {"a": {"b": "y", "new": 1}, "names": ["two", "three"], "number": 1.0001, "kind": []}
    assert list(golden.differences(old, new, "it")) == [
        "it: a: b was 'x' and is 'y'",
        "it: a: 'gone' is gone",
        "it: names: 'one' is gone",
        "it: kind was {} and is []",
    ]
    assert list(golden.differences(old, old | {"more": 1}, "it")) == []
    assert list(golden.differences({"number": 1.0}, {"number": 1.1}, "it")) == ["it: number was 1.0 and is 1.1"]
