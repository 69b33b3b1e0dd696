"""What a gradient reaches in a cut network, which modules run, and what a run costs, all on the ``meta`` device."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from diffusion_backbones.families.base import TEXT
from diffusion_backbones.families.meta_trace import run
from diffusion_backbones.ops import safetensors_io
from diffusion_backbones.ops.known_shapes import KnownShapes
from diffusion_backbones.ops.recording import Recorder
from diffusion_backbones.surgery.plan import Plan


def unreached(plan: Plan) -> set[str]:
    """What no gradient of a plan's activations reaches, such as what the last block of its network does to the text.

    Returns:
        Names as in the backbone: ``denoiser.`` and a parameter, ``conditioning.`` and an embedding of the prompt.
    """
    network, sites, d = plan.architecture, plan.denoiser_sites, plan.architecture.size_divisibility
    with safetensors_io.unfilled():
        denoiser, conditioning = plan.denoiser(), network.blank_conditioning()
    recorder = Recorder(denoiser, sites)
    text = {f"conditioning.{name}": conditioning[name].requires_grad_() for name in TEXT if name in conditioning}
    with KnownShapes(), torch.enable_grad(), recorder.recording(sites) as acts:
        output = run(network, denoiser, (2 * d, 2 * d), conditioning)
    reached = _leaves(x for x in (output, *acts.values()) if x.requires_grad)
    reachable = {f"denoiser.{name}": parameter for name, parameter in denoiser.named_parameters()} | text
    return {name for name, tensor in reachable.items() if id(tensor) not in reached}


def _leaves(tensors: Iterable[Tensor]) -> set[int]:
    """Ids of the tensors that a gradient of some tensors reaches; none is computed, which takes as long as the run."""
    ahead: list[Any] = [get_gradient_edge(tensor).node for tensor in tensors]
    seen: set[Any] = set()
    while ahead:
        node = ahead.pop()
        if node not in seen:
            seen.add(node)
            ahead += [following for following, _ in node.next_functions if following is not None]
    return {id(node.variable) for node in seen if hasattr(node, "variable")}


def called(plan: Plan) -> set[str]:
    """Paths of the modules of a plan's network whose own forward runs.

    The weights of other modules are read directly by their parent, if at all.
    """
    d = plan.architecture.size_divisibility
    with safetensors_io.unfilled():
        denoiser = plan.denoiser()
    names: list[str] = []
    for name, module in denoiser.named_modules():
        module.register_forward_hook(functools.partial(_note, names, name))
    with KnownShapes(), torch.no_grad():
        run(plan.architecture, denoiser, (2 * d, 2 * d))
    return set(names)


def _note(names: list[str], name: str, *_: Any) -> None:
    names.append(name)


def gflops(function: Any, *args: Any) -> float:
    """Billions of floating-point operations of a call, two per multiply-add, as PyTorch's counter sees them."""
    from torch.utils.flop_counter import FlopCounterMode

    with KnownShapes(), FlopCounterMode(display=False) as counter:
        function(*args)
    return int(counter.get_total_flops()) / 1e9
