"""All that the features of an image depend on beside the image."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_backbones.ops.describe import dtype_name
from diffusion_backbones.ops.image_decoding import check_regular

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffusion_backbones.backbone.contract import Backbone

DIGITS = 24
"""Hexadecimal digits that name weights and images."""
OF_NO_EFFECT = ("_diffusers_version", "_name_or_path")
"""Keys of configs that say where they come from."""
FOLLOWS_FROM = {
    "weights_digest": {"backbone", "prompt", "recipe_digest", "computed", "options"},
    "configs_digest": {"backbone"},
    "recipe_digest": {"backbone", "prompt", "timestep"},
    "activations": {"backbone", "levels"},
    "strides": {"backbone", "levels"},
}
"""A setting -> those whose change changes it too, so that an error need not name both."""


@dataclass(frozen=True)
class Settings:
    """All that the features of an image depend on. The features in one folder have the same settings.

    Args:
        backbone: Name of the backbone, without tag.
        tag: Tag of its weights, or empty.
        weights_digest: Names the weights by their content, wherever they came from: denoiser, image encoder, embedded
            prompt and fixed noise, as the backbone has them in memory.
        configs_digest: Names the configs of its components, such as the noise schedule.
        recipe_digest: Digest of the recipe, which includes prompt, timestep and noise.
        prompt, timestep: The recipe's, repeated so that an error can name the difference.
        levels: Names of the tensors, fine to coarse.
        activations: The activation ids of each.
        strides: The stride of each, in pixels.
        size: Side in pixels of the squares that images are resized and cropped to, or None for their own size.
        dtype: Dtype of the tensors, such as ``float16``.
        computed: Dtypes that the denoiser and the image encoder compute in.
        options: Settings of ``create_model`` that change the last digits at least: ``weight_dtype``, ``fold``,
            ``compile``.
    """

    backbone: str
    tag: str
    weights_digest: str
    configs_digest: str
    recipe_digest: str
    prompt: str
    timestep: float
    levels: tuple[str, ...]
    activations: tuple[tuple[str, ...], ...]
    strides: tuple[int, ...]
    size: int | None
    dtype: str
    computed: tuple[str, str]
    options: Mapping[str, Any]

    @classmethod
    def of(cls, backbone: Backbone, names: Sequence[str] | None, size: int | None, dtype: torch.dtype) -> Settings:
        """The settings of an extraction; arguments as for :func:`~diffusion_backbones.extraction.extract`."""
        declaration, maps = backbone.declaration, backbone.out_maps
        return cls(
            backbone=declaration.architecture,
            tag=declaration.tag,
            weights_digest=weights_digest(backbone),
            configs_digest=_configs_digest(backbone.configs),
            recipe_digest=declaration.digest,
            prompt=declaration.prompt,
            timestep=declaration.timestep,
            levels=tuple(names or (f"level{i}" for i in range(len(maps)))),
            activations=tuple(backbone.activations),
            strides=tuple(m.stride for m in maps),
            size=size,
            dtype=dtype_name(dtype),
            computed=(dtype_name(backbone.dtype), dtype_name(backbone.encoder_dtype)),
            options=backbone.options,
        )

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits, which every file with these settings carries."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    def as_json(self) -> dict[str, Any]:
        """The settings as JSON holds them, with lists for tuples."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return found

    def differences(self, before: Mapping[str, Any]) -> list[str]:
        """In words, how the settings in a manifest differ from these."""
        now = self.as_json()
        changed = [key for key in now if key not in before or before[key] != now[key]]
        changed = [key for key in changed if not FOLLOWS_FROM.get(key, set()) & {*changed}]
        return [
            f"{key} was {_say(before[key]) if key in before else 'not recorded'} and is {_say(now[key])}"
            for key in changed
        ]


def _say(value: Any) -> str:
    return "the images' own" if value is None else json.dumps(value)


def image_digest(path: Path) -> str:
    """Names an image by the content of its file.

    Raises:
        OSError: The file cannot be read, or is none.
    """
    check_regular(path)
    found = hashlib.blake2b(digest_size=DIGITS // 2)
    with path.open("rb") as file:
        while block := file.read(2**20):
            found.update(block)
    return found.hexdigest()


def weights_digest(backbone: Backbone) -> str:
    """Names everything that a backbone holds by its content: names, dtypes, shapes and values."""
    import torch

    found = hashlib.blake2b(digest_size=DIGITS // 2)
    for name, tensor in sorted(backbone.state_dict().items()):
        for part in _plain(tensor):
            found.update(f"{name} {part.dtype} {tuple(part.shape)}".encode())
            found.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that one of another class, such as weights in eight bits, consists of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _plain(getattr(tensor, name))


def _configs_digest(configs: Mapping[str, Any]) -> str:
    def kept(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: kept(part) for key, part in value.items() if key not in OF_NO_EFFECT}
        return value

    text = json.dumps(kept(configs), sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=DIGITS // 2).hexdigest()
