"""``create_model``: a name, or a place, becomes a backbone."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffusion_backbones.backbone.module import DiffusionBackbone
from diffusion_backbones.factory import tiny_encoder
from diffusion_backbones.factory.save_pretrained import Described, Saved, is_saved
from diffusion_backbones.families import FAMILIES, Family
from diffusion_backbones.loading.hub import HubRepo, open_checkpoint
from diffusion_backbones.loading.prompts import Prompter
from diffusion_backbones.loading.single_file import SingleFile, is_single_file
from diffusion_backbones.loading.source import Folder, Source, WithComponent
from diffusion_backbones.ops import postprocessing, quantization, safetensors_io
from diffusion_backbones.spec.activations import Catalogue
from diffusion_backbones.spec.checkpoint import Checkpoint, License
from diffusion_backbones.spec.configs import CONFIGS, Config, Configs, left_out, package_configs, packaged
from diffusion_backbones.spec.declaration import Declaration
from diffusion_backbones.spec.input_format import SYMMETRIC, InputFormat, get_input_format
from diffusion_backbones.spec.levels import fine, group_by_stride, make_levels, take
from diffusion_backbones.spec.recipe import Recipe
from diffusion_backbones.spec.registry import get_checkpoint, get_declaration, is_model
from diffusion_backbones.spec.validation import check_count, closest
from diffusion_backbones.surgery import compilation, constant_folding, introspection, memory_budget
from diffusion_backbones.surgery.trainable import RANK, check_prompt, check_trainable, first_tokens

OVERRIDES = ("timestep", "noise", "ensemble", "seed", "prompt", "prompt_padding", "scaled")
FOREIGN: dict[str, Callable[[Any], str]] = {
    "num_classes": lambda n: "" if n == 0 else f"a backbone has no classifier, so num_classes must be 0, got {n}",
    "in_chans": lambda n: "" if n == 3 else f"the image encoder takes RGB, so in_chans must be 3, got {n}",
    "global_pool": lambda p: (
        "" if p == "" else f"a backbone returns maps and pools nothing, so global_pool must be '', got {p!r}"
    ),
    "img_size": lambda _: "",  # any size is accepted as it is
    "pretrained_cfg": lambda _: "",  # the declaration says it
    "features_only": lambda f: "" if f else "features_only=False asks for a classifier, and a backbone has none",
    "output_stride": lambda s: (
        ""
        if s == 32
        else f"output_stride={s} dilates a classifier's network; here out_strides=(...) resamples the pyramid"
    ),
    "feature_cls": lambda c: f"feature_cls={c!r} chooses among timm's wrappers, and this backbone needs none",
}


def create_model(
    name: str,
    pretrained: bool = False,
    *,
    checkpoint_path: str | Path | None = None,
    cache_dir: str | Path | None = None,
    recipe: Recipe | str | Path | Sequence[str] | None = None,
    out_indices: int | Sequence[int] | None = None,
    out_strides: Sequence[int] | None = None,
    dtype: torch.dtype | str | None = None,
    weight_dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    trainable: bool | str = False,
    lora_rank: int | None = None,
    prompt_tokens: int | None = None,
    input_format: str | InputFormat | None = None,
    encoder_levels: bool = False,
    chunk: int | None = None,
    fold: bool = False,
    encoder: str | None = None,
    compile: bool | str = False,
    features_only: bool = True,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    **overrides: Any,
) -> DiffusionBackbone:
    """Build a backbone: frozen, in eval mode, deterministic.

    Args:
        name: A registered backbone (``sd15_gdf``), a checkpoint (``sd15``) together with ``recipe=``,
            ``hf-hub:owner/repo``, or ``local-dir:folder``. The last two read a folder that ``save_pretrained`` wrote,
            or a diffusers folder with ``recipe=``.
        pretrained: Download what the backbone needs from the hub. Without it the weights are random and nothing is
            fetched.
        checkpoint_path: A diffusers folder, a folder that ``save_pretrained`` wrote, or one ``.safetensors`` file: a
            whole checkpoint in the original layout, or a denoiser alone, which takes the rest from the hub if
            ``pretrained``.
        cache_dir: huggingface_hub's cache folder.
        recipe: A :class:`Recipe`, a YAML or JSON file, or a list of activation ids, which are grouped by stride and
            read at timestep 50 unless ``timestep=`` says otherwise.
        out_indices: Which levels; an integer n means the last n. Fewer levels are a shorter network.
        out_strides: Resample to these strides, without parameters, e.g. ``(4, 8, 16, 32)``; of the levels the nearest
            is taken.
        dtype: Of weights and maps, ``torch.float32`` by default. An image encoder that overflows in float16 stays in
            float32.
        weight_dtype: ``"int8"`` keeps the weights of the denoiser's linear and convolutional layers in eight bits,
            rounded as they are read, and computes in ``dtype``; needs torchao. For what does not fit otherwise: it is
            slower, and changes the features. See docs/memory.md.
        device: Where; ``"meta"`` builds without memory.
        trainable: What is trained: nothing by default; True for the denoiser; ``"lora"`` for adapters in its attention,
            which needs peft; ``"prompt"`` for the embedded prompt.
        lora_rank: Of the adapters, 8 by default.
        prompt_tokens: How many tokens are learned, the first of the recipe's prompt; all by default.
        input_format: What images were made of pixels: ``"symmetric"`` [-1, 1], the default, ``"unit"`` [0, 1],
            ``"uint8"`` 0 to 255, ``"imagenet"`` ImageNet's mean and deviation, ``"detectron2-bgr"`` detectron2's
            default, or an ``InputFormat`` of your own. For frameworks that normalise by themselves.
        encoder_levels: Take those of ``out_strides`` that are finer than the recipe's levels from the image encoder,
            which computes such maps anyway, and not by upsampling.
        chunk: How many noisy latents, draws times images, the denoiser is run on at once unless a call says otherwise;
            all by default.
        fold: Keep the values of what depends on the prompt and the timestep alone, and drop its weights. The features
            stay the same; calls can no longer change prompt or timestep. Weights are folded on the CPU, so that
            ``device`` never holds what is dropped.
        encoder: ``"tiny"`` takes, in place of the checkpoint's image encoder, one that was distilled from it, where one
            is declared: about a ninth of its operations, and other features. ``diffusion-backbones compare`` measures
            how far they are from the exact ones.
        compile: Compile the image encoder and the denoiser when they are first called, which takes a minute or several
            and changes no feature. ``"freeze"`` makes constants of the weights, which on a CPU is faster still and
            holds for one batch and size; other strings are modes of ``torch.compile``, such as ``"reduce-overhead"``
            for CUDA graphs. Nothing is compiled on ``meta``.
        features_only: Accepted for timm; True is the only mode.
        pretrained_cfg_overlay: timm's; ``file`` is taken as ``checkpoint_path``.
        **overrides: ``timestep``, ``noise``, ``ensemble``, ``seed``, ``prompt``, ``prompt_padding``, ``scaled`` replace
            the recipe's; see :class:`Recipe`. What is None is ignored.

    Raises:
        KeyError: Unknown backbone, checkpoint or activation id; the closest are named.
        TypeError: Unknown keyword, one that goes with another ``trainable``, or one that would change what a saved
            backbone is; ``fold`` with anything trainable.
        ImportError: ``trainable="lora"`` without peft, or ``weight_dtype="int8"`` without torchao.
        ValueError: A value that cannot be; weights that do not fit the network; a pickle.
        ConnectionError: The hub does not give the weights.
        MemoryError: The weights that are kept do not fit on the device; which dtype would is said.
        FileNotFoundError: Nothing at a path, or not what is needed there; ``compile`` for the CPU without a C++
            compiler.
    """
    compilation.check_compile(
        compile, torch.device(device) if device is not None else torch.get_default_device(), trainable
    )
    check_trainable(trainable, lora_rank, prompt_tokens)
    if chunk is not None:
        check_count("chunk", chunk)
    format = get_input_format(input_format) if input_format is not None else None
    options = _Options(
        trainable,
        lora_rank,
        prompt_tokens,
        format,
        encoder_levels,
        chunk,
        quantization.check_weight_dtype(weight_dtype, trainable),
        fold,
        compile,
    )
    settings = _overrides(overrides, features_only=features_only)
    checkpoint_path = checkpoint_path or (pretrained_cfg_overlay or {}).get("file")
    place = _find(name, recipe is not None, checkpoint_path, pretrained, cache_dir)
    if encoder is not None:
        place = _with_encoder(place, encoder, pretrained, cache_dir)
    configs = place.configs()
    declaration = place.declaration or _custom(place.checkpoint, configs, recipe)
    if place.restored and settings:
        raise TypeError(
            f"a saved backbone keeps its recipe, and {', '.join(settings)} would change it; give it per call instead"
        )
    declaration = replace(declaration, recipe=declaration.recipe.override(**settings))
    if settings.get("prompt") and not place.source:
        Prompter(place.checkpoint.family, configs, None, declaration.recipe.prompt_padding)(
            [settings["prompt"]]
        )  # says what is missing
    folded = place.restored.folded if place.restored else {}
    return _build(declaration, configs, place, out_indices, _strides(out_strides), dtype, device, options, folded)


def model_entrypoint(name: str) -> Callable[..., DiffusionBackbone]:
    """The function that builds a backbone: :func:`create_model` with the name filled in.

    Raises:
        KeyError: No backbone has this name.
    """
    get_declaration(name)
    return partial(create_model, name)


def architecture(name: str, checkpoint_path: str | Path | None = None) -> tuple[Checkpoint, Configs]:
    """What a checkpoint is, and the configs of its networks, without any weights.

    Args:
        name: A checkpoint, or ``local-dir:`` or ``hf-hub:`` of a diffusers folder.
        checkpoint_path: As for :func:`create_model`; the configs of a folder are its own.

    Raises:
        FileNotFoundError: Nothing is there, or no network that is known here.
        KeyError: No such checkpoint.
    """
    place = _find(name, True, checkpoint_path, False, None)
    return place.checkpoint, place.configs()


def _overrides(given: dict[str, Any], **accepted: Any) -> dict[str, Any]:
    """The recipe's settings among foreign keywords; everything else is refused by name."""
    settings = {}
    for key, value in {**given, **accepted}.items():
        if value is None:
            continue
        if key in OVERRIDES:
            settings[key] = value
        elif key not in FOREIGN:
            known = [
                *OVERRIDES,
                *FOREIGN,
                "recipe",
                "checkpoint_path",
                "out_indices",
                "out_strides",
                "encoder",
                *_Options._fields,
            ]
            raise TypeError(f"create_model has no keyword {key!r}.{closest(key, known)}")
        elif reason := FOREIGN[key](value):
            raise ValueError(reason)
    return settings


def _strides(strides: Sequence[int] | None) -> tuple[int, ...] | None:
    if strides is None:
        return None
    strides = tuple(strides)
    if not strides or any(not isinstance(s, int) or s < 1 for s in strides) or list(strides) != sorted(set(strides)):
        raise ValueError(f"out_strides must be growing positive integers such as (4, 8, 16, 32), got {strides}")
    return strides


# From a name to a place.


@dataclass(frozen=True)
class Place:
    """What a name stands for: a checkpoint, perhaps the recipe that goes with it, where its weights are, and the config
    of another image encoder.
    """

    checkpoint: Checkpoint
    declaration: Declaration | None = None
    source: Source | None = None
    restored: Saved | None = None
    encoder: Config | None = None

    def configs(self) -> Configs:
        if self.restored:
            return self.restored.configs
        family = FAMILIES[self.checkpoint.family]
        configs = self.source.configs(family) if self.source else package_configs(self.checkpoint)
        return {**configs, family.encoder: self.encoder} if self.encoder else configs


def _find(name: str, has_recipe: bool, checkpoint_path: str | Path | None, pretrained: bool, cache_dir: Any) -> Place:
    place = _resolve(name, has_recipe, cache_dir)
    if checkpoint_path:
        return _open_path(Path(checkpoint_path).expanduser(), place, pretrained, cache_dir)
    if pretrained and not (place.source or place.restored):
        return replace(place, source=_open_published(place.checkpoint, cache_dir))
    return place


def _resolve(name: str, has_recipe: bool, cache_dir: Any) -> Place:
    scheme, colon, place = name.partition(":")
    if colon:
        if scheme not in ("hf-hub", "local-dir"):
            raise ValueError(f"{name!r}: a place is written 'hf-hub:owner/repo' or 'local-dir:folder'")
        repo, _, revision = place.partition("@")
        folder = Folder(place) if scheme == "local-dir" else HubRepo(repo, revision or "main", cache_dir)
        if is_saved(folder):
            if has_recipe:
                raise TypeError(f"{name} is a saved backbone with its own recipe; recipe= is for a diffusers folder")
            restored = Saved(folder)
            return Place(restored.declaration.checkpoint, restored.declaration, restored=restored)
        if not has_recipe:
            raise TypeError(
                f"{name} is no saved backbone (its config.json would say so), so recipe= must say which activations "
                "to read"
            )
        return Place(_anonymous(folder), source=folder)
    if not has_recipe:
        declaration = get_declaration(name)
        return Place(declaration.checkpoint, declaration)
    if is_model(name):
        raise TypeError(
            f"{name!r} already has a recipe; use create_model({get_declaration(name).checkpoint.name!r}, recipe=...)"
        )
    return Place(get_checkpoint(name))


def _anonymous(folder: Folder) -> Checkpoint:
    """A checkpoint that nobody declared: what its own configs say, and a licence that is not known."""
    kinds = [kind for kind, family in FAMILIES.items() if folder.holds(family)]
    if not kinds:
        wanted = ", ".join(dict.fromkeys(f"{family.denoiser}/config.json" for family in FAMILIES.values()))
        known = ", ".join(name for family in FAMILIES.values() for name in family.networks)
        raise FileNotFoundError(
            f"{folder} holds no denoiser that is known here ({wanted}, of one of {known}); is it a folder in the "
            "diffusers layout?"
        )
    family = FAMILIES[kinds[0]]
    configs = folder.configs(family)
    named = Path(folder.provenance.get("repo") or folder.path.resolve()).name.lower()
    name = "my_" + re.sub(r"[^a-z0-9]+", "_", named).strip("_")
    return Checkpoint(
        name=name,
        title=str(folder),
        hub_id=folder.provenance.get("repo", ""),
        license=License("other", name="unknown; see where the weights came from", verified=False),
        paper=None,
        input_size=family.native_size(configs),
        family=kinds[0],
        encoder_float16=not family.encoder_config(configs).get("force_upcast", False),
    )


def _custom(checkpoint: Checkpoint, configs: Configs, recipe: Any) -> Declaration:
    if isinstance(recipe, (str, Path)):
        recipe = Recipe.from_file(recipe)
    elif not isinstance(recipe, Recipe):
        if not isinstance(recipe, Sequence) or not recipe:
            raise TypeError(
                f"recipe must be a Recipe, a YAML or JSON file, or a list of activation ids; got {recipe!r}"
            )
        if all(isinstance(id, str) for id in recipe):
            catalogue = _catalogue(checkpoint, configs)
            recipe = [[site.id for site in level] for level in group_by_stride([catalogue[id] for id in recipe])]
        recipe = Recipe("custom", levels=tuple(recipe))
    return Declaration(f"{checkpoint.name}_{recipe.name}", checkpoint, recipe)


def _catalogue(checkpoint: Checkpoint, configs: Configs) -> Catalogue:
    return (
        FAMILIES[checkpoint.family]
        .activations(configs, checkpoint.name)
        .with_probe(partial(introspection.site, checkpoint.family, configs))
    )


# From a checkpoint to its weights.


def _open_published(checkpoint: Checkpoint, cache_dir: Any) -> Source:
    if not checkpoint.hub_id:
        return Folder(CONFIGS / checkpoint.config_name)
    return open_checkpoint(checkpoint, cache_dir)


def _open_path(path: Path, place: Place, pretrained: bool, cache_dir: Any) -> Place:
    checkpoint = place.checkpoint
    if place.restored:
        raise TypeError(
            f"{checkpoint.name} is loaded from a saved backbone, which brings its weights; "
            f"checkpoint_path={str(path)!r} would give others"
        )
    if path.is_dir():
        folder = Folder(path)
        if not is_saved(folder):
            return replace(place, source=folder)
        restored = Saved(folder)
        if place.declaration and restored.declaration.recipe.digest != place.declaration.recipe.digest:
            raise ValueError(
                f"{path} was saved from {restored.declaration.name}, whose recipe is another than that of "
                f"{place.declaration.name}; "
                f"use create_model('local-dir:{path}')"
            )
        return replace(place, declaration=restored.declaration, restored=restored)
    files = safetensors_io.TensorFiles([path])  # refuses pickles and broken files
    if is_single_file(files):
        return replace(place, source=SingleFile(path, package_configs(checkpoint)))
    if not (place.source or pretrained):
        raise FileNotFoundError(
            f"{path} holds a denoiser alone. The image encoder and the prompt must come from somewhere: add "
            "pretrained=True to take them from "
            f"{checkpoint.hub_id}, or give a diffusers folder."
        )
    base = place.source or _open_published(replace(checkpoint, denoiser=None), cache_dir)
    return replace(
        place,
        source=WithComponent(base, FAMILIES[checkpoint.family].denoiser, partial(Path, path), {"path": str(path)}),
    )


def _with_encoder(place: Place, encoder: str, pretrained: bool, cache_dir: Any) -> Place:
    """The same place with the tiny encoder of its checkpoint in front."""
    if place.restored:
        raise TypeError(f"a saved backbone keeps its image encoder, and encoder={encoder!r} would change it")
    checkpoint, family = place.checkpoint, FAMILIES[place.checkpoint.family]
    tiny, source = tiny_encoder.find(checkpoint, encoder), None
    if place.source:
        if tiny.file and not pretrained:
            raise FileNotFoundError(
                f"the tiny encoder of {checkpoint.name} is in {tiny.file.repo} on the hub; add pretrained=True to "
                "take it from there"
            )
        source = tiny_encoder.source(tiny, place.source, family, cache_dir)
    config = (source and source.config) or packaged(tiny)
    checkpoint = replace(checkpoint, encoder_float16=True)  # it is the checkpoint's own encoder that overflows
    declaration = place.declaration and replace(place.declaration, checkpoint=checkpoint)
    return Place(
        checkpoint, declaration, source, encoder=tiny_encoder.fitted(config, family, place.configs(), checkpoint.name)
    )


# Building.


class _Options(NamedTuple):
    """What of ``create_model`` is no part of a recipe."""

    trainable: bool | str = False
    lora_rank: int | None = None
    prompt_tokens: int | None = None
    input_format: InputFormat | None = None
    encoder_levels: bool = False
    chunk: int | None = None
    weight_dtype: str | None = None
    fold: bool = False
    compile: bool | str = False


def build(described: Described, trainable: bool | str = False) -> DiffusionBackbone:
    """A described backbone on torch's default device, in its default dtype: with random weights, or on ``meta`` without
    any.
    """
    place = Place(described.declaration.checkpoint, described.declaration)
    strides = _strides(described.out_strides)
    options = _Options(trainable, input_format=described.input_format)
    return _build(described.declaration, described.configs, place, None, strides, None, None, options, described.folded)


def _build(
    declaration: Declaration,
    configs: Configs,
    place: Place,
    out_indices: int | Sequence[int] | None,
    out_strides: tuple[int, ...] | None,
    dtype: torch.dtype | str | None,
    device: torch.device | str | None,
    options: _Options,
    folded: Mapping[str, Any],
) -> DiffusionBackbone:
    checkpoint, recipe = declaration.checkpoint, declaration.recipe
    family = FAMILIES[checkpoint.family]
    configs = _without(configs, recipe, family)
    device = torch.device(device) if device is not None else torch.get_default_device()
    constant_folding.check_fold(options.fold, folded, options.trainable, device, declaration.name)
    dtype = _dtype(dtype)
    encoder_dtype = torch.float32 if dtype == torch.float16 and not checkpoint.encoder_float16 else dtype
    source, restored = place.source, place.restored
    catalogue = _catalogue(checkpoint, configs)
    levels = make_levels(family.levels(configs, recipe, catalogue))
    levels = tuple(levels[i] for i in sorted(take(out_indices, len(levels))))
    if options.encoder_levels:
        if not out_strides:
            raise ValueError(
                "encoder_levels=True fills strides that the recipe lacks, so it needs out_strides=, such as (4, 8, "
                "16, 32)"
            )
        levels = (*fine(catalogue.all(), out_strides, levels), *levels)
    sites = [site for level in levels for site in level.sites]
    postprocessing.check_postprocessing(recipe, [site for site in sites if not site.encoder])
    if options.trainable == "prompt":
        check_prompt(
            family,
            configs,
            options.prompt_tokens,
            any(site.id.endswith("cross-map") for site in sites),
            declaration.name,
        )
    paths = [path for site in postprocessing.needed(recipe, sites) for path in site.modules]
    empty = (source is not None or restored is not None) and device.type != "meta"
    kind, fold = family.image_encoder(configs), options.fold and not folded
    home = torch.device("cpu") if fold and empty else device  # so that the device never holds what is dropped

    with safetensors_io.unfilled() if empty else device:
        denoiser = family.build_denoiser(configs[family.denoiser])
        encoder = kind.build(family.encoder_config(configs))
        constant_folding.restore(denoiser, folded)
    whole = {"denoiser": safetensors_io.shapes(denoiser), "encoder": safetensors_io.shapes(encoder)}
    denoiser = family.truncate(denoiser, paths)
    encoder = kind.truncate(encoder)
    rounded = (
        quantization.names(denoiser, introspection.called(checkpoint.family, configs, paths))
        if options.weight_dtype
        else frozenset()
    )
    at_once = frozenset() if fold else rounded  # values are folded from whole weights
    if empty:
        memory_budget.check_budget([(denoiser, dtype), (encoder, encoder_dtype)], home, declaration.name, at_once)
    else:
        nn.Module.to(denoiser, dtype)  # not diffusers' own .to, which warns about layers that other networks have
        nn.Module.to(encoder, encoder_dtype)
        quantization.round_(denoiser, at_once)

    def store(name: str, tensor: Tensor) -> Tensor:
        return quantization.int8(tensor) if name in at_once else tensor

    prompter = Prompter(checkpoint.family, configs, source, recipe.prompt_padding)
    if not empty:
        embeddings = family.blank_conditioning(configs)
    elif restored:
        restored.load("denoiser", denoiser, whole["denoiser"], dtype, home, store)
        restored.load("encoder", encoder, whole["encoder"], encoder_dtype, home)
        embeddings = restored.embeddings()
    else:
        assert source is not None
        embeddings = prompter([recipe.prompt])  # first, so that the text encoder is gone before the weights come
        parts = [
            (family.denoiser, "denoiser", denoiser, dtype, store),
            (family.encoder, "encoder", encoder, encoder_dtype, safetensors_io.as_read),
        ]
        for component, part, network, its_dtype, keep in parts if family.encoder else parts[:1]:
            files = source.tensors(component, half=its_dtype in (torch.float16, torch.bfloat16))
            safetensors_io.load(network, files, whole[part], its_dtype, home, f"{checkpoint.name} {component}", keep)
    if options.prompt_tokens:
        embeddings = first_tokens(embeddings, options.prompt_tokens)
    conditioning = {name: _like(embeddings[name], device, dtype) for name in family.conditioning_shapes(configs)}
    if empty:
        family.fill_buffers(denoiser, home)
    if fold:
        constant_folding.fold(denoiser, family, configs, conditioning, recipe.timestep, [*catalogue.all(), *sites])
        rounded &= set(denoiser.state_dict())
        quantization.round_(denoiser, rounded)
        memory_budget.check_budget([(denoiser, dtype), (encoder, encoder_dtype)], device, declaration.name, rounded)
        nn.Module.to(denoiser, device)
        nn.Module.to(encoder, device)
    with torch.device(device):
        backbone = DiffusionBackbone(
            declaration,
            configs,
            denoiser,
            encoder,
            levels,
            catalogue,
            conditioning,
            out_strides=out_strides or (restored.out_strides if restored else None),
            prompter=prompter,
            provenance=restored.provenance if restored else source.provenance if source else {},
            trainable=options.trainable,
            lora_rank=options.lora_rank or RANK,
            chunk=options.chunk,
            weight_dtype=options.weight_dtype,
            input_format=options.input_format or (restored.input_format if restored else SYMMETRIC),
        )
    if options.compile:
        compilation.compile_in_place(backbone, options.compile)
    return backbone


def _without(configs: Configs, recipe: Recipe, family: Family) -> Configs:
    rest = left_out(configs, recipe.without)
    everything = {
        name: config for name, config in configs.items() if config is not None
    }  # a saved folder leaves out already
    whole, kept = family.text_encoder_names(everything), family.text_encoder_names(rest)
    for name in recipe.without:
        if name in kept or name not in whole:
            there = ", ".join(whole) or "none"
            raise ValueError(
                f"recipe {recipe.name!r}: without={name!r} is no text encoder that this checkpoint can do without; it "
                f"has {there}"
            )
    return rest


def _like(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    if dtype is None:
        return torch.get_default_dtype()
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    found = getattr(torch, str(dtype).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(
            f"dtype must be a floating-point torch.dtype or its name ('float32', 'float16', 'bfloat16'), got {dtype!r}"
        )
    return found
