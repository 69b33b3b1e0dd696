"""Other libraries' ways of asking for a backbone. Each file is imported only when its library is."""

from __future__ import annotations


def missing(library: str, extra: str, error: ImportError) -> ImportError:
    """The error of an adapter whose library is not there, which says how it is installed."""
    return ImportError(
        f"diffusion_backbones.integrations needs {library} for this ({error}); install it with pip install "
        f"'diffusion-backbones[{extra}]'"
    )
