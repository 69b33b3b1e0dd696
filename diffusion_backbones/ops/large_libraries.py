"""Libraries that take seconds to import, loaded when they are first needed and at as little cost as they allow."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def uncollected() -> Iterator[None]:
    """Look for no garbage while libraries are imported: they make a million objects that stay, and Python would look
    through all of them again and again.

    Afterwards these count as old, and are looked through when everything is. Where the caller has switched collection
    off, or has frozen objects, nothing is changed.
    """
    if not gc.isenabled() or gc.get_freeze_count():
        yield
        return
    before = len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > before:
            gc.freeze()
            gc.unfreeze()  # which moves them to the oldest generation; frozen they would never be freed
        gc.enable()


def stock(name: str) -> Any:
    """A class of diffusers. The first one imports the library, and with it transformers and PyTorch's compiler.

    Args:
        name: As diffusers exports it.

    Raises:
        AttributeError: diffusers has no such class.
    """
    with uncollected():
        import torch

        with torch.device("cpu"):  # the compiler of PyTorch 2.6 cannot be imported on meta
            import diffusers

            return getattr(diffusers, name)
