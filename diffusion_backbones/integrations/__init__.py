"""Adapters for other libraries, one module each; a module imports its library."""

from __future__ import annotations

__all__ = ["missing"]


def missing(library: str, extra: str, error: ImportError) -> ImportError:
    """The error of an adapter whose library is missing, with the command that installs it."""
    return ImportError(
        f"diffusion_backbones.integrations needs {library} for this ({error}); install it with pip install "
        f"'diffusion-backbones[{extra}]'"
    )
