"""The rooms whose names are public beside ``diffusion_backbones`` itself."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib import import_module

import pytest

ROOMS = ["extraction", "evaluation", "selection"]
ADAPTERS = ["openmmlab", "smp", "torchvision", "transformers"]


@pytest.mark.parametrize("name", [*ROOMS, *(f"integrations.{adapter}" for adapter in ADAPTERS)])
def test_every_public_name_is_there_and_documented(name):
    room = import_module(f"diffusion_backbones.{name}")
    assert room.__all__
    assert set(room.__all__) <= set(dir(room))
    for public in room.__all__:
        found = getattr(room, public)
        if inspect.ismodule(found) or callable(found):
            assert inspect.getdoc(found), f"{name}.{public} has no docstring"


@pytest.mark.parametrize("room", ["evaluation", "selection"])
def test_importing_a_room_of_verbs_loads_no_torch(room):
    code = f"import sys, diffusion_backbones.{room}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        import_module(f"diffusion_backbones.{room}").nothing  # noqa: B018
