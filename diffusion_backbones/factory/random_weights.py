"""The warning of a backbone whose weights are random."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

PACKAGE = str(Path(__file__).parent.parent) + os.sep
RANDOM = "{} has random weights, so its features mean nothing; give pretrained=True or checkpoint_path=, or load others"


class RandomWeightsWarning(UserWarning):
    """A frozen backbone was built on a device without weights."""


def warn(name: str) -> None:
    """Warn of a backbone, where this package was called."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_code.co_filename.startswith(PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(RANDOM.format(name), RandomWeightsWarning, stacklevel=level)
