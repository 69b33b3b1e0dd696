"""A network on the ``meta`` device: built and run without memory or weights, to see what its modules give."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from diffusion_backbones.ops import safetensors_io
from diffusion_backbones.spec.activations import Port, Site


class Network(Protocol):
    """What is asked of an architecture here."""

    @property
    def size_divisibility(self) -> int: ...

    @property
    def latent_stride(self) -> int: ...

    @property
    def latent_channels(self) -> int: ...

    def build_denoiser(self) -> nn.Module: ...

    def truncate(self, denoiser: nn.Module, paths: list[str]) -> nn.Module: ...

    def blank_conditioning(self) -> dict[str, Tensor]: ...

    def image_token_slice(self, length: int, tokens: int, stride: int) -> Port | None: ...

    def call(
        self,
        denoiser: nn.Module,
        z: Tensor,
        timestep: Tensor,
        conditioning: Mapping[str, Tensor],
        size: tuple[int, int],
    ) -> Tensor: ...


def build(network: Network) -> nn.Module:
    """The stock, whole denoiser on ``meta``."""
    with safetensors_io.unfilled():
        return network.build_denoiser()


def run(
    network: Network,
    denoiser: nn.Module,
    size: tuple[int, int],
    conditioning: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """One pass of a ``meta`` denoiser on one image of ``size`` pixels (height, width, multiples of
    ``size_divisibility``).
    """
    stride, channels = network.latent_stride, network.latent_channels
    z = torch.empty(1, channels, size[0] // stride, size[1] // stride, device="meta")
    with torch.device("meta"):
        conditioning = conditioning or network.blank_conditioning()
        return network.call(denoiser, z, torch.zeros(1, dtype=torch.int64, device="meta"), conditioning, size)


def site(network: Network, path: str) -> Site:
    """The site of a module path that no activation id names.

    Raises:
        KeyError: The network has no such module.
        ValueError: What the module gives is neither a map nor image tokens.
    """
    denoiser = build(network)
    try:
        denoiser.get_submodule(path)
    except AttributeError as error:
        raise KeyError(f"the network has no module {path!r}: {error}") from None
    denoiser = network.truncate(denoiser, [path])
    outputs: list[Any] = []
    denoiser.get_submodule(path).register_forward_hook(functools.partial(_keep, outputs))
    d = network.size_divisibility
    size = (2 * d, 3 * d)  # not square, so that height and width cannot be confused
    with torch.no_grad():
        run(network, denoiser, size)
    found = _site(network, path, outputs[0], size) if outputs else None
    if found is None:
        raise ValueError(
            f"{path!r} gives no feature map (B, C, h, w) and no image tokens (B, h·w, C), so it cannot be an activation"
        )
    return found


def _keep(outputs: list[Any], _module: nn.Module, _args: Any, output: Any) -> None:
    outputs.append(output)


def _site(network: Network, path: str, output: Any, size: tuple[int, int]) -> Site | None:
    coarsest, several = network.size_divisibility, isinstance(output, (tuple, list))
    for i, x in enumerate(output if several else [output]):
        port = Port(index=i) if several else Port()
        for stride in (s for s in range(1, coarsest + 1) if coarsest % s == 0 and isinstance(x, Tensor)):
            grid = (size[0] // stride, size[1] // stride)
            if x.ndim == 4 and tuple(x.shape[-2:]) == grid:
                return Site(path, path, port, x.shape[1], stride, "map")
            rows = network.image_token_slice(x.shape[1], grid[0] * grid[1], stride) if x.ndim == 3 else None
            if rows is not None:
                return Site(path, path, port if rows.tokens == "all" else rows, x.shape[2], stride, "tokens")
    return None
