"""Maps as colors: principal components that all maps share, so that a color means the same in each of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PERCENTILE = 0.01
"""Share of positions that saturate at either end of a component, so that a few outliers do not take the contrast."""
WHITE = 255


def pca_rgb(features: Tensor) -> Tensor:
    """The first three principal components of a map as red, green and blue.

    Args:
        features: (C, h, w), finite.

    Returns:
        (h, w, 3) uint8 on the CPU. Each component is stretched so that one hundredth of the positions saturates at
        either end, and its sign is such that few positions are bright and many dark: then what stands out is bright
        at every level, and the levels look alike. Components that a map lacks are mid-grey.
    """
    return shared_rgb([features])[0]


def shared_rgb(maps: Sequence[Tensor], hide_background: bool = False) -> list[Tensor]:
    """The same for several maps, with one basis and one stretch: positions with like features have like colors.

    Args:
        maps: (C, h, w) each, finite, of one C.
        hide_background: Make the background white, and take the components of the rest alone. The first component of
            all positions is cut in two where both parts vary least (Otsu's threshold); the part that holds more of
            the maps' borders is the background.

    Returns:
        (h, w, 3) uint8 on the CPU for each map.

    Raises:
        ValueError: The maps have different numbers of channels.
    """
    if len({len(features) for features in maps}) > 1:
        raise ValueError(f"maps must have one number of channels, got {sorted({len(m) for m in maps})}")
    x = torch.cat([features.detach().cpu().double().flatten(1).T for features in maps])
    rgb = torch.full((len(x), 3), WHITE, dtype=torch.uint8)
    shown = _objects(x, maps) if hide_background else torch.ones(len(x), dtype=torch.bool)
    rgb[shown] = _colors(x[shown])
    parts = torch.split(rgb, [features[0].numel() for features in maps])
    return [part.reshape(*features.shape[1:], 3) for part, features in zip(parts, maps, strict=True)]


def _colors(x: Tensor) -> Tensor:
    """Positions (N, C) -> (N, 3) uint8."""
    rgb = torch.full((len(x), 3), 0.5)
    for i, component in enumerate(_components(x, 3)):
        if component.pow(3).sum() < 0:
            component = -component
        low, high = (component.kthvalue(k).values for k in _tails(len(x)))
        rgb[:, i] = ((component - low) / (high - low)).clamp(0, 1) if high > low else 0.5
    return (rgb * 255).round().byte()


def _components(x: Tensor, number: int) -> list[Tensor]:
    """Up to ``number`` principal components of positions (N, C), (N,) float32 each; fewer where there is no energy."""
    n, c = x.shape
    x = x - x.mean(0)
    wide = c > n
    energy, axes = torch.linalg.eigh(x @ x.T if wide else x.T @ x)  # of the smaller of the two: the same components
    found = []
    for i in range(min(number, len(energy))):
        if energy[-1 - i] <= 1e-12 * energy[-1]:
            break
        found.append((axes[:, -1 - i] if wide else x @ axes[:, -1 - i]).float())
    return found


def _tails(n: int) -> tuple[int, int]:
    """Ranks, from 1 to n, of the lowest and the highest value that does not saturate."""
    return 1 + int(PERCENTILE * n), n - int(PERCENTILE * n)


def _objects(x: Tensor, maps: Sequence[Tensor]) -> Tensor:
    """Which of the positions (N, C) are no background: all, where they are alike."""
    components = _components(x, 1)
    if not components:
        return torch.ones(len(x), dtype=torch.bool)
    above = components[0] > otsu(components[0])
    border = torch.cat([_border(*features.shape[1:]).flatten() for features in maps])
    return ~above if above[border].double().mean() > above.double().mean() else above


def otsu(values: Tensor) -> Tensor:
    """The value (N,) -> () up to which the lower of two parts goes, that vary least by themselves.

    N. Otsu, A Threshold Selection Method from Gray-Level Histograms, 1979; here without a histogram.
    """
    ordered = values.double().sort().values
    below = torch.arange(1, len(ordered), dtype=torch.float64)
    sums = ordered.cumsum(0)
    gap = sums[:-1] / below - (sums[-1] - sums[:-1]) / (len(ordered) - below)
    return ordered[(below * (len(ordered) - below) * gap.square()).argmax()].to(values)


def _border(height: int, width: int) -> Tensor:
    """(h, w), True along the four sides."""
    edge = torch.ones(height, width, dtype=torch.bool)
    edge[1:-1, 1:-1] = False
    return edge
