"""``create_model``: a name, or a place, becomes a backbone."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diffusion_backbones import families
from diffusion_backbones.backbone.module import DiffusionBackbone
from diffusion_backbones.factory import random_weights
from diffusion_backbones.factory.build import Builder, plan_for
from diffusion_backbones.factory.checkpoint_path import is_given
from diffusion_backbones.factory.fusions import with_fusions
from diffusion_backbones.factory.locate import Resolved, declare, locate, with_encoder
from diffusion_backbones.factory.options import BuildOptions, check_overlay, check_strides, recipe_overrides
from diffusion_backbones.factory.random_weights import RandomWeightsWarning
from diffusion_backbones.loading.prompts import no_text_encoder
from diffusion_backbones.loading.saved_folder import SavedConfig
from diffusion_backbones.spec.checkpoint import Checkpoint
from diffusion_backbones.spec.configs import Configs
from diffusion_backbones.spec.declaration import Declaration
from diffusion_backbones.spec.input_format import InputFormat
from diffusion_backbones.spec.recipe import Recipe
from diffusion_backbones.spec.registry import get_declaration, list_fusions
from diffusion_backbones.spec.validation import check_flag


@with_fusions
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
    compile: bool | str = False,  # noqa: A002  (torch's word)
    truncate: bool = True,
    features_only: bool = True,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    **overrides: Any,
) -> DiffusionBackbone:
    """Build a backbone: frozen, in eval mode, deterministic.

    Args:
        name: A registered backbone (``sd15_gdf``), a checkpoint (``sd15``) together with ``recipe=``,
            ``hf-hub:owner/repo``, or ``local-dir:folder``. The last two read a folder that ``save_pretrained`` wrote,
            or a diffusers folder with ``recipe=``. Also a fusion, registered or as ``a+b`` of backbones and models of
            timm; it is a ``FusedBackbone``, and docs/fusion.md says which keywords it takes.
        pretrained: Download what the backbone needs from the hub. Without it the weights are random, which is warned of
            once unless the denoiser is trained, and nothing is fetched.
        checkpoint_path: A diffusers folder, a folder that ``save_pretrained`` wrote, or one ``.safetensors`` file in
            diffusers' or the authors' names; whole, or a part. What a part lacks comes from the checkpoint that
            ``name`` places, or from the hub if ``pretrained``.
        cache_dir: huggingface_hub's cache folder.
        recipe: A :class:`Recipe`, a YAML or JSON file, or a list of activation ids, which are grouped by stride and
            read at timestep 50 unless ``timestep=`` says otherwise.
        out_indices: Which levels; an integer n means the last n. Fewer levels are a shorter network.
        out_strides: Resample to these strides, without parameters, e.g. ``(4, 8, 16, 32)``; of the levels the nearest
            is taken.
        dtype: dtype of weights and maps, ``torch.float32`` by default. An image encoder that overflows in float16
            stays in float32.
        weight_dtype: ``"int8"`` keeps the weights of the denoiser's linear and convolutional layers in eight bits,
            rounded as they are read, and computes in ``dtype``; needs torchao. For what does not fit otherwise: it is
            slower, and changes the features. See docs/memory.md.
        device: Where it is built; ``"meta"`` builds without memory.
        trainable: What is trained: nothing by default; True for the denoiser; ``"lora"`` for adapters in its attention,
            which needs peft; ``"prompt"`` for the embedded prompt.
        lora_rank: Rank of the adapters, 8 by default.
        prompt_tokens: How many tokens are learned, the first of the recipe's prompt; all by default.
        input_format: What images were made of pixels: ``"symmetric"`` [-1, 1], the default, ``"unit"`` [0, 1],
            ``"uint8"`` 0 to 255, ``"imagenet"`` ImageNet's mean and deviation, ``"detectron2-bgr"`` detectron2's
            default, or an ``InputFormat`` of your own. For frameworks that normalize by themselves.
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
            holds for one batch and size; ``"max"`` is that on a CPU, and static shapes with CUDA graphs on a GPU; other
            strings are modes of ``torch.compile``. Nothing is compiled on ``meta``.
        truncate: False cuts the network behind the last activation that it has, and not behind the last of the recipe,
            so that ``forward_activations`` reads any. The features are the same.
        features_only: Accepted for timm; True is the only mode.
        pretrained_cfg_overlay: timm's; ``file`` is taken as ``checkpoint_path``, and other keys are a ``TypeError``.
        **overrides: ``timestep``, ``timesteps``, ``combine``, ``noise``, ``inversion_steps``, ``ensemble``, ``seed``,
            ``prompt``, ``prompt_padding``, ``scaled``, ``classes``, ``discard``, ``normalize``, ``debias``,
            ``components`` replace the recipe's; see :class:`Recipe`. What is None is ignored.

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
    _check_places(name, pretrained, cache_dir)
    options = BuildOptions.parse(
        out_indices=out_indices,
        out_strides=out_strides,
        dtype=dtype,
        device=device,
        weight_dtype=weight_dtype,
        trainable=trainable,
        lora_rank=lora_rank,
        prompt_tokens=prompt_tokens,
        input_format=input_format,
        encoder_levels=encoder_levels,
        chunk=chunk,
        fold=fold,
        compile=compile,
        truncate=truncate,
    )
    settings = recipe_overrides({**overrides, "features_only": features_only})
    overlaid = check_overlay(pretrained_cfg_overlay)
    checkpoint_path = checkpoint_path if is_given(checkpoint_path) else overlaid
    found = locate(name, recipe is not None, checkpoint_path, pretrained, cache_dir)
    if encoder is not None:
        found = with_encoder(found, encoder, pretrained, cache_dir)
    configs = found.configs
    plan = plan_for(_declared(found, configs, recipe, settings), configs, options)
    folded = found.restored.folded if found.restored else {}
    if not found.has_weights and options.device.type != "meta" and options.trainable is not True:
        random_weights.warn(plan.declaration.name)
    return Builder(plan, found, options, folded).build()


def _declared(found: Resolved, configs: Configs, recipe: Any, settings: Mapping[str, Any]) -> Declaration:
    """The declaration of what was found, with the settings that ``create_model`` was given in place of its recipe's.

    Raises:
        FileNotFoundError: A prompt, and nothing that can embed it.
        TypeError: A saved backbone keeps its recipe.
    """
    declaration = found.declaration or declare(found.checkpoint, configs, recipe)
    if found.restored and settings:
        raise TypeError(
            f"a saved backbone keeps its recipe, and {', '.join(settings)} would change it; give it per call instead"
        )
    declaration = replace(declaration, recipe=declaration.recipe.override(**settings))
    if settings.get("prompt") and not found.source:
        raise no_text_encoder(settings["prompt"])
    return declaration


def with_random_weights(name: str, **keywords: Any) -> DiffusionBackbone:
    """``create_model`` where random weights are what is wanted, as for measuring speed: nothing is said of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RandomWeightsWarning)
        return create_model(name, **keywords)


def _check_places(name: Any, pretrained: Any, cache_dir: Any) -> None:
    """Raise ``TypeError`` unless a name is a text, ``pretrained`` a truth value, and ``cache_dir`` a path or None."""
    if not isinstance(name, str):
        raise TypeError(f"a backbone is named by a text such as 'sd15_gdf', got {name!r}")
    check_flag("pretrained", pretrained)
    if not isinstance(cache_dir, str | os.PathLike | None):
        raise TypeError(f"cache_dir must be a path, got {cache_dir!r}")


def model_entrypoint(name: str) -> Callable[..., DiffusionBackbone]:
    """The function that builds a backbone: ``create_model`` with the name filled in.

    Raises:
        KeyError: Unknown; the message names the closest backbones.
    """
    if name not in list_fusions():
        get_declaration(name)
    return functools.partial(create_model, name)


def architecture(name: str, checkpoint_path: str | Path | None = None) -> tuple[Checkpoint, families.Architecture]:
    """A checkpoint and its network, without any weights.

    Args:
        name: A checkpoint, or ``local-dir:`` or ``hf-hub:`` of a diffusers folder.
        checkpoint_path: As for :func:`create_model`; the configs of a folder are its own.

    Raises:
        FileNotFoundError: Nothing is there, or no network that is known here.
        KeyError: No such checkpoint.
    """
    found = locate(name, True, checkpoint_path, False, None)
    return found.checkpoint, families.architecture(found.checkpoint, found.configs)


def build_described(described: SavedConfig, trainable: bool | str = False) -> DiffusionBackbone:
    """A described backbone on torch's default device, in its default dtype: with random weights, or on ``meta`` without
    any.
    """
    declaration = described.declaration
    options = BuildOptions(
        out_strides=check_strides(described.out_strides),
        dtype=torch.get_default_dtype(),
        device=torch.get_default_device(),
        trainable=trainable,
        input_format=described.input_format,
    )
    plan = plan_for(declaration, described.configs, options)
    return Builder(plan, Resolved(declaration.checkpoint, declaration), options, described.folded).build()
