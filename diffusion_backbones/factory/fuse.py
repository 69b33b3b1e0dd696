"""``fuse``: backbones, built or by name, become one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from diffusion_backbones.backbone.contract import Backbone
from diffusion_backbones.backbone.fusion.module import FusedBackbone
from diffusion_backbones.backbone.fusion.timm_extractor import TimmExtractor
from diffusion_backbones.factory.entry_points import create_model
from diffusion_backbones.factory.fusions import check_taken, create_member, declared
from diffusion_backbones.factory.options import as_device, check_strides
from diffusion_backbones.spec.declaration import Declaration
from diffusion_backbones.spec.fusion import Fusion, Member, TimmModel
from diffusion_backbones.spec.input_format import SYMMETRIC, InputFormat, get_input_format


def fuse(
    *members: str | nn.Module | Member | TimmModel,
    name: str | None = None,
    pretrained: bool = False,
    strides: Sequence[int] = (),
    normalize: str = "l2",
    weights: Sequence[float] | str = (),
    components: int | None = None,
    out_strides: Sequence[int] | None = None,
    input_format: str | InputFormat | None = None,
    in_turn: torch.device | str | None = None,
    **keywords: Any,
) -> FusedBackbone:
    """Read several backbones as one pyramid.

    Args:
        *members: At least two, each one that is built (by :func:`~diffusion_backbones.create_model`, or by timm's with
            ``features_only=True``), a name, or a :class:`Member` or :class:`TimmModel` that says more.
        name: Of the fusion; the members' names joined by ``+`` by default.
        pretrained: Whether the weights of members that are named are downloaded.
        strides, normalize, weights, components: As of a :class:`Fusion`.
        out_strides, input_format: As of :func:`~diffusion_backbones.create_model`.
        in_turn: A device that members visit one after another, coming from where they are; by default they stay.
        **keywords: Of :func:`~diffusion_backbones.create_model`, for members that are named.

    Raises:
        KeyError: An unknown member; the closest are named.
        TypeError: A member is something else; or a keyword that no member takes.
        ValueError: Fewer than two; strides that cannot meet; a model of timm that gives no feature maps; weights of
            another number than the members.
    """
    named = [found for found in map(_named, members) if found]
    check_taken({**keywords, "pretrained": pretrained or None} if not named else keywords, named, name or "the fusion")
    built = [_built(member, pretrained, keywords) for member in members]
    read = [
        member if isinstance(member, Member) else Member(backbone.declaration)
        for member, backbone in zip(members, built, strict=True)
    ]
    fusion = Fusion(
        name or "+".join(backbone.declaration.name for backbone in built),
        tuple(read),
        strides=tuple(strides),
        normalize=normalize,  # type: ignore[arg-type]  # it is checked
        weights=weights if isinstance(weights, str) else tuple(weights),
        components=components,
    )
    return FusedBackbone(
        fusion,
        built,
        out_strides=check_strides(out_strides),
        input_format=get_input_format(input_format or SYMMETRIC),
        visits=None if in_turn is None else as_device(in_turn),
    )


def _named(member: Any) -> Declaration | TimmModel | None:
    """What a member that is not built is built from."""
    if isinstance(member, nn.Module):
        return None
    if isinstance(member, str):
        return declared(member)
    backbone = member.backbone if isinstance(member, Member) else member
    if not isinstance(backbone, (Declaration, TimmModel)):
        raise TypeError(f"a member must be a backbone, its name, or a model of timm, got {member!r:.80}")
    return backbone


def _built(member: Any, pretrained: bool, keywords: dict[str, Any]) -> Backbone:
    if isinstance(member, FusedBackbone):
        raise TypeError(f"{member.declaration.name} is a fusion, and its members are backbones; fuse them all at once")
    if isinstance(member, Backbone):
        return member
    if isinstance(member, nn.Module):
        if not (hasattr(member, "feature_info") and hasattr(member, "pretrained_cfg")) or hasattr(
            member, "get_classifier"
        ):
            raise TypeError(
                f"a member must be a backbone, or a network of timm that was created with features_only=True, got "
                f"{type(member).__name__}"
            )
        cfg: Any = member.pretrained_cfg
        name = ".".join(filter(None, (cfg.get("architecture"), cfg.get("tag"))))
        model = TimmModel(name or type(member).__name__, out_indices=tuple(member.feature_info.out_indices))  # type: ignore
        return TimmExtractor(model, member, any(p.requires_grad for p in member.parameters()) and member.training)
    backbone = _named(member)
    assert backbone is not None
    return create_member(create_model, backbone, pretrained, None, dict(keywords))
