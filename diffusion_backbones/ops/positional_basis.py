"""Directions of a map's channels that say where a place is and not what is there, found and taken out.

INSID3's positional debiasing (https://arxiv.org/abs/2603.28480): an image of one color has nothing but its places, so
what its features differ in is position. They are normalized to the length 1, their mean over places is subtracted, and
of the singular value decomposition the first directions of channels are kept. From any features these are projected
out, and what is left is normalized to the length 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion_backbones.ops.postprocessing import unit
from diffusion_backbones.ops.principal_components import Moments, PrincipalComponents


class PositionalBasis(PrincipalComponents):
    """Takes n directions of C channels out of (B, C, h, w), once these are found: they are the principal components of
    the features of a constant image.
    """

    advice = "take fewer of them"

    def find(self, constant: Tensor) -> None:
        """Find the directions in the features (1, C, h, w) of an image of one color.

        Raises:
            ValueError: It has too few places, or they do not differ in so many directions.
        """
        moments = Moments(constant.shape[1])
        moments.add(unit(constant.detach().cpu().double(), 1))
        self.fit(moments)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w) of length 1 at every place, in the dtype of ``x``."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        axes = self.axes.to(wide.dtype)
        along = torch.einsum("nc,bchw->bnhw", axes, wide)
        return unit(wide - torch.einsum("nc,bnhw->bchw", axes, along), 1).to(x.dtype)
