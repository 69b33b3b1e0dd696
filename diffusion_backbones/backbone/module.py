"""The backbone: an image in, a feature pyramid out.

::

    x        (B, 3, H, W) in [-1, 1]
    pad      on the right and bottom, with mid-grey, to size_divisibility
    z        the image encoder's latents, scaled
    z_t      alpha_t z + sigma_t noise
    denoise  up to the recipe's last activation
    levels   tokens -> maps, concatenated along channels, cropped to ceil(H / stride) x ceil(W / stride)
    pyramid  a list of maps, fine to coarse
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_backbones.backbone import call_arguments
from diffusion_backbones.backbone.out_of_memory import check_maps, explained
from diffusion_backbones.backbone.timm_mixin import TimmInterface
from diffusion_backbones.families import FAMILIES, Family
from diffusion_backbones.families.base import EMBEDDINGS
from diffusion_backbones.loading.prompts import Prompter
from diffusion_backbones.ops import micro_batching, postprocessing, pyramid, recording
from diffusion_backbones.ops.noise import canvas, crop, draw, mix, timesteps
from diffusion_backbones.spec.activations import Catalogue, Site
from diffusion_backbones.spec.configs import Configs
from diffusion_backbones.spec.declaration import Declaration, pretrained_cfg
from diffusion_backbones.spec.input_format import SYMMETRIC, InputFormat
from diffusion_backbones.spec.levels import LevelInfo, nearest, take
from diffusion_backbones.surgery import compilation, constant_folding, introspection
from diffusion_backbones.surgery.trainable import RANK, add_lora, learned, stock_name, trains


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
        return ((name, getattr(self, name)) for name in self.names)


class DiffusionBackbone(TimmInterface):
    """A frozen diffusion network that returns a pyramid of its activations. Made by
    :func:`~diffusion_backbones.create_model`.

    Every method that runs the network takes these keywords, which hold for that call alone:

    * ``prompt``: a string for the batch, or one per image; or its embeddings under diffusers' names: ``prompt_embeds``
      (tokens, channels) or (B, tokens, channels), ``pooled_prompt_embeds``, ``prompt_attention_mask``,
      ``class_labels``.
    * ``timestep``: what the network receives, a number or one per image.
    * ``noise``: ``"fixed"``, ``"random"``, ``"none"``, or a tensor of the latents' shape, (C, h, w) or (B, C, h, w).
    * ``generator``: for ``noise="random"``.
    * ``ensemble``: number of noise draws to average.
    * ``chunk``: how many noisy latents, draws times images, the denoiser is run on at once; all by default. The
      features are the same, and the memory of a call no longer grows with its ensemble.
    * ``latents``: (B, C, h, w) clean latents in place of the image.

    Attributes:
        encoder, denoiser: The stock networks, without what the recipe does not reach.
        conditioning: The recipe's prompt, embedded.
        declaration: Name, checkpoint and recipe.
        input_format: How the images that it takes were normalised.
        folded: Whether values stand in the denoiser for what depends on prompt and timestep alone; calls then cannot
            change those.
        levels: Channels, stride and source of every native level, fine to coarse.
        chunk: The default of calls.
        weight_dtype: ``"int8"`` if the denoiser's weights are kept so.
        provenance: Where the weights came from; ``commit`` for the hub, empty for random weights.
        num_features: Channels of the coarsest map.
        pretrained_cfg: What ``timm.data.resolve_model_data_config`` reads.
        compiled: Whether, and in which mode of ``torch.compile``, the networks are compiled.
    """

    canvas: Tensor | None

    def __init__(
        self,
        declaration: Declaration,
        configs: Configs,
        denoiser: nn.Module,
        encoder: nn.Module,
        levels: Sequence[LevelInfo],
        catalogue: Catalogue,
        embeddings: Mapping[str, Tensor],
        *,
        out_strides: Sequence[int] | None = None,
        prompter: Prompter | None = None,
        provenance: Mapping[str, str] | None = None,
        trainable: bool | str = False,
        lora_rank: int = RANK,
        input_format: InputFormat = SYMMETRIC,
        chunk: int | None = None,
        weight_dtype: str | None = None,
    ):
        super().__init__()
        recipe = declaration.recipe
        self.declaration, self.configs, self.catalogue = declaration, configs, catalogue
        self.levels, self.out_strides = tuple(levels), tuple(out_strides) if out_strides else None
        self.provenance = dict(provenance or {})
        self.encoder, self.denoiser = encoder, denoiser
        self.folded = bool(constant_folding.constants(denoiser))
        self.prompter = prompter or Prompter(declaration.checkpoint.family, configs, None, recipe.prompt_padding)
        self.latent_stride = self.family.latent_stride(configs)
        self._widest = max(
            (site.channels / site.stride**2 for site in catalogue.all() if site.encoder), default=0
        )  # values of a map for every pixel
        self.forward_process = self.family.forward_process(configs)
        fixed = recipe.noise == "fixed"
        self.register_buffer("canvas", canvas(recipe.seed, recipe.ensemble, self.latent_channels) if fixed else None)
        self.trainable, self.input_format, self.chunk, self.weight_dtype = trainable, input_format, chunk, weight_dtype
        unreached = self._unreached()
        self.conditioning = Conditioning(
            embeddings, learned(embeddings, unreached, declaration.name) if trainable == "prompt" else ()
        )
        if trainable == "lora":
            add_lora(
                denoiser, lora_rank, unreached, declaration.name
            )  # before the hooks, which then see what adapters add
        self._unfreeze(unreached)
        sites = self._sites(self.levels)
        self.recorder = recording.Recorder(denoiser, self._needed(sites))
        self.encoder_recorder = recording.Recorder(encoder, [site for site in sites if site.encoder])
        self.pretrained_cfg = pretrained_cfg(declaration, input_format)
        self.num_features = self._channels_and_strides()[-1][0]
        self.eval()

    # What it is.

    @property
    def family(self) -> Family:
        return FAMILIES[self.declaration.checkpoint.family]

    @property
    def size_divisibility(self) -> int:
        """What the input is padded to a multiple of, in pixels. Any size is accepted."""
        return self.family.size_divisibility(self.configs)

    @property
    def latent_channels(self) -> int:
        return self.family.latent_channels(self.configs)

    @property
    def feature_info(self) -> Any:
        """timm's ``FeatureInfo`` of what :meth:`forward` returns: ``channels()``, ``reduction()``, ``module_name()``."""
        from timm.models import FeatureInfo

        infos = [
            {"num_chs": channels, "reduction": stride, "module": self.levels[level].module, "index": i}
            for i, (channels, stride, level) in enumerate(self._channels_and_strides())
        ]
        return FeatureInfo(infos, tuple(range(len(infos))))

    def _channels_and_strides(self) -> list[tuple[int, int, int]]:
        """(channels, stride, native level) of every map that :meth:`forward` returns."""
        if self.out_strides is None:
            return [(level.channels, level.stride, i) for i, level in enumerate(self.levels)]
        chosen = [nearest(stride, [level.stride for level in self.levels]) for stride in self.out_strides]
        return [(self.levels[i].channels, stride, i) for stride, i in zip(self.out_strides, chosen, strict=True)]

    def extra_repr(self) -> str:
        maps = ", ".join(f"{channels}@{stride}" for channels, stride, _ in self._channels_and_strides())
        return f"{self.declaration.name}: {maps}"

    # Running it.

    def forward(self, x: Tensor | None = None, indices: int | Sequence[int] | None = None, **call: Any) -> list[Tensor]:
        """An image batch -> its feature pyramid.

        Args:
            x: (B, 3, H, W) floating point, normalised with mean = std = 0.5, that is in [-1, 1], or as ``input_format``
                says. Any H and W from 1 up. None only with ``latents=``.
            indices: Which maps, by position; an integer n means the last n. All by default.
            **call: See the class.

        Returns:
            Maps (B, C_i, ceil(H / s_i), ceil(W / s_i)), fine to coarse, in the denoiser's dtype.

        Raises:
            TypeError: ``x`` is no floating-point tensor, or an unknown keyword.
            ValueError: ``x`` has another shape, is empty, or has NaN; a keyword has a value that cannot be.
        """
        chosen = self._take(indices)
        z, size, fine = self._input(x, call, self._read_for(chosen))
        return self._pyramid(z, size, chosen, call, fine)

    def forward_latents(
        self, z: Tensor, size: tuple[int, int] | None = None, indices: int | Sequence[int] | None = None, **call: Any
    ) -> list[Tensor]:
        """Clean latents, as :meth:`encode` gives them -> the feature pyramid.

        Args:
            z: (B, C, h, w), h and w multiples of ``size_divisibility`` / latent stride.
            size: Height and width in pixels of the image before it was padded; by default all of ``z``.
            indices, **call: As in :meth:`forward`.

        Returns:
            As :meth:`forward` of an image of that size.
        """
        call_arguments.check_keywords(call, self.declaration.name, self.folded)
        chosen = self._take(indices)
        self._no_image_for(self._read_for(chosen))
        return self._pyramid(z, self._check_latents(z, size), chosen, call, {})

    @explained("image encoder")
    def encode(self, x: Tensor) -> Tensor:
        """Images -> the clean latents that the recipe's denoiser is given noise on.

        Args:
            x: As in :meth:`forward`.

        Returns:
            (B, C, h, w), padded to ``size_divisibility``, scaled as the recipe says, in the encoder's dtype.
        """
        call_arguments.check_image(x, self.input_format)
        x, d = self.input_format.to_symmetric(x), self.size_divisibility
        x = F.pad(x, (0, -x.shape[-1] % d, 0, -x.shape[-2] % d))
        check_maps(self.encoder, x, self._widest, self.declaration.name)
        kind, x = self.family.image_encoder(self.configs), compilation.settle(self, x.to(_dtype(self.encoder)))
        with compilation.running(self):
            z = kind.encode(self.encoder, x)
        if self.declaration.recipe.scaled:
            shift, factor = kind.scaling(self.family.encoder_config(self.configs))
            z = (z - shift) * factor
        return z

    def forward_activations(
        self, x: Tensor | None, ids: Sequence[str], *, as_maps: bool = False, average_heads: bool = False, **call: Any
    ) -> dict[str, Tensor]:
        """Single activations, exactly as the stock network computes them.

        Args:
            x: As in :meth:`forward`.
            ids: Activation ids or stock module paths that this network still computes.
            as_maps: Turn tokens into (B, C, h, w) and crop the padding off, instead of giving the raw tensor of the
                padded image.
            average_heads: Average attention maps over heads.
            **call: See the class.

        Returns:
            Id -> (B, C, h, w), or (B, h·w, C) for tokens, or (B, heads, h·w, keys) for attention maps.

        Raises:
            KeyError: The network has no such activation, or it lies behind the point where this one is cut.
        """
        sites = [self._find(id) for id in ([ids] if isinstance(ids, str) else ids)]
        inner = [site for site in sites if not site.encoder]
        self.encoder_recorder.watch(self.encoder, [site for site in sites if site.encoder])
        self.recorder.watch(self.denoiser, inner)
        with compilation.eagerly(self):
            z, size, acts = self._input(x, call, sites)
            acts |= self._run(z, size, inner, call, average_heads)
        if not as_maps:
            return acts
        height, width = (s * self.latent_stride for s in z.shape[-2:])
        maps = {s.id: pyramid.to_map(acts[s.id], s, height, width) for s in sites if s.layout != "attention"}
        return {s.id: pyramid.assemble(LevelInfo((s,)), maps, size) if s.id in maps else acts[s.id] for s in sites}

    def visit_activations(
        self, x: Tensor | None, ids: Sequence[str], visit: Callable[[Site, Tensor], None], **call: Any
    ) -> None:
        """Single activations of the denoiser as maps, handed on one by one while it runs: however many they are, one is
        in memory.

        Args:
            x: As in :meth:`forward`.
            ids: As in :meth:`forward_activations`; none of an image encoder, and no attention map, which is no map of
                an image.
            visit: Called with the site and its map (B, C, h, w), ensemble draws one after another along the batch, once
                for every id, in forward order; with ``chunk``, once for every id of every chunk.
            **call: See the class.

        Raises:
            KeyError: As in :meth:`forward_activations`.
            ValueError: An id that cannot be visited, or the network did not compute one.
        """
        sites = [self._find(id) for id in ids]
        if unfit := [site.id for site in sites if site.encoder or site.layout not in ("map", "tokens")]:
            raise ValueError(f"{', '.join(unfit)} cannot be visited; read such activations with forward_activations")
        self.recorder.watch(self.denoiser, sites)
        z, size, _ = self._input(x, call, sites)
        height, width = (s * self.latent_stride for s in z.shape[-2:])

        def give(site: Site, act: Tensor) -> None:
            visit(site, pyramid.assemble(LevelInfo((site,)), {site.id: pyramid.to_map(act, site, height, width)}, size))

        with compilation.eagerly(self):
            self._run(z, size, sites, call, visit=give)

    def _pyramid(
        self,
        z: Tensor,
        size: tuple[int, int],
        indices: Sequence[int],
        call: Mapping[str, Any],
        fine: Mapping[str, Tensor],
    ) -> list[Tensor]:
        inner = [site for site in self._read_for(indices) if not site.encoder]
        acts = {
            **fine,
            **postprocessing.apply(self.declaration.recipe, inner, self._run(z, size, self._needed(inner), call)),
        }
        return self._levels(z, size, indices, acts)

    @explained("pyramid")
    def _levels(
        self, z: Tensor, size: tuple[int, int], indices: Sequence[int], acts: Mapping[str, Tensor]
    ) -> list[Tensor]:
        """Activations -> some of the maps that :meth:`forward` returns."""
        maps_out, sites = self._channels_and_strides(), self._read_for(indices)
        height, width = (s * self.latent_stride for s in z.shape[-2:])
        maps = {site.id: pyramid.to_map(acts[site.id], site, height, width) for site in sites}
        native = {i: pyramid.assemble(self.levels[i], maps, size) for i in sorted({maps_out[i][2] for i in indices})}
        return [
            pyramid.resample(native[level], self.levels[level].stride, stride, size)
            for _, stride, level in (maps_out[i] for i in indices)
        ]

    def _run(
        self,
        z: Tensor,
        size: tuple[int, int],
        sites: Sequence[Site],
        call: Mapping[str, Any],
        average_heads: bool = False,
        visit: Callable[[Site, Tensor], None] | None = None,
    ) -> dict[str, Tensor]:
        """Noise the latents, run the denoiser on them, and read what it computed: averaged over the ensemble, or as it
        comes if somebody is to ``visit``.
        """
        if not sites:
            return {}
        recipe, b = self.declaration.recipe, z.shape[0]  # len() would be a constant of an exported file
        rule, timestep = call.get("noise", recipe.noise), call.get("timestep", recipe.timestep)
        ensemble = call.get("ensemble", recipe.ensemble if isinstance(rule, str) and rule != "none" else 1)
        canvas = self._canvas(ensemble, z.shape[-2], z.shape[-1]) if isinstance(rule, str) and rule == "fixed" else None
        noise = draw(z, rule, ensemble, canvas, call.get("generator"))
        z_t = mix(z, noise, timestep, self.forward_process).to(_dtype(self.denoiser)).view(ensemble, *z.shape)
        t, conditioning = timesteps(timestep, b, z.device), self._conditioning(b, call)
        parts = []
        for images, draws in micro_batching.pieces(ensemble, b, call.get("chunk", self.chunk)):
            mean, given = micro_batching.Mean(ensemble), {name: rows[images] for name, rows in conditioning.items()}
            for some in draws:
                acts = self._denoise(z_t[some, images], size, t[images], given, sites, average_heads, visit)
                mean.add(acts, t[images].shape[0])
            parts.append(mean.take())
        return micro_batching.join(parts)

    @explained("denoiser")
    def _denoise(
        self,
        z_t: Tensor,
        size: tuple[int, int],
        t: Tensor,
        conditioning: Mapping[str, Tensor],
        sites: Sequence[Site],
        average_heads: bool,
        visit: Callable[[Site, Tensor], None] | None,
    ) -> dict[str, Tensor]:
        """(draws, B, C, h, w) noisy latents through the denoiser, all at once -> id -> (draws · B, ...), or nothing if
        somebody visits.
        """
        draws = z_t.shape[0]
        t, conditioning = (
            t.repeat(draws),
            {name: rows.repeat(draws, *[1] * (rows.ndim - 1)) for name, rows in conditioning.items()},
        )
        z_t = compilation.settle(self, z_t.flatten(0, 1))

        def activation(site: Site, recorded: tuple[Tensor, ...]) -> Tensor:
            grid = (
                z_t.shape[-2] * self.latent_stride // site.stride,
                z_t.shape[-1] * self.latent_stride // site.stride,
            )
            return self.family.activation(
                self.denoiser, site, recorded, conditioning, grid, average_heads or site.layout == "tokens"
            )

        stream = (
            recording.Stream(sites, lambda site, recorded: visit(site, activation(site, recorded))) if visit else None
        )
        with compilation.running(self), self.recorder.recording(sites, stream) as recorded:
            output = self.family.call(self.denoiser, z_t, t, conditioning, size)
        if stream is not None:
            stream.close()
            return {}
        acts = {site.id: activation(site, recording.read(recorded, site)) for site in sites}
        if self.compiled in compilation.CUDA_GRAPHS:
            acts = {id: act.clone() for id, act in acts.items()}  # the graph's next run writes to the same memory
        return {id: recording.tie(act, output) for id, act in acts.items()} if self.trainable else acts

    # The parts of a call.

    def _input(
        self, x: Tensor | None, call: dict[str, Any], sites: Sequence[Site]
    ) -> tuple[Tensor, tuple[int, int], dict[str, Tensor]]:
        """The clean latents of a call, the size in pixels of its image before padding, and what of ``sites`` is in the
        image encoder.
        """
        call_arguments.check_keywords(call, self.declaration.name, self.folded)
        z = call.pop("latents", None)
        if (x is None) == (z is None):
            raise TypeError("give either images x or latents=")
        fine = [site for site in sites if site.encoder]
        if z is not None:
            self._no_image_for(fine)
            return z, self._check_latents(z, None), {}
        assert x is not None
        with self.encoder_recorder.recording(fine) as recorded:
            z = self.encode(x)
        return (
            z,
            (x.shape[-2], x.shape[-1]),
            {site.id: recording.read(recorded, site)[0].to(_dtype(self.denoiser)) for site in fine},
        )

    def _no_image_for(self, sites: Iterable[Site]) -> None:
        if fine := [site.id for site in sites if site.encoder]:
            raise ValueError(
                f"{', '.join(fine)} is read in the image encoder, so it needs the image, and latents were given; take "
                "other levels with indices="
            )

    def _check_latents(self, z: Any, size: tuple[int, int] | None) -> tuple[int, int]:
        return call_arguments.check_latents(z, size, self.latent_channels, self.latent_stride, self.size_divisibility)

    def _canvas(self, ensemble: int, height: int, width: int) -> Tensor:
        """The fixed noise of ``ensemble`` draws, cropped to the latents."""
        if self.canvas is not None and len(self.canvas) >= ensemble:
            return crop(self.canvas[:ensemble], height, width)
        with torch.device(next(self.denoiser.parameters()).device):
            return crop(canvas(self.declaration.recipe.seed, ensemble, self.latent_channels), height, width)

    def _conditioning(self, b: int, call: Mapping[str, Any]) -> dict[str, Tensor]:
        """The tensors that condition this call, with a batch axis of ``b``."""
        given = {name: call[name] for name in EMBEDDINGS if name in call}
        if "prompt" in call:
            if given:
                raise TypeError(f"give either prompt= or {', '.join(given)}, not both")
            given = self.prompter(call_arguments.prompts(call["prompt"], b))
        return call_arguments.condition(dict(self.conditioning.items()), given, b, self.declaration.name)

    def _take(self, indices: int | Sequence[int] | None) -> list[int]:
        return take(indices, len(self._channels_and_strides()))

    def _sites(self, levels: Iterable[LevelInfo]) -> list[Site]:
        return list(dict.fromkeys(site for level in levels for site in level.sites))

    def _read_for(self, indices: Sequence[int]) -> list[Site]:
        """What must be read for some of the maps that :meth:`forward` returns."""
        maps_out = self._channels_and_strides()
        return self._sites(self.levels[i] for i in sorted({maps_out[i][2] for i in indices}))

    def _needed(self, sites: Sequence[Site]) -> list[Site]:
        return postprocessing.needed(self.declaration.recipe, sites)

    def _find(self, id: str) -> Site:
        site = self.catalogue[id]
        if not recording.available(self.encoder if site.encoder else self.denoiser, site):
            raise KeyError(
                f"{self.declaration.checkpoint.name} has {id!r}, but {self.declaration.name} is cut behind the last "
                "activation of its recipe and no longer "
                f"computes it. Build a network that does: create_model({self.declaration.checkpoint.name!r}, "
                f"recipe=[{id!r}])."
            )
        return site

    # Cutting further, and staying frozen.

    def _unreached(self) -> set[str]:
        """What no gradient reaches; nobody asks for it in a frozen backbone."""
        sites = self._needed(self._sites(self.levels))
        return (
            introspection.unreached(self.declaration.checkpoint.family, self.configs, sites)
            if self.trainable
            else set()
        )

    def _unfreeze(self, unreached: Collection[str]) -> None:
        """Of what is trained, every parameter that a gradient can reach, as distributed training demands; of the rest
        none.
        """
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(trains(self.trainable, name) and stock_name(name) not in unreached)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Keep only some maps, and cut the denoiser behind the last activation that they need.

        Args:
            indices: As in :meth:`forward`.
            prune_norm, prune_head: Accepted; there is neither.

        Returns:
            The positions that were kept.
        """
        kept = self._take(indices)
        chosen = [self._channels_and_strides()[i] for i in kept]
        self.levels = tuple(self.levels[i] for i in sorted({level for _, _, level in chosen}))
        self.out_strides = tuple(stride for _, stride, _ in chosen) if self.out_strides else None
        self.family.truncate(
            self.denoiser, [path for site in self._needed(self._sites(self.levels)) for path in site.modules]
        )
        self.num_features = self._channels_and_strides()[-1][0]
        self._unfreeze(self._unreached())
        if self.compiled:
            compilation.compile_in_place(self, self.compiled)
        return kept

    def train(self, mode: bool = True) -> DiffusionBackbone:
        """Only a trainable denoiser leaves eval; the encoder never does, whatever a framework calls, nor do networks
        whose prompt alone is trained.
        """
        super().train(False)
        self.training = mode and bool(self.trainable)
        self.denoiser.train(self.training and self.trainable != "prompt")
        return self

    # Copying and saving.

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copies and pickles of a compiled backbone are compiled anew, when they are first called."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.compiled:
            compilation.compile_in_place(self, self.compiled)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write what was kept: weights, embedded prompt, recipe, configs and card. Returns the folder.

        ``create_model("local-dir:FOLDER")`` reads it back with no text encoder and no hub, in the dtype that it is
        asked for.
        """
        from diffusion_backbones.factory.save_pretrained import save

        return save(self, Path(folder))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        commit_message: str = "Upload backbone",
        token: str | None = None,
    ) -> str:
        """:meth:`save_pretrained` into a hub repository, created if it is not there. Returns its URL.

        The weights keep their licence, which the uploaded card states; see whether it lets you redistribute them.
        """
        from diffusion_backbones.factory.save_pretrained import push

        return push(self, repo_id, private=private, commit_message=commit_message, token=token)


def _dtype(module: nn.Module) -> torch.dtype:
    """What a network computes in; weights of one byte are only stored so, and some always have more."""
    return next((p.dtype for p in module.parameters() if p.dtype.itemsize > 1), torch.get_default_dtype())
