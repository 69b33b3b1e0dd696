"""From a name to what it stands for: a checkpoint, perhaps a recipe, and where the weights are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from diffusion_backbones.factory import tiny_encoder
from diffusion_backbones.factory.checkpoint_path import from_address, is_given, local_path, open_path
from diffusion_backbones.families import FAMILIES, Architecture, architecture, upstream
from diffusion_backbones.loading.hub import HubRepo, open_checkpoint
from diffusion_backbones.loading.saved_folder import SavedBackbone, is_saved
from diffusion_backbones.loading.source import Folder, Source
from diffusion_backbones.spec.checkpoint import Checkpoint, License
from diffusion_backbones.spec.configs import CONFIGS, Config, Configs, package_configs, packaged
from diffusion_backbones.spec.declaration import Declaration
from diffusion_backbones.spec.levels import group_by_stride
from diffusion_backbones.spec.recipe import Recipe
from diffusion_backbones.spec.registry import get_checkpoint, get_declaration, is_model


@dataclass(frozen=True)
class Resolved:
    """What a name stands for.

    Attributes:
        checkpoint: The network.
        declaration: The checkpoint with a recipe, if the name has one.
        source: Where weights and prompts are read; None for random weights.
        restored: A folder that ``save_pretrained`` wrote, in place of a source.
        encoder: The config of another image encoder.
    """

    checkpoint: Checkpoint
    declaration: Declaration | None = None
    source: Source | None = None
    restored: SavedBackbone | None = None
    encoder: Config | None = None

    @property
    def family(self) -> type[Architecture]:
        """The family of the checkpoint's network."""
        return FAMILIES[self.checkpoint.family]

    @property
    def has_weights(self) -> bool:
        """Whether there are weights to read."""
        return self.source is not None or self.restored is not None

    @property
    def provenance(self) -> dict[str, str]:
        """Where the weights come from, for the record."""
        place = self.restored or self.source
        return place.provenance if place else {}

    def configs(self) -> Configs:
        """The upstream configs of the network's components, those of files checked.

        Raises:
            ValueError: See :func:`diffusion_backbones.families.upstream.read`.
        """
        if self.restored:
            return self.restored.configs
        configs: Configs = package_configs(self.checkpoint)
        if self.source:
            configs = upstream.read(self.family, self.source.configs(self.family), str(self.source))
            tiny_encoder.check_unscaled(configs.get(self.family.encoder), str(self.source))
        return {**configs, self.family.encoder: self.encoder} if self.encoder else configs


def locate(
    name: str, has_recipe: bool, checkpoint_path: str | Path | None, pretrained: bool, cache_dir: str | Path | None
) -> Resolved:
    """What a name stands for; arguments and errors as for :func:`~diffusion_backbones.create_model`."""
    found = _by_name(name, has_recipe, cache_dir)
    if is_given(checkpoint_path):
        return _with_path(found, local_path(checkpoint_path), pretrained, cache_dir)
    if pretrained and not found.has_weights:
        return replace(found, source=_published(found.checkpoint, cache_dir))
    return found


def _by_name(name: str, has_recipe: bool, cache_dir: str | Path | None) -> Resolved:
    scheme, colon, place = name.partition(":")
    if colon:
        return _by_place(name, scheme, place, has_recipe, cache_dir)
    if not has_recipe:
        declaration = get_declaration(name)
        return Resolved(declaration.checkpoint, declaration)
    if is_model(name):
        checkpoint = get_declaration(name).checkpoint.name
        raise TypeError(f"{name!r} already has a recipe; use create_model({checkpoint!r}, recipe=...)")
    return Resolved(get_checkpoint(name))


def _by_place(name: str, scheme: str, place: str, has_recipe: bool, cache_dir: str | Path | None) -> Resolved:
    """``hf-hub:owner/repo`` or ``local-dir:folder``: a saved backbone, or a diffusers folder with a recipe."""
    if scheme not in ("hf-hub", "local-dir"):
        more = f". {from_address(name)}" if place.startswith("//") else ""
        raise ValueError(f"{name!r}: a place is written 'hf-hub:owner/repo' or 'local-dir:folder'{more}")
    repo, _, revision = place.partition("@")
    folder = Folder(place) if scheme == "local-dir" else HubRepo(repo, revision or "main", cache_dir)
    if is_saved(folder):
        if has_recipe:
            raise TypeError(f"{name} is a saved backbone with its own recipe; recipe= is for a diffusers folder")
        restored = SavedBackbone(folder)
        return Resolved(restored.declaration.checkpoint, restored.declaration, restored=restored)
    if not has_recipe:
        raise TypeError(
            f"{name} is not a saved backbone (its config.json would say so), so recipe= must say which activations to "
            "read"
        )
    return Resolved(_undeclared(folder), source=folder)


def _undeclared(folder: Folder) -> Checkpoint:
    """A checkpoint that nobody declared: what its own configs say, and an unknown licence."""
    kind = next((kind for kind, family in FAMILIES.items() if folder.holds(family)), None)
    if kind is None:
        wanted = ", ".join(dict.fromkeys(f"{family.denoiser}/config.json" for family in FAMILIES.values()))
        known = ", ".join(name for family in FAMILIES.values() for name in family.networks)
        raise FileNotFoundError(
            f"{folder} holds no denoiser that is known here ({wanted}, of one of {known}); is it a folder in the "
            "diffusers layout?"
        )
    network = FAMILIES[kind](upstream.read(FAMILIES[kind], folder.configs(FAMILIES[kind]), str(folder)))
    named = Path(folder.provenance.get("repo") or folder.path.resolve()).name.lower()
    return Checkpoint(
        name="my_" + re.sub(r"[^a-z0-9]+", "_", named).strip("_"),
        title=str(folder),
        hub_id=folder.provenance.get("repo", ""),
        license=License("other", name="unknown; see where the weights came from", verified=False),
        paper=None,
        input_size=network.native_size,
        family=kind,
        encoder_float16=not network.encoder_config.get("force_upcast", False),
    )


def _published(checkpoint: Checkpoint, cache_dir: str | Path | None) -> Source:
    if not checkpoint.hub_id:
        return Folder(CONFIGS / checkpoint.config_name)
    return open_checkpoint(checkpoint, cache_dir)


def _with_path(found: Resolved, path: Path, pretrained: bool, cache_dir: str | Path | None) -> Resolved:
    """The same with weights from a folder or a file; what they lack comes from what the name stands for, or from the
    hub if ``pretrained``.
    """
    checkpoint = found.checkpoint
    if found.restored:
        raise TypeError(
            f"{checkpoint.name} is loaded from a saved backbone, which brings its weights; "
            f"checkpoint_path={str(path)!r} would give others"
        )
    if path.is_dir() and is_saved(Folder(path)):
        return _with_saved(found, path)
    published = partial(_published, replace(checkpoint, denoiser=None), cache_dir) if pretrained else None
    return replace(found, source=open_path(path, checkpoint, found.source, published))


def _with_saved(found: Resolved, path: Path) -> Resolved:
    restored = SavedBackbone(Folder(path))
    if found.declaration and restored.declaration.recipe.digest != found.declaration.recipe.digest:
        raise ValueError(
            f"{path} was saved from {restored.declaration.name}, whose recipe differs from that of "
            f"{found.declaration.name}; use create_model('local-dir:{path}')"
        )
    return replace(found, declaration=restored.declaration, restored=restored)


def with_encoder(found: Resolved, encoder: str, pretrained: bool, cache_dir: str | Path | None) -> Resolved:
    """The same with the tiny encoder of its checkpoint in place of the checkpoint's own.

    Raises:
        FileNotFoundError: Its weights are on the hub, and ``pretrained`` does not allow to fetch them.
        TypeError: A saved backbone keeps its image encoder.
        ValueError: There is none, or it gives other latents.
    """
    if found.restored:
        raise TypeError(f"a saved backbone keeps its image encoder, and encoder={encoder!r} would change it")
    tiny, source = tiny_encoder.find(found.checkpoint, encoder), None
    if found.source:
        if tiny.file and not pretrained:
            raise FileNotFoundError(
                f"the tiny encoder of {found.checkpoint.name} is in {tiny.file.repo} on the hub; add pretrained=True "
                "to take it from there"
            )
        source = tiny_encoder.source(tiny, found.source, found.family, cache_dir)
    config = (source and source.config) or packaged(tiny)
    declared = architecture(found.checkpoint).image_encoder
    fitted = tiny_encoder.fitted(config, architecture(found.checkpoint, found.configs()), declared)
    checkpoint = replace(found.checkpoint, encoder_float16=True)  # it is the checkpoint's own encoder that overflows
    declaration = found.declaration and replace(found.declaration, checkpoint=checkpoint)
    return Resolved(checkpoint, declaration, source, encoder=fitted)


def declare(checkpoint: Checkpoint, configs: Configs, recipe: Any) -> Declaration:
    """A checkpoint with a recipe of the user's own: a :class:`Recipe`, a file, levels, or a flat list of ids, which are
    grouped by stride.

    Raises:
        KeyError: The network lacks an activation.
        TypeError: It is none of these.
    """
    if isinstance(recipe, (str, Path)):
        recipe = Recipe.from_file(recipe)
    elif not isinstance(recipe, Recipe):
        if not isinstance(recipe, Sequence) or not recipe:
            raise TypeError(
                f"recipe must be a Recipe, a YAML or JSON file, or a list of activation ids; got {recipe!r}"
            )
        if all(isinstance(name, str) for name in recipe):
            catalogue = architecture(checkpoint, configs).catalogue
            sites = [catalogue[name] for name in recipe]
            recipe = [[site.id for site in level] for level in group_by_stride(sites)]
        recipe = Recipe("custom", levels=tuple(recipe))
    return Declaration(f"{checkpoint.name}_{recipe.name}", checkpoint, recipe)
