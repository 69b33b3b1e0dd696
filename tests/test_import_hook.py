"""Registering in timm whenever timm is imported, without importing it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import warm


def run(code: str) -> str:
    done = warm.run(code)
    assert done.returncode == 0, done.stderr
    return done.stdout


KNOWN = "import timm; assert timm.is_model('sd15_gdf') and 'sd15_gdf' in timm.list_models()\n"


@pytest.mark.parametrize(
    "code",
    [
        "import diffusion_backbones\n" + KNOWN,
        "import timm; assert not timm.is_model('sd15_gdf')\nimport diffusion_backbones\n" + KNOWN,
        "import diffusion_backbones\nfrom timm.layers import DropPath\n" + KNOWN,
        "import diffusion_backbones, importlib\nimportlib.reload(diffusion_backbones)\n" + KNOWN,
        "import diffusion_backbones\n" + KNOWN + "import importlib; importlib.reload(timm)\n" + KNOWN,
    ],
    ids=["before", "after", "through a submodule", "reloaded", "timm reloaded"],
)
def test_names_are_in_timms_registry_in_any_order(code):
    run(code)


def test_importing_this_package_imports_neither_timm_nor_torch():
    code = "import sys, diffusion_backbones; print({'timm', 'torch', 'wrapt'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_looking_for_timm_does_not_import_it_and_shows_the_real_one():
    run("""
import importlib.util, inspect, pkgutil, sys
from importlib.machinery import PathFinder, SourceFileLoader
import diffusion_backbones
real, found = PathFinder.find_spec("timm"), importlib.util.find_spec("timm")
assert "timm" not in sys.modules
assert (found.origin, found.submodule_search_locations) == (real.origin, real.submodule_search_locations)
assert found.loader.path == real.origin and found.loader.get_source("timm") == real.loader.get_source("timm")
assert importlib.util.find_spec("no_such_module_at_all") is None
import timm
assert type(timm.__loader__) is type(timm.__spec__.loader) is SourceFileLoader
assert inspect.getsource(timm).startswith(pkgutil.get_data("timm", "__init__.py").decode()[:20])
assert not any("import_hook" in type(finder).__module__ for finder in sys.meta_path)
""")


def test_threads_that_import_timm_at_once():
    out = run("""
import sys, threading
import diffusion_backbones
sys.setswitchinterval(1e-6)
found = []
def look():
    import timm
    from timm.models import list_models
    found.append("sd15_gdf" in list_models())
threads = [threading.Thread(target=look) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(found)
""")
    assert out == f"{[True] * 8}\n"


def test_threads_that_import_both():
    run("""
import importlib, sys, threading
sys.setswitchinterval(1e-6)
names = ["timm", "diffusion_backbones", "diffusion_backbones.integrations.timm", "timm.models"] * 2
threads = [threading.Thread(target=importlib.import_module, args=(name,)) for name in names]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
import timm
assert timm.is_model("sd15_gdf")
""")


def test_timm_that_is_not_there_or_fails_is_not_our_error():
    run("""
import sys
sys.modules["timm"] = None
import diffusion_backbones
try:
    import timm
except ModuleNotFoundError:
    del sys.modules["timm"]
from importlib.machinery import SourceFileLoader
real, SourceFileLoader.exec_module = SourceFileLoader.exec_module, lambda *_: 1 / 0
try:
    import timm
except ZeroDivisionError:
    SourceFileLoader.exec_module = real
import timm
assert timm.is_model("sd15_gdf")
""")
