"""Which checkpoints and backbones exist, by name."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from diffusion_backbones.spec.checkpoint import Checkpoint
from diffusion_backbones.spec.declaration import Declaration, pretrained_cfg
from diffusion_backbones.spec.fusion import Fusion, fusion_cfg
from diffusion_backbones.spec.recipe import Recipe
from diffusion_backbones.spec.validation import closest

_checkpoints: dict[str, Checkpoint] = {}
_declarations: dict[str, Declaration] = {}
_fusions: dict[str, Fusion] = {}
_checks: list[Callable[[Declaration | Fusion], None]] = []
_listeners: list[Callable[[Declaration | Fusion], None]] = []


def register_checkpoint(checkpoint: Checkpoint) -> Checkpoint:
    """Make a checkpoint known by its name and return it.

    Raises:
        TypeError: It is no :class:`Checkpoint`.
        ValueError: The name is taken, or is not of lower-case letters, digits and underscores.
    """
    if not isinstance(checkpoint, Checkpoint):
        raise TypeError(f"a Checkpoint is registered, got {checkpoint!r}")
    _check_name(checkpoint.name, _checkpoints, _declarations)
    _checkpoints[checkpoint.name] = checkpoint
    return checkpoint


def register_model(
    checkpoint: Checkpoint | str, recipe: Recipe, *, name: str | None = None, tag: str = ""
) -> Declaration:
    """Declare a backbone. From then on it is in ``list_models``, ``create_model``, timm, the hub entries, the cards and
    the tests. What is refused is not registered.

    Args:
        checkpoint: A checkpoint or the name of a registered one.
        recipe: Which activations are read from it, and under which settings.
        name: Defaults to ``{checkpoint}_{recipe}``.
        tag: Names other weights for the same architecture and recipe: ``{name}.{tag}``.

    Raises:
        KeyError: There is no such checkpoint, or the network lacks an activation of the recipe.
        TypeError: The recipe is no :class:`Recipe`.
        ValueError: The name is taken, here or by a model of timm, or malformed; the recipe does not fit the network.
    """
    declaration = declare(checkpoint, recipe, name, tag)
    for check in _checks:
        check(declaration)
    _declarations[declaration.name] = declaration
    for listener in _listeners:
        listener(declaration)
    return declaration


def declare(checkpoint: Checkpoint | str, recipe: Recipe, name: str | None = None, tag: str = "") -> Declaration:
    """The declaration that :func:`register_model` registers, with the same arguments and errors."""
    if isinstance(checkpoint, str):
        checkpoint = get_checkpoint(checkpoint)
    if not isinstance(checkpoint, Checkpoint):
        raise TypeError(f"checkpoint must be a Checkpoint or the name of one, got {checkpoint!r}")
    if not isinstance(recipe, Recipe):
        raise TypeError(f"recipe must be a Recipe, such as Recipe('mine', levels=(...)), got {recipe!r}")
    name = name or f"{checkpoint.name}_{recipe.name}"
    _check_name(name, _declarations if not tag else (), _checkpoints, _fusions)
    if tag and not re.fullmatch(r"\w[\w-]*", str(tag)):
        raise ValueError(f"a tag is made of letters, digits, underscores and hyphens, got {tag!r}")
    full = f"{name}.{tag}" if tag else name
    if full in _declarations:
        raise ValueError(f"a backbone {full!r} is already registered")
    return Declaration(full, checkpoint, recipe)


def register_fusion(fusion: Fusion) -> Fusion:
    """Make a fusion known by its name and return it. From then on it is in ``list_fusions``, ``create_model``, timm,
    the hub entries and the cards.

    Raises:
        TypeError: It is no :class:`Fusion`.
        ValueError: The name is taken, here or by a model of timm, or is not of lower-case letters, digits and
            underscores; or a model of timm has no ``input_size``, which lists and cards state.
    """
    if not isinstance(fusion, Fusion):
        raise TypeError(f"a Fusion is registered, got {fusion!r:.80}")
    _check_name(fusion.name, _fusions, _declarations, _checkpoints)
    if unknown := [member.name for member in fusion.members if member.size is None]:
        raise ValueError(
            f"fusion {fusion.name!r}: the input size of {unknown[0]} is known once it is built, and lists and cards "
            f"state it; give Member(TimmModel({unknown[0]!r}), input_size=...)"
        )
    for check in _checks:
        check(fusion)
    _fusions[fusion.name] = fusion
    for listener in _listeners:
        listener(fusion)
    return fusion


def list_fusions(filter: str = "") -> list[str]:  # noqa: A002  (as in list_models)
    """Names of the registered fusions, in natural order."""
    return sorted((n for n in _fusions if not filter or fnmatch.fnmatchcase(n, filter)), key=_natural)


def get_fusion(name: str) -> Fusion:
    """A registered fusion.

    Raises:
        KeyError: Unknown; the message names the closest.
    """
    if name in _fusions:
        return _fusions[name]
    raise KeyError(f"no fusion is called {name!r}.{closest(name, _fusions)} `list_fusions()` lists them all.")


def _check_name(name: str, *taken: Iterable[str]) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"a name is made of lower-case letters, digits and underscores, got {name!r}")
    if any(name in names for names in taken):
        raise ValueError(f"{name!r} is already registered")


def before_register(check: Callable[[Declaration | Fusion], None]) -> None:
    """Call ``check`` for every declaration and fusion from now on, before it is registered; it raises what is wrong."""
    _checks.append(check)


def on_register(listener: Callable[[Declaration | Fusion], None]) -> None:
    """Call ``listener`` for every declaration and every fusion, those made so far included."""
    _listeners.append(listener)
    known: list[Declaration | Fusion] = [*_declarations.values(), *_fusions.values()]
    for declaration in known:
        listener(declaration)


def _natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def list_models(
    filter: str | Sequence[str] = "",  # noqa: A002  (timm's name)
    pretrained: bool = False,
    exclude_filters: str | Sequence[str] = "",
    include_tags: bool | None = None,
) -> list[str]:
    """Names of the registered backbones, in natural order.

    Args:
        filter: Shell-style pattern or patterns; empty means all.
        pretrained: Only backbones with weights to load, which all have; with tags unless ``include_tags`` is False.
        exclude_filters: Patterns to leave out.
        include_tags: Whether names with a tag are listed; by default only with ``pretrained``.

    Fusions are in :func:`list_fusions`.
    """
    include_tags = pretrained if include_tags is None else include_tags
    names = [d.name for d in _declarations.values() if (include_tags or not d.tag)]
    wanted, unwanted = ([p] if isinstance(p, str) else list(p) for p in (filter, exclude_filters))
    if any(wanted):
        names = [n for n in names if any(fnmatch.fnmatchcase(n, p) for p in wanted)]
    names = [n for n in names if not any(fnmatch.fnmatchcase(n, p) for p in unwanted)]
    return sorted(names, key=_natural)


def list_pretrained(
    filter: str | Sequence[str] = "",  # noqa: A002  (timm's name)
    exclude_filters: str | Sequence[str] = "",
) -> list[str]:
    """Names of the backbones that have trained weights, tags included."""
    return list_models(filter, pretrained=True, exclude_filters=exclude_filters)


def list_checkpoints(filter: str = "") -> list[str]:  # noqa: A002  (as in list_models)
    """Names of the registered checkpoints, with and without published recipes, in natural order."""
    return sorted((n for n in _checkpoints if not filter or fnmatch.fnmatchcase(n, filter)), key=_natural)


def is_model(name: str) -> bool:
    """Whether a backbone or a fusion of this name is registered."""
    return name in _declarations or name in _fusions


def get_declaration(name: str) -> Declaration:
    """The declaration of a backbone.

    Raises:
        KeyError: Unknown; the message names the closest backbones and what to do with a bare checkpoint.
    """
    if name in _declarations:
        return _declarations[name]
    if name in _fusions:
        raise KeyError(f"{name!r} is a fusion of several backbones, and one backbone is needed here.")
    if name in _checkpoints:
        known = [d.name for d in _declarations.values() if d.checkpoint.name == name]
        published = f" Published recipes: {', '.join(known)}." if known else " It has no published recipe."
        raise KeyError(
            f"{name!r} is a checkpoint, and a backbone needs a recipe too: create_model({name!r}, "
            f"recipe=[...]).{published}"
        )
    architecture, _, tag = name.partition(".")
    if tag and architecture in _declarations:
        tags = [d.tag for d in _declarations.values() if d.architecture == architecture and d.tag]
        raise KeyError(
            f"{architecture!r} has no weights tagged {tag!r}. It has: "
            f"{', '.join(tags) or 'no tags, only the default weights'}."
        )
    raise KeyError(
        f"no backbone is called {name!r}."
        f"{closest(name, [*_declarations, *_fusions, *_checkpoints])}{_on_the_hub(name)} "
        "`list_models()` lists them all, and `list_fusions()` fusions."
    )


def get_checkpoint(name: str) -> Checkpoint:
    """A registered checkpoint.

    Raises:
        KeyError: Unknown; the message names the closest.
    """
    if name in _checkpoints:
        return _checkpoints[name]
    raise KeyError(
        f"no checkpoint is called {name!r}.{closest(name, _checkpoints)}{_on_the_hub(name)} `list_checkpoints()` lists "
        "them all."
    )


def _on_the_hub(name: str) -> str:
    return f" For a repository on the hub use 'hf-hub:{name}'." if "/" in name else ""


def get_pretrained_cfg(name: str) -> dict[str, Any]:
    """timm's description of a backbone's or a fusion's input and weights, see :func:`pretrained_cfg`."""
    return fusion_cfg(_fusions[name]) if name in _fusions else pretrained_cfg(get_declaration(name))
