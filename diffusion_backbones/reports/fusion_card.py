"""The card of a fusion, written from its declaration alone. Nothing here needs torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from diffusion_backbones.reports import markdown
from diffusion_backbones.reports.facts import cite
from diffusion_backbones.reports.markdown import WEB, link
from diffusion_backbones.spec.declaration import Declaration
from diffusion_backbones.spec.fused_levels import FusedLevel
from diffusion_backbones.spec.fusion import CONFIDENCE, Fusion, Member

FOLDER = 'db.create_model("local-dir:FOLDER")     # or "hf-hub:OWNER/REPOSITORY"'


def card(fusion: Fusion, levels: Sequence[FusedLevel], saved: bool = False) -> str:
    """A fusion's card: YAML front matter that the Hugging Face hub reads, then Markdown.

    Args:
        fusion: Registered or not, with the input sizes of its members.
        levels: Its levels.
        saved: Whether it is for a folder that ``save_pretrained`` wrote, which the usage then loads.
    """
    load = FOLDER if saved else f'db.create_model("{fusion.name}", pretrained=True)     # frozen, in eval mode'
    return markdown.render(
        "fusion.md.j2",
        fusion=fusion,
        front_matter=markdown.front_matter(_metadata(fusion)),
        summary=summary(fusion, levels),
        members=[_member(fusion, i) for i in range(len(fusion.members))],
        levels=_rows(fusion, levels),
        details=details(fusion),
        load=load,
        shapes=[(1, level.channels, *[-(-fusion.input_size // level.stride)] * 2) for level in levels],
        fitted=bool(fusion.components or any(member.components for member in fusion.members)),
        licenses=[_license(fusion, name) for name in fusion.licenses],
        unverified=_unverified(fusion),
    )


def summary(fusion: Fusion, levels: Sequence[FusedLevel]) -> str:
    """One sentence."""
    paper = f", as {link(cite(fusion.paper), fusion.paper.link)} read them" if fusion.paper else ""
    names = " and ".join(member.backbone.title or member.name for member in fusion.members)
    maps = " · ".join(f"{level.channels}@{level.stride}" for level in levels)
    return f"{names} as one backbone{paper}: an image in, one pyramid out ({maps}, channels at stride)."


def details(fusion: Fusion) -> list[tuple[str, str]]:
    """How the members become one, in words."""
    side = fusion.input_size
    weights = (
        "of every position, by how clearly it is found in another image (`against=`)"
        if fusion.weights == CONFIDENCE
        else ", ".join(f"{weight:g}" for weight in fusion.weights)
    )
    normalized = (
        "what a member gives at a position of one stride has the length 1" if fusion.normalize == "l2" else "none"
    )
    reduced = (
        f"{fusion.components} principal components of every stride, fitted with `fit(images)`"
        if fusion.components
        else ""
    )
    rows = [
        ("Input", f"(B, 3, H, W), RGB in [-1, 1], any height and width; {side} × {side} in `pretrained_cfg`"),
        ("Normalization", normalized),
        ("Weights", weights),
        ("Afterwards", reduced),
        ("Source", fusion.source),
    ]
    return [row for row in rows if row[1]]


def facts(fusion: Fusion, levels: Sequence[FusedLevel]) -> dict[str, Any]:
    """The JSON of ``info``."""
    return {**fusion.described(), "input_size": fusion.input_size, "levels": [_as_dict(fusion, lv) for lv in levels]}


def _as_dict(fusion: Fusion, level: FusedLevel) -> dict[str, Any]:
    sources = [
        {"member": fusion.members[s.member].name, "map": s.position, "channels": s.reduced} for s in level.sources
    ]
    return {"channels": level.channels, "stride": level.stride, "sources": sources}


def about(fusion: Fusion, levels: Sequence[FusedLevel]) -> Iterator[tuple[str, str]]:
    """The lines of ``info``: (heading, text); the heading is empty where the line before goes on."""
    yield "fusion", f"{fusion.name}: {fusion.title or ' + '.join(m.name for m in fusion.members)}"
    several: list[tuple[str, list[str]]] = [
        ("members", [f"{m.name}, {m.size} x {m.size}" for m in fusion.members]),
        ("levels", [f"{row[0]}: {row[2]} @ {row[1]:4} {row[3].replace('`', '')}" for row in _rows(fusion, levels)]),
    ]
    several += [(heading.lower(), [text.replace("`", "")]) for heading, text in details(fusion)]
    several += [
        ("licences", [f"{name}: {' '.join(filter(None, (str(t), t.link)))}" for name, t in fusion.licenses.items()]),
        ("notes", list(fusion.notes)),
        ("unverified", _unverified(fusion)),
    ]
    for heading, texts in several:
        for i, text in enumerate(texts):
            yield "" if i else f"{heading[:11]}", text


def entry_help(fusion: Fusion) -> str:
    """The text that ``torch.hub.help`` prints."""
    return (
        f"{fusion.title}: {' and '.join(m.backbone.title for m in fusion.members)} as one backbone.\n\n"
        "Arguments are those of diffusion_backbones.create_model, except that pretrained is True unless it is given.\n"
    )


def _rows(fusion: Fusion, levels: Sequence[FusedLevel]) -> list[list[str]]:
    return [_level(fusion, i, level) for i, level in enumerate(levels)]


def _member(fusion: Fusion, i: int) -> list[str]:
    member: Member = fusion.members[i]
    backbone = member.backbone
    maps = "all" if member.maps is None else ", ".join(map(str, member.maps))
    what = f"recipe `{backbone.recipe.name}`" if isinstance(backbone, Declaration) else "timm"
    reduced = str(member.components) if member.components else ""
    return [f"`{member.name}`", backbone.title, what, f"{member.size} × {member.size}", maps, reduced]


def _level(fusion: Fusion, i: int, level: FusedLevel) -> list[str]:
    parts = [f"map {s.position} of `{fusion.members[s.member].name}`: {s.reduced}" for s in level.sources]
    return [str(i), str(level.stride), str(level.channels), ", ".join(parts)]


def _license(fusion: Fusion, name: str) -> str:
    found = fusion.licenses[name]
    unconfirmed = "" if found.verified else ", which no source at hand confirms"
    return f"`{name}`: {link(str(found), found.link)}{unconfirmed}"


def _unverified(fusion: Fusion) -> list[str]:
    found = list(fusion.unverified)
    for declaration in fusion.diffusion:
        found += [*declaration.checkpoint.unverified, *declaration.recipe.unverified]
    return list(dict.fromkeys(found))


def _metadata(fusion: Fusion) -> dict[str, Any]:
    """The front matter: no licence covers all members unless they share one, so it names them all."""
    shared = {found.id for found in fusion.licenses.values()}
    single = next(iter(fusion.licenses.values())) if len(shared) == 1 and "other" not in shared else None
    names = "-and-".join(dict.fromkeys(map(str, fusion.licenses.values())))
    links = [found.link for found in fusion.licenses.values() if re.fullmatch(WEB, found.link)]
    bases = [d.checkpoint.hub_id for d in fusion.diffusion if d.checkpoint.hub_id]
    found = {
        "library_name": "diffusion_backbones",
        "pipeline_tag": "image-feature-extraction",
        "license": single.id if single else "other",
        "license_name": None if single else re.sub(r"[^a-z0-9.-]+", "-", names.lower()).strip("-"),
        "license_link": None if single or not links else links[0],
        "base_model": list(dict.fromkeys(bases)) or None,
        "tags": ["image-feature-extraction", "diffusion", "feature-pyramid", "fusion"],
    }
    return {key: value for key, value in found.items() if value is not None}
