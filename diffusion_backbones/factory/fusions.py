"""From a name to a fusion: registered, ``a+b``, or a folder that ``save_pretrained`` wrote."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors.torch import load_file

from diffusion_backbones.backbone.contract import Backbone
from diffusion_backbones.backbone.fusion.module import FusedBackbone
from diffusion_backbones.backbone.fusion.saving import member_folder, own_tensors
from diffusion_backbones.backbone.fusion.timm_extractor import TimmExtractor, extractor
from diffusion_backbones.backbone.fusion.timm_networks import check_known
from diffusion_backbones.factory import random_weights
from diffusion_backbones.factory.options import FOREIGN_KEYWORDS, BuildOptions, as_device, as_dtype, check_strides
from diffusion_backbones.loading.saved_folder import CONFIG, WEIGHTS, FusionFoundError, SavedConfig
from diffusion_backbones.loading.source import Folder
from diffusion_backbones.spec import registry
from diffusion_backbones.spec.declaration import Declaration
from diffusion_backbones.spec.fusion import Fusion, Member, TimmModel
from diffusion_backbones.spec.input_format import SYMMETRIC, InputFormat, get_input_format
from diffusion_backbones.spec.validation import check_flag, closest

F = TypeVar("F", bound=Callable[..., Any])
SETTINGS = ("strides", "normalize", "weights", "components")
"""Of the fusion itself, in place of its own."""
REFUSED = ("recipe", "encoder_levels", "prompt_tokens", "pretrained_cfg_overlay")
"""Keywords of ``create_model`` that only one backbone can take."""
FOR_TIMM = ("cache_dir", "device", "dtype", "trainable")
"""Keywords of ``create_model`` that models of timm take too."""


def with_fusions(create: F) -> F:
    """Decorates ``create_model`` of one backbone, so that it builds fusions too."""

    @functools.wraps(create)
    def create_model(name: Any, pretrained: bool = False, **keywords: Any) -> Any:
        fusion = find(name) if isinstance(name, str) else None
        if fusion is not None:
            return build(create, fusion, pretrained, keywords)
        try:
            return create(name, pretrained, **keywords)
        except FusionFoundError as found:
            return load(create, found.folder, keywords)

    return cast(F, create_model)


def find(name: str) -> Fusion | None:
    """The fusion that a name stands for; None if it stands for something else.

    Raises:
        KeyError: A member is unknown; the closest are named.
    """
    if name in registry.list_fusions():
        return registry.get_fusion(name)
    parts = name.split("+")
    if ":" in name or len(parts) < 2:
        return None
    return Fusion(name, tuple(Member(declared(part)) for part in parts))


def declared(name: str) -> Declaration | TimmModel:
    """A member by its name: a registered backbone, or a model of timm.

    Raises:
        KeyError: It is neither; the closest are named.
    """
    if name in registry.list_fusions() or name in registry.list_checkpoints():
        kind = "fusion" if name in registry.list_fusions() else "checkpoint without a recipe"
        raise KeyError(f"{name!r} is a {kind}, and the members of a fusion are backbones, or models of timm")
    if registry.is_model(name):
        return registry.get_declaration(name)
    try:
        check_known(name)
    except KeyError as error:
        known = registry.list_models(include_tags=True)
        raise KeyError(
            f"{name!r} can be no member of a fusion: it is neither a backbone nor a model of timm."
            f"{closest(name, known) or error.args[0].partition('.')[2]}"
        ) from None
    return TimmModel(name)


def build(create: Callable[..., Any], fusion: Fusion, pretrained: bool, keywords: Mapping[str, Any]) -> FusedBackbone:
    """A fusion with its members built.

    Args:
        create: ``create_model`` of one backbone.
        fusion: What is built.
        pretrained: Whether the members' weights are downloaded.
        keywords: Of ``create_model``; those of the fusion are taken out, and the rest goes to every diffusion backbone.
    """
    keywords = {key: value for key, value in keywords.items() if value is not None}
    if refused := [key for key in REFUSED if keywords.get(key)]:
        raise TypeError(
            f"{fusion.name} is a fusion, and {refused[0]}= is for one backbone; build that with it, and fuse() it"
        )
    settings = {key: keywords.pop(key) for key in SETTINGS if key in keywords}
    fusion, paths = fusion.override(**settings), _paths(keywords.pop("checkpoint_path", None), fusion)

    def member(i: int, single: dict[str, Any]) -> Backbone:
        backbone = fusion.members[i].backbone
        return create_member(create, backbone, pretrained, paths.get(backbone.checkpoint_name), single)

    return _assembled(fusion, member, keywords)


def load(create: Callable[..., Any], folder: Folder, keywords: Mapping[str, Any]) -> FusedBackbone:
    """A fusion that ``save_pretrained`` wrote, here or on the hub.

    Raises:
        ValueError: The folder is not whole.
    """
    keywords = {key: value for key, value in keywords.items() if value is not None}
    if changed := [key for key in (*SETTINGS, *REFUSED, "checkpoint_path") if keywords.get(key)]:
        raise TypeError(f"a saved fusion keeps what it is, and {changed[0]}= would change it")
    for name in folder.names():
        folder.file(name)  # brings those of a repository here, side by side
    place, data = Path(folder.file(CONFIG)).parent, folder.json(CONFIG)
    try:
        fusion = Fusion.from_dict(data["fusion"])
        strides = data["out_strides"]
        given = InputFormat.from_dict(data["input_format"]) if "input_format" in data else SYMMETRIC
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder}: {CONFIG} is not what save_pretrained writes: {error}. Save the fusion again."
        ) from error

    def member(i: int, single: dict[str, Any]) -> Backbone:
        backbone = fusion.members[i].backbone
        if isinstance(backbone, TimmModel):
            return _of_timm(backbone, False, None, single)  # its weights are read with the fusion's own
        read: Backbone = create(f"local-dir:{place / member_folder(i)}", False, **single)
        return read

    kept = {"out_strides": strides, "input_format": given, **keywords}
    return _assembled(fusion, member, kept, place / WEIGHTS)


def described_fusion(
    data: Mapping[str, Any], build_member: Callable[[SavedConfig, bool], Backbone], trainable: bool
) -> FusedBackbone:
    """A fusion that :func:`~diffusion_backbones.backbone.fusion.saving.describe_whole` described, on torch's default
    device, in its default dtype: with random weights, or on ``meta`` without any.

    Args:
        data: What was described.
        build_member: From a diffusion backbone's config, and whether it is trained, to the backbone.
        trainable: Whether those members are trained that were.
    """
    fusion, device = Fusion.from_dict(data["fusion"]), torch.get_default_device()
    trained = [trainable and one for one in data.get("trainable", [True] * len(fusion.members))]
    members = [
        extractor(m.backbone, device=device, dtype=torch.get_default_dtype(), trainable=train)
        if isinstance(m.backbone, TimmModel)
        else build_member(SavedConfig(described, m.name), train)
        for m, described, train in zip(fusion.members, data["members"], trained, strict=True)
    ]
    given = InputFormat.from_dict(data["input_format"]) if "input_format" in data else SYMMETRIC
    return FusedBackbone(fusion, members, out_strides=check_strides(data["out_strides"]), input_format=given)


def create_member(
    create: Callable[..., Any], backbone: Declaration | TimmModel, pretrained: bool, path: Any, keywords: dict[str, Any]
) -> Backbone:
    """One member; ``keywords`` are those of ``create_model`` for every diffusion backbone."""
    if isinstance(backbone, TimmModel):
        built = _of_timm(backbone, pretrained and path is None, path, keywords)
        if not (pretrained or path or built.trainable) and built.device.type != "meta":
            random_weights.warn(backbone.name)
        return built
    known = registry.is_model(backbone.name) and registry.get_declaration(backbone.name) == backbone
    name, recipe = (backbone.name, {}) if known else (backbone.checkpoint.name, {"recipe": backbone.recipe})
    whole: Backbone = create(name, pretrained, checkpoint_path=path, **recipe, **keywords)
    return whole


def _of_timm(model: TimmModel, pretrained: bool, path: Any, keywords: Mapping[str, Any]) -> TimmExtractor:
    return extractor(
        model,
        pretrained,
        checkpoint_path=path,
        cache_dir=keywords.get("cache_dir"),
        device=as_device(keywords.get("device")),
        dtype=as_dtype(keywords.get("dtype")),
        trainable=keywords.get("trainable") is True,
    )


def check_taken(keywords: Mapping[str, Any], backbones: Sequence[Declaration | TimmModel], name: str) -> None:
    """Check that keywords of ``create_model`` have someone to take them; diffusion backbones check theirs themselves.

    Args:
        keywords: By name.
        backbones: The members that are built with them.
        name: Of the fusion, for errors.

    Raises:
        TypeError: One has nobody to take it.
        ValueError: A keyword of timm with a value that cannot be.
    """
    if any(isinstance(backbone, Declaration) for backbone in backbones):
        return
    takes = FOR_TIMM if backbones else ()
    usual = {option.name: option.default for option in fields(BuildOptions)}
    for key, value in keywords.items():
        if value is None or (key in takes and not (key == "trainable" and isinstance(value, str))):
            continue
        if key in FOREIGN_KEYWORDS:
            if reason := FOREIGN_KEYWORDS[key](value):
                raise ValueError(reason)
        elif key not in usual or value is not usual[key]:
            whose = "is built with it" if backbones else "is built here: all of them are given built"
            told = f" Models of timm take {', '.join(takes)}; trainable=True or False." if takes else ""
            raise TypeError(f"{key}={value!r} does nothing, since no diffusion backbone of {name} {whose}.{told}")


def _assembled(
    fusion: Fusion,
    member: Callable[[int, dict[str, Any]], Backbone],
    keywords: dict[str, Any],
    weights: Path | None = None,
) -> FusedBackbone:
    """The members that ``member`` builds, with the keywords that are theirs, as one."""
    keywords = dict(keywords)
    indices, strides = keywords.pop("out_indices", None), check_strides(keywords.pop("out_strides", None))
    given = get_input_format(keywords.pop("input_format", SYMMETRIC))
    visits = None
    if check_flag("in_turn", keywords.pop("in_turn", False)):
        visits = as_device(keywords.pop("device", None))
        keywords["device"] = "cpu" if visits.type != "meta" else visits
    check_taken(keywords, [m.backbone for m in fusion.members], fusion.name)
    members = [member(i, dict(keywords)) for i in range(len(fusion.members))]
    fused = FusedBackbone(fusion, members, out_strides=strides, input_format=given, visits=visits)
    if weights is not None:
        _fill(fused, weights)
    if indices is not None:
        fused.prune_intermediate_layers(indices)
    return fused


def _fill(fused: FusedBackbone, weights: Path) -> None:
    """Read what timm's members and the principal components hold.

    Raises:
        ValueError: The file lacks something, or holds something else.
    """
    own = own_tensors(fused)
    found = load_file(weights) if own and weights.is_file() else {}
    if wrong := sorted(own.keys() ^ found.keys()) or [n for n in own if own[n].shape != found[n].shape]:
        raise ValueError(
            f"{weights} is not what save_pretrained writes: {wrong[0]} is missing, unknown or of another shape"
        )
    if fused.members[0].device != torch.device("meta"):
        for name, tensor in own.items():
            tensor.copy_(found[name])  # of state_dict(), which shares memory with the fusion


def _paths(given: Any, fusion: Fusion) -> Mapping[str, Any]:
    """The weights of members, by the name of their checkpoint or of timm.

    Raises:
        KeyError: No member is called so.
        TypeError: It is one path, and does not say whose.
    """
    if given is None or given == "":
        return {}
    names = [member.backbone.checkpoint_name for member in fusion.members]
    if not isinstance(given, Mapping):
        shown = os.fspath(given) if isinstance(given, os.PathLike) else given
        raise TypeError(
            f"checkpoint_path of a fusion is a mapping of {', '.join(names)} to their weights, got {shown!r}"
        )
    if unknown := [key for key in given if key not in names]:
        raise KeyError(
            f"checkpoint_path: {fusion.name} has no member on {unknown[0]!r}.{closest(str(unknown[0]), names)} It has "
            f"{', '.join(names)}."
        )
    return given
