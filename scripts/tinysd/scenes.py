"""Scenes of one to six emoji, with a caption, the class and the instance of every pixel, and where each object went.

Places, sizes, rotations, overlaps, light and backgrounds are random; backgrounds are procedural, or one of four
photographs without restrictions that scikit-image carries, in random tints. Everything comes from one ``numpy``
generator, so a seed is a scene, and lengths are shares of the side, so a scene can be drawn at any size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import skimage.data
from PIL import Image
from scipy.ndimage import gaussian_filter, zoom
from sprites import CLASSES, SIDE, Sprites

BACKGROUND = 0
"""Class of what is no object; the classes of :data:`sprites.CLASSES` follow from 1."""
VISIBLE = 0.55
"""Share of an object's pixels that must stay visible under those in front of it."""


@dataclass(frozen=True)
class Placed:
    """An object in a scene: its sprite's index, and the (2, 3) map from sprite coordinates in [-1, 1] to pixels."""

    sprite: int
    to_scene: np.ndarray


@dataclass(frozen=True)
class Scene:
    """A scene of side S.

    Attributes:
        image: (S, S, 3) uint8.
        classes: (S, S) uint8, :data:`BACKGROUND` or 1 + the class's place in ``CLASSES``.
        instances: (S, S) uint8, 0 or 1 + the object's place in ``objects``.
        objects: From back to front.
        caption: What is in it, in words.
    """

    image: np.ndarray
    classes: np.ndarray
    instances: np.ndarray
    objects: list[Placed]
    caption: str


def draw(
    rng: np.random.Generator,
    sprites: Sprites,
    choice: Sequence[int],
    side: int,
    first: int | None = None,
    mirror: bool = True,
    large: bool = False,
) -> Scene:
    """A random scene.

    Args:
        rng: Where all chance comes from.
        sprites: The pictures.
        choice: Indices of the sprites that may be used; classes are drawn first, so all are as frequent.
        side: Width and height in pixels.
        first: Index of a sprite that must be in it, and is its first object.
        mirror: Whether objects may be mirrored.
        large: One object alone that takes most of the scene.
    """
    ground, canvas = _background(rng, side)
    classes, instances = np.zeros((2, side, side), np.uint8)
    tint = 1 + rng.normal(0, 0.07, 3)
    by_class: dict[str, list[int]] = {}
    for index in choice:
        by_class.setdefault(sprites.identities[sprites.identity[index]].cls, []).append(index)
    objects: list[Placed] = []
    wanted = 1 if large else int(rng.choice([1, 2, 3, 4, 5, 6], p=[0.2, 0.25, 0.2, 0.15, 0.1, 0.1]))
    for _ in range(4 * wanted):
        if len(objects) == wanted:
            break
        index = (
            first if first is not None and not objects else int(rng.choice(by_class[str(rng.choice(list(by_class)))]))
        )
        reach = (0.72, 0.62, 0.52, 0.45, 0.42, 0.4)[wanted - 1]
        size = side * (rng.uniform(0.7, 1.0) if large else rng.uniform(0.45 * reach, reach))
        angle = rng.normal(0, np.pi / 10)
        stretch = np.exp(rng.normal(0, 0.06, 2)) * (rng.choice([-1, 1]) if mirror else 1, 1)
        linear = (
            size / 2 * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ np.diag(stretch)
        )
        centre = rng.uniform(size * 0.42, side - size * 0.42, 2)
        placed = Placed(index, np.column_stack([linear, centre]))
        colour, alpha = _warp(sprites.images[index], placed.to_scene, side)
        covered = instances.copy()
        covered[alpha > 0.5] = len(objects) + 1
        if any(
            (covered == i + 1).sum() < VISIBLE * _area(sprites.images[o.sprite], o.to_scene)
            for i, o in enumerate([*objects, placed])
        ):
            continue
        shadow = gaussian_filter(np.roll(alpha, (round(side * 0.015),) * 2, (0, 1)), side * 0.02)
        canvas = canvas * (1 - 0.35 * rng.uniform() * shadow[..., None])
        colour = np.clip(colour * rng.uniform(0.85, 1.12), 0, 1)
        canvas = canvas * (1 - alpha[..., None]) + colour * alpha[..., None]
        instances = covered
        classes[alpha > 0.5] = 1 + list(CLASSES).index(sprites.identities[sprites.identity[index]].cls)
        objects.append(placed)
    slope = rng.normal(0, 0.12, 2)
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    lit = np.clip(canvas * tint * (1 + slope[0] * x + slope[1] * y)[..., None], 0, 1)
    return Scene(
        (lit * 255).round().astype(np.uint8), classes, instances, objects, _caption(rng, sprites, objects, ground)
    )


def _area(sprite: np.ndarray, to_scene: np.ndarray) -> float:
    return (sprite[..., 3] > 127).mean() * 4 * abs(np.linalg.det(to_scene[:, :2]))


def _warp(sprite: np.ndarray, to_scene: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Colour (S, S, 3) and opacity (S, S), both in [0, 1]."""
    linear = np.linalg.inv(to_scene[:, :2])
    offset = -linear @ to_scene[:, 2]
    to_pixels = SIDE / 2  # sprite coordinates -> sprite pixels
    rows = np.column_stack([linear, offset[:, None] + 1]) * to_pixels
    image = Image.fromarray(sprite)
    scale = np.sqrt(abs(np.linalg.det(to_scene[:, :2]))) * 2 / SIDE
    if scale < 0.6:  # reduce first: an affine transform does not average
        small = max(8, round(SIDE * scale * 1.2))
        rows *= small / SIDE
        image = image.resize((small, small), Image.Resampling.BOX)
    warped = (
        np.asarray(
            image.transform((side, side), Image.Transform.AFFINE, rows.flatten().tolist(), Image.Resampling.BILINEAR),
            np.float32,
        )
        / 255
    )
    return warped[..., :3], warped[..., 3]


PHOTOGRAPHS = {
    "bricks": skimage.data.brick,
    "grass": skimage.data.grass,
    "gravel": skimage.data.gravel,
    "stars": skimage.data.hubble_deep_field,
}
_PHOTOGRAPHS: dict[str, np.ndarray] = {}
COLOURS = {
    "red": (0.8, 0.25, 0.22),
    "orange": (0.9, 0.55, 0.25),
    "yellow": (0.92, 0.85, 0.45),
    "green": (0.4, 0.65, 0.35),
    "blue": (0.35, 0.55, 0.8),
    "purple": (0.55, 0.4, 0.7),
    "pink": (0.92, 0.68, 0.75),
    "brown": (0.5, 0.36, 0.27),
    "grey": (0.55, 0.55, 0.55),
    "white": (0.94, 0.94, 0.94),
    "black": (0.13, 0.13, 0.15),
}


def _background(rng: np.random.Generator, side: int) -> tuple[str, np.ndarray]:
    """Its words and its picture (S, S, 3) in [0, 1]."""
    name = str(rng.choice(list(COLOURS)))
    a, b = (
        np.clip(np.array(COLOURS[c]) + rng.normal(0, 0.06, 3), 0, 1) for c in (name, str(rng.choice(list(COLOURS))))
    )
    b = a + (b - a) * rng.uniform(0.2, 0.5)
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    angle = rng.uniform(0, 2 * np.pi)
    along = x * np.cos(angle) + y * np.sin(angle)
    kind = str(
        rng.choice(
            ["plain", "gradient", "cloudy", "striped", "dotted", *PHOTOGRAPHS],
            p=[0.2, 0.15, 0.15, 0.08, 0.07, 0.08, 0.11, 0.08, 0.08],
        )
    )
    if kind in PHOTOGRAPHS:
        if kind not in _PHOTOGRAPHS:
            _PHOTOGRAPHS[kind] = np.asarray(Image.fromarray(PHOTOGRAPHS[kind]()).convert("RGB"), np.float32) / 255
        photo = _PHOTOGRAPHS[kind]
        cut = int(rng.uniform(0.4, 0.9) * min(photo.shape[:2]))
        top, left = (int(rng.integers(0, n - cut)) for n in photo.shape[:2])
        crop = Image.fromarray((photo[top : top + cut, left : left + cut] * 255).astype(np.uint8)).resize(
            (side, side), Image.Resampling.BOX
        )
        picture = np.asarray(crop, np.float32) / 255 * (1 + rng.normal(0, 0.12, 3))
        if kind != "stars":
            picture = picture * (0.4 + a)
        return kind, picture
    if kind == "plain":
        mix = np.zeros_like(x)
    elif kind == "gradient":
        mix = (along + 1.4) / 2.8
    elif kind == "cloudy":
        mix = sum(zoom(rng.normal(0, 1, (n, n)), side / n, order=1)[:side, :side] * 1.5 / n for n in (4, 8, 16))
        mix = (mix - mix.min()) / np.ptp(mix)
    else:
        period = rng.uniform(0.15, 0.5)
        if kind == "striped":
            mix = (np.sin(2 * np.pi * along / period) > 0).astype(float)
        else:
            across = -x * np.sin(angle) + y * np.cos(angle)
            mix = (np.hypot((along / period) % 1 - 0.5, (across / period) % 1 - 0.5) < 0.28).astype(float)
    picture = a + (b - a) * mix[..., None] + rng.normal(0, rng.uniform(0, 0.015), (side, side, 1))
    return f"{name} {kind}".replace(" plain", "") + " background", picture


def _caption(rng: np.random.Generator, sprites: Sprites, objects: list[Placed], ground: str) -> str:
    """The objects from front to back, each by its name or, one time in four, by its class."""
    words = []
    for placed in reversed(objects):
        identity = sprites.identities[sprites.identity[placed.sprite]]
        word = identity.cls if rng.uniform() < 0.25 else identity.name
        words.append(f"{'an' if word[0] in 'aeiou' else 'a'} {word}")
    listed = words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
    return f"{listed} on {'a ' if ground.endswith('background') else ''}{ground}"
