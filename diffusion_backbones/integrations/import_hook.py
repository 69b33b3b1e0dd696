"""Doing something once another library is imported, whenever that is, without importing it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def when_imported(name: str, then: Callable[[], object]) -> None:
    """Call ``then`` once the module ``name`` is imported: now if it already is, otherwise at the end of its import, in
    the thread that imports it.
    """
    watch = _Watch(name, then)
    sys.meta_path.insert(0, watch)
    if sys.modules.get(name):
        watch.fire()


class _Watch(MetaPathFinder):
    """Finds a module as the finders after it do, and has its loader report when it is loaded."""

    def __init__(self, name: str, then: Callable[[], object]):
        self.name, self.then = name, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        finders = list(sys.meta_path)
        others = finders[finders.index(self) + 1 :] if self in finders else finders  # those before have been asked
        specs = (finder.find_spec(fullname, path, target) for finder in others if hasattr(finder, "find_spec"))
        spec = next((spec for spec in specs if spec), None)
        if spec and spec.loader:
            spec.loader = _Reporter(spec.loader, self)
        return spec

    def fire(self) -> None:
        """Do it, and stop watching."""
        try:
            sys.meta_path.remove(self)
        except ValueError:  # another thread was first
            return
        self.then()


class _Reporter(Loader):
    """A loader that is another one in everything, and reports when the module is loaded."""

    def __init__(self, loader: Loader, watch: _Watch):
        self._loader, self._watch = loader, watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__
        module.__loader__ = module.__spec__.loader = self._loader  # from here on, nobody meets this one
        self._loader.exec_module(module)
        self._watch.fire()
