"""Networks of timm that give feature maps: how they are built, where their weights come from, what they must take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from diffusion_backbones.backbone.fusion.copies import without_values
from diffusion_backbones.backbone.state import compute_dtype
from diffusion_backbones.ops.safetensors_io import TensorFiles
from diffusion_backbones.spec.fusion import TimmModel
from diffusion_backbones.spec.validation import closest

FLEXIBLE: tuple[dict[str, Any], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})
"""How networks of timm are asked to take images of any size: those with positions, those with windows, all others."""
_FAILURES = (RuntimeError, AssertionError, AttributeError, TypeError, ValueError, NotImplementedError)
"""What networks raise that cannot be built, or cannot run, as they are asked to."""


def network(
    model: TimmModel,
    pretrained: bool = False,
    *,
    checkpoint_path: str | Path | None = None,
    cache_dir: str | Path | None = None,
    device: torch.device | None = None,
) -> tuple[Any, tuple[int, ...]]:
    """A network of timm, and which of its maps it gives; errors as for
    :func:`~diffusion_backbones.backbone.fusion.timm_extractor.extractor`.
    """
    import timm

    check_known(model.name)
    overlay = _weights(model.name, pretrained, checkpoint_path)
    try:
        net, flexible = _flexible(model.name)
        indices = model.out_indices or _deepest(net)
        keywords = {"features_only": True, "out_indices": indices, **flexible}
        with torch.device("meta"):
            net = timm.create_model(model.name, **keywords)
    except _FAILURES as error:
        raise ValueError(
            f"{model.name} of timm gives no feature maps with features_only=True, so it cannot be a member: "
            f"{_reason(error)}"
        ) from error
    if device is None or device.type != "meta":
        with torch.device(device or torch.get_default_device()), _whole(checkpoint_path) as check:
            net = timm.create_model(
                model.name,
                pretrained or bool(checkpoint_path),
                pretrained_cfg_overlay=overlay,
                cache_dir=cache_dir,
                **keywords,
            )
            check(timm.get_pretrained_cfg(model.name))
    return net, tuple(indices)


def check_known(name: str) -> None:
    """Raise ``KeyError`` unless timm has a model of this name, with or without a tag."""
    import timm

    if not timm.is_model(name):
        known = timm.list_models(include_tags=False)
        raise KeyError(f"no model of timm is called {name!r}.{closest(name.partition('.')[0], known)}")


def check_any_size(name: str, net: nn.Module, step: int) -> None:
    """Check that a network takes images of other sizes than its own, all multiples of ``step`` pixels.

    Raises:
        ValueError: It does not.
    """
    try:
        for size in ((step, 2 * step), (3 * step, step)):
            without_values(net)(torch.empty(1, 3, *size, device="meta", dtype=compute_dtype(net)))
    except _FAILURES as error:
        raise ValueError(
            f"{name} takes images of its own size alone, and members of a fusion take any; create it with "
            f"dynamic_img_size=True or strict_img_size=False, or read another ({_reason(error)})"
        ) from error


def _flexible(name: str) -> tuple[Any, dict[str, Any]]:
    """A network on ``meta`` that takes as many sizes as it can, and the keywords that make it so."""
    import timm

    for flexible in FLEXIBLE[:-1]:
        try:
            with torch.device("meta"):
                return timm.create_model(name, features_only=True, **flexible), flexible
        except TypeError:  # it takes no such keyword
            continue
    with torch.device("meta"):
        return timm.create_model(name, features_only=True), {}


def _deepest(net: Any) -> tuple[int, ...]:
    """The last map of every stride, fine to coarse."""
    last = {info["reduction"]: i for i, info in enumerate(net.feature_info.info)}
    return tuple(last[stride] for stride in sorted(last))


def _weights(name: str, pretrained: bool, path: str | Path | None) -> dict[str, Any]:
    """What timm's description of a network's weights is changed to, so that nothing is unpickled without limit.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is a pickle, or no whole file; or timm has no weights that it reads within limits.
    """
    import timm

    if path:
        if Path(path).suffix != ".safetensors":
            raise ValueError(
                f"{path}: only .safetensors is read, since a pickle can run code; convert the weights of {name}"
            )
        TensorFiles([Path(path)])
        return {"file": str(path), "custom_load": False}
    cfg = timm.get_pretrained_cfg(name)
    if not pretrained or cfg is None or cfg.custom_load:  # timm says itself that it has none; its own formats are npz
        return {}
    if cfg.url and not cfg.hf_hub_id:
        raise ValueError(
            f"timm has the weights of {name} only as a pickle, which can run code; convert {cfg.url} to .safetensors "
            "and give it as checkpoint_path="
        )
    return {"url": ""}  # which timm may prefer to the hub


@contextmanager
def _whole(path: str | Path | None) -> Iterator[Callable[[Any], None]]:
    """Within the ``with`` block networks are built from a file. What is given can then be called, with timm's
    description of the network, to check that the file held all of it: timm only logs what it lacks.

    Raises:
        ValueError: It held something else, or not all.
    """
    missing: set[str] = set()
    hooks: dict[nn.Module, Any] = {}

    def note(_module: nn.Module, keys: Any) -> None:
        missing.update(keys.missing_keys)

    def watch(module: nn.Module, _name: str, _child: nn.Module | None) -> None:
        if module not in hooks:
            hooks[module] = module.register_load_state_dict_post_hook(note)  # type: ignore[no-untyped-call]

    def check(cfg: Any) -> None:
        heads = cfg.classifier if cfg and cfg.classifier else ()
        heads = (heads,) if isinstance(heads, str) else tuple(heads)
        lacking = sorted(name for name in missing if name.rpartition(".")[0] not in heads)
        if path and lacking:
            raise ValueError(
                f"{path} lacks {lacking[0]}"
                + (f" and {len(lacking) - 1} more" if len(lacking) > 1 else "")
                + "; a file of weights holds the whole network, in the names of timm or of its authors"
            )

    watching = register_module_module_registration_hook(watch)
    try:
        yield check
    except RuntimeError as error:
        if not path:
            raise
        raise ValueError(f"{path} does not fit the network: {_reason(error)}") from error
    finally:
        watching.remove()
        for hook in hooks.values():
            hook.remove()


def _reason(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
