"""What a backbone is: its networks, its plan, and the settings that every call shares."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_backbones.backbone.contract import Backbone
from diffusion_backbones.families import Architecture
from diffusion_backbones.loading.prompts import Prompter
from diffusion_backbones.ops.positional_basis import PositionalBasis
from diffusion_backbones.ops.principal_components import PrincipalComponents
from diffusion_backbones.ops.recording import Recorder
from diffusion_backbones.ops.tensor_checks import readable
from diffusion_backbones.spec.activations import Catalogue, Site
from diffusion_backbones.spec.configs import Configs
from diffusion_backbones.spec.declaration import Declaration, pretrained_cfg
from diffusion_backbones.spec.input_format import SYMMETRIC, InputFormat
from diffusion_backbones.spec.levels import LevelInfo, OutMap, out_maps
from diffusion_backbones.surgery import compilation, constant_folding
from diffusion_backbones.surgery.plan import Plan, unique_sites


class Conditioning(nn.Module):
    """The tensors that condition the denoiser unless a call gives others, (1, ...) each: persistent buffers, or
    parameters if they are ``learned``.
    """

    def __init__(self, embeddings: Mapping[str, Tensor], learned: Collection[str] = ()):
        super().__init__()
        self.names = tuple(embeddings)
        for name, tensor in embeddings.items():
            if name in learned:
                self.register_parameter(name, nn.Parameter(tensor.clone()))
            else:
                self.register_buffer(name, tensor)

    def items(self) -> Iterable[tuple[str, Tensor]]:
        """(Name, tensor) of each."""
        return ((name, getattr(self, name)) for name in self.names)


class BackboneState(Backbone):
    """A backbone's parts. The constructor stores what it is given, and changes none of it.

    Args:
        plan: What the recipe reads of the network.
        encoder, denoiser: The stock networks, without what the plan does not reach.
        conditioning: The recipe's prompt, embedded.
        canvas: The fixed noise, (ensemble, C, S, S); None for other kinds of noise.
        recorder, encoder_recorder: With their hooks in the two networks.
        prompter: Embeds the prompts of calls.
        out_strides: The strides that maps are resampled to; None keeps the levels' own.
        input_format: How the images that it takes were normalized.
        provenance: Where the weights came from; ``commit`` for the hub, empty for random weights.
        trainable: What is trained: False, True, ``"lora"`` or ``"prompt"``.
        chunk: How many noisy latents the denoiser is run on at once unless a call says otherwise; None for all.
        weight_dtype: ``"int8"`` if the denoiser's weights are kept so.

    Attributes:
        forward_process: How noise is mixed into clean latents.
        fitted: Of each level by its activations, what is applied to its map in the end: directions of position that are
            taken out, and principal components.
        folded: Whether values stand in the denoiser for what depends on prompt and timestep alone; calls then cannot
            change those.
        compiled: Whether, and in which mode of ``torch.compile``, the networks are compiled.
        encoder_overflows: Whether the image encoder gives no finite latents in float16. It then stays in its dtype when
            the backbone, or a module around it, is cast to float16.
    """

    canvas: Tensor | None
    encoder_overflows: bool = False
    encoder: nn.Module
    denoiser: nn.Module
    conditioning: Conditioning
    fitted: nn.ModuleDict

    def __init__(
        self,
        plan: Plan,
        denoiser: nn.Module,
        encoder: nn.Module,
        conditioning: Conditioning,
        canvas: Tensor | None,
        recorder: Recorder,
        encoder_recorder: Recorder,
        prompter: Prompter,
        *,
        out_strides: Sequence[int] | None = None,
        input_format: InputFormat = SYMMETRIC,
        provenance: Mapping[str, str] | None = None,
        trainable: bool | str = False,
        chunk: int | None = None,
        weight_dtype: str | None = None,
    ):
        super().__init__()
        self.plan = plan
        self.forward_process = plan.architecture.forward_process
        self.folded = bool(constant_folding.constants(denoiser))
        self.encoder_overflows = plan.encoder_overflows
        self.encoder, self.denoiser, self.conditioning = encoder, denoiser, conditioning
        self.register_buffer("canvas", canvas)
        self.fitted = nn.ModuleDict(dict(_unfitted(plan)))
        self.recorder, self.encoder_recorder, self.prompter = recorder, encoder_recorder, prompter
        self.out_strides = tuple(out_strides) if out_strides else None
        self.input_format, self.provenance = input_format, dict(provenance or {})
        self.trainable, self.chunk, self.weight_dtype = trainable, chunk, weight_dtype

    @property
    def declaration(self) -> Declaration:
        """Name, checkpoint and recipe."""
        return self.plan.declaration

    @property
    def architecture(self) -> Architecture:
        """The checkpoint's network."""
        return self.plan.architecture

    @property
    def configs(self) -> Configs:
        """The upstream configs of its components."""
        return self.architecture.configs

    @property
    def catalogue(self) -> Catalogue:
        """Every activation of the whole network."""
        return self.architecture.catalogue

    @property
    def levels(self) -> tuple[LevelInfo, ...]:
        """Channels, stride and source of every native level, fine to coarse."""
        return self.plan.levels

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return next(self.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the denoiser computes in, and the dtype of the maps."""
        return compute_dtype(self.denoiser)

    @property
    def encoder_dtype(self) -> torch.dtype:
        """What the image encoder computes in."""
        return compute_dtype(self.encoder)

    @property
    def size_divisibility(self) -> int:
        """What the input is padded to a multiple of, in pixels. Any size is accepted."""
        return self.architecture.size_divisibility

    @property
    def latent_stride(self) -> int:
        """Pixels per latent position."""
        return self.architecture.latent_stride

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return self.architecture.latent_channels

    @property
    def out_maps(self) -> list[OutMap]:
        """Channels, stride and native level of every map that a call returns."""
        return out_maps(self.levels, self.out_strides)

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """What ``timm.data.resolve_model_data_config`` reads."""
        return pretrained_cfg(self.declaration, self.input_format)

    @property
    def module_names(self) -> list[str]:
        """The stock modules that each map is read from, joined by ``+``."""
        return [self.levels[m.level].module for m in self.out_maps]

    @property
    def activations(self) -> list[tuple[str, ...]]:
        """The activation ids that each map is made of."""
        return [tuple(site.id for site in self.levels[m.level].sites) for m in self.out_maps]

    @property
    def widest_map(self) -> float:
        """Values of the image encoder's widest map, for every pixel."""
        sites = self.architecture.image_encoder.sites
        return max((site.channels / site.stride**2 for site in sites), default=0)

    @property
    def options(self) -> dict[str, Any]:
        """Settings of ``create_model`` that change the last digits at least."""
        return {"weight_dtype": self.weight_dtype, "fold": self.folded, "compile": self.compiled}

    def at_timestep(self, timestep: Any) -> AbstractContextManager[None]:
        """Within the ``with`` block, a folded network gives what belongs to a timestep of the recipe."""
        if not self.folded or len(self.plan.received) == 1:
            return nullcontext()
        return constant_folding.at_step(self.plan.received.index(timestep), self.denoiser)

    def sites_of(self, indices: Sequence[int]) -> list[Site]:
        """What must be read for some of the maps that a call returns."""
        out = self.out_maps
        return unique_sites(self.levels[i] for i in sorted({out[i].level for i in indices}))

    def fits_of(self, level: LevelInfo) -> list[PrincipalComponents]:
        """What is fitted of a level, in the order in which it is applied."""
        key = _key(level)
        return list(self.fitted[key].children()) if key in self.fitted else []  # type: ignore[arg-type]

    def finish(self, level: LevelInfo, m: Tensor) -> Tensor:
        """The map of a level with what was fitted applied."""
        for part in self.fits_of(level):
            m = part(m)
        return m

    def check_found(self, indices: Sequence[int]) -> None:
        """Raise ``ValueError`` if some of the maps that a call returns need what was not found yet."""
        out = self.out_maps
        parts = [part for i in indices for part in self.fits_of(self.levels[out[i].level])]
        missing = [part for part in parts if readable(part.fitted) and not part.is_fitted]
        if images := [part for part in missing if not isinstance(part, PositionalBasis)]:
            raise ValueError(
                f"{images[0].what} is reduced to principal components, which are not fitted yet; call fit(images) with "
                "some of your images, or load a backbone that was saved with them"
            )
        sought = isinstance(self.declaration.recipe.discard, str) and self.device.type != "meta"
        if missing or sought:
            setting = "debias" if missing else "discard='auto'"
            raise ValueError(
                f"{self.declaration.name}: {setting} depends on the weights, and these were random; build it with "
                "pretrained=True or checkpoint_path=, or call fit() once others are loaded"
            )

    def forget(self) -> None:
        """Drop what was fitted of levels that are no longer there."""
        kept = {key: self.fitted[key] for key in map(_key, self.levels) if key in self.fitted}
        self.fitted = nn.ModuleDict(kept)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """What ``half()``, ``to(...)`` and ``cuda()`` of this module, or of one around it, do to every tensor."""
        if not self.encoder_overflows:
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        kept = {id(tensor) for tensor in (*self.encoder.parameters(), *self.encoder.buffers())}

        def apply(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            cast = id(tensor) in kept and new.dtype == torch.float16
            return tensor.to(new.device) if cast else new

        return super()._apply(apply, recurse)  # type: ignore[no-untyped-call]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copies and pickles of a compiled backbone are compiled anew, when they are first called. Pickles of version
        0.1 hold the parts of a plan apart.
        """
        state = dict(state)
        if "plan" not in state:
            whole = Plan.of(state["declaration"], state["configs"])
            state["plan"] = replace(whole, levels=state["levels"])
            for name in MOVED_TO_PLAN:
                state.pop(name, None)
        state.setdefault("encoder_overflows", state["plan"].encoder_overflows)
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if "fitted" not in self._modules:
            self.fitted = nn.ModuleDict()
        if self.compiled:
            compilation.compile_in_place(self, self.compiled)


def _key(level: LevelInfo) -> str:
    """The name of what is fitted of a level: its activations, as a module can be called."""
    return "+".join(site.id for site in level.sites).replace(".", "/")


def _unfitted(plan: Plan) -> Iterator[tuple[str, nn.Module]]:
    """What is to be fitted of every level, by its name."""
    recipe, name = plan.declaration.recipe, plan.declaration.name
    for level in (level for level in plan.levels if level.in_denoiser):
        what, parts = f"{name}: the level of {level.sites[0].id}", OrderedDict[str, nn.Module]()
        if recipe.debias:
            parts["debias"] = PositionalBasis(level.width, recipe.debias, f"{what}, debias")
        if recipe.components:
            parts["components"] = PrincipalComponents(level.width, recipe.components, what)
        if parts:
            yield _key(level), nn.Sequential(parts)


MOVED_TO_PLAN = (
    "declaration",
    "configs",
    "catalogue",
    "levels",
    "latent_stride",
    "_widest",
    "num_features",
    "pretrained_cfg",
)
"""Attributes of version 0.1 that follow from the others now."""


def compute_dtype(module: nn.Module) -> torch.dtype:
    """What a network computes in; weights of one byte are only stored so, and some always have more."""
    return next((p.dtype for p in module.parameters() if p.dtype.itemsize > 1), torch.get_default_dtype())
