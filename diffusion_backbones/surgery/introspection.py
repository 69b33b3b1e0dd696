"""What a stock module path gives, and what running a network costs, found on the ``meta`` device: no memory, no
weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_backbones.families import FAMILIES
from diffusion_backbones.families.base import TEXT
from diffusion_backbones.ops import recording
from diffusion_backbones.spec.activations import Site
from diffusion_backbones.spec.configs import Configs


def build(family: str, configs: Configs) -> nn.Module:
    """The stock, whole denoiser on ``meta``."""
    with torch.device("meta"):
        return FAMILIES[family].build_denoiser(configs[FAMILIES[family].denoiser])


def run(
    family: str,
    configs: Configs,
    denoiser: nn.Module,
    size: tuple[int, int],
    conditioning: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """One pass of a ``meta`` denoiser on one image of ``size`` pixels (height, width, multiples of
    ``size_divisibility``).
    """
    kind = FAMILIES[family]
    stride = kind.latent_stride(configs)
    z = torch.empty(1, kind.latent_channels(configs), size[0] // stride, size[1] // stride, device="meta")
    with torch.device("meta"):
        conditioning = conditioning or kind.blank_conditioning(configs)
        return kind.call(denoiser, z, torch.zeros(1, dtype=torch.int64, device="meta"), conditioning, size)


def unreached(family: str, configs: Configs, sites: Sequence[Site]) -> set[str]:
    """What no gradient of a cut network's activations reaches, such as what its last block does to the text.

    Returns:
        Names as in the backbone: ``denoiser.`` and a parameter, ``conditioning.`` and an embedding of the prompt.
    """
    kind = FAMILIES[family]
    denoiser = kind.truncate(build(family, configs), [path for site in sites for path in site.modules])
    recorder, d = recording.Recorder(denoiser, sites), kind.size_divisibility(configs)
    with torch.device("meta"):
        conditioning = kind.blank_conditioning(configs)
    text = {f"conditioning.{name}": conditioning[name].requires_grad_() for name in TEXT if name in conditioning}
    with torch.enable_grad(), recorder.recording(sites) as acts:
        output = run(family, configs, denoiser, (2 * d, 2 * d), conditioning)
    torch.autograd.backward([x.float().sum() for x in (output, *acts.values()) if x.requires_grad])
    reachable = {f"denoiser.{name}": parameter for name, parameter in denoiser.named_parameters()} | text
    return {name for name, tensor in reachable.items() if tensor.grad is None}


def called(family: str, configs: Configs, paths: list[str]) -> set[str]:
    """The modules of a network cut behind ``paths`` that run as such. Of others a parent reads the weights, if anything
    does.
    """
    denoiser, d = FAMILIES[family].truncate(build(family, configs), paths), FAMILIES[family].size_divisibility(configs)
    names: list[str] = []
    for name, module in denoiser.named_modules():
        module.register_forward_hook(functools.partial(_note, names, name))
    with torch.no_grad():
        run(family, configs, denoiser, (2 * d, 2 * d))
    return set(names)


def _note(names: list[str], name: str, module: nn.Module, args: Any, output: Any) -> None:
    names.append(name)


def site(family: str, configs: Configs, path: str) -> Site:
    """The site of a module path that no activation id names.

    Raises:
        KeyError: The network has no such module.
        ValueError: What the module gives is neither a map nor image tokens.
    """
    denoiser = build(family, configs)
    try:
        denoiser.get_submodule(path)
    except AttributeError as error:
        raise KeyError(f"the network has no module {path!r}: {error}") from None
    denoiser = FAMILIES[family].truncate(denoiser, [path])
    module = denoiser.get_submodule(path)
    outputs: list[Any] = []
    module.register_forward_hook(functools.partial(_keep, outputs))
    d = FAMILIES[family].size_divisibility(configs)
    size = (2 * d, 3 * d)  # not square, so that height and width cannot be confused
    with torch.no_grad():
        run(family, configs, denoiser, size)
    found = (
        _site(path, outputs[0], size, d, functools.partial(FAMILIES[family].image_rows, configs)) if outputs else None
    )
    if found is None:
        raise ValueError(
            f"{path!r} gives no feature map (B, C, h, w) and no image tokens (B, h·w, C), so it cannot be an activation"
        )
    return found


def _keep(outputs: list[Any], module: nn.Module, args: Any, output: Any) -> None:
    outputs.append(output)


def _site(
    path: str, output: Any, size: tuple[int, int], coarsest: int, image_rows: Callable[[int, int, int], str | None]
) -> Site | None:
    several = isinstance(output, (tuple, list))
    for i, x in enumerate(output if several else [output]):
        port = f"out[{i}]" if several else "out"
        for stride in (s for s in range(1, coarsest + 1) if coarsest % s == 0 and isinstance(x, Tensor)):
            grid = (size[0] // stride, size[1] // stride)
            if x.ndim == 4 and tuple(x.shape[-2:]) == grid:
                return Site(path, path, port, x.shape[1], stride, "map")
            rows = image_rows(x.shape[1], grid[0] * grid[1], stride) if x.ndim == 3 else None
            if rows is not None:
                return Site(path, path, f"out{rows}" if rows else port, x.shape[2], stride, "tokens")
    return None


def gflops(function: Any, *args: Any) -> float:
    """Billions of floating-point operations of a call, two per multiply-add, as PyTorch's counter sees them."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        function(*args)
    return int(counter.get_total_flops()) / 1e9
