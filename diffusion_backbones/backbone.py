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

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_backbones import capture, pyramid
from diffusion_backbones.activations import Catalogue, Site
from diffusion_backbones.attention import attention_map
from diffusion_backbones.conditioning import Prompter
from diffusion_backbones.families import FAMILIES, Configs, Family
from diffusion_backbones.noise import canvas, crop
from diffusion_backbones.pyramid import LevelInfo
from diffusion_backbones.recipe import closest
from diffusion_backbones.registry import Declaration, pretrained_cfg

EMBEDDINGS = ("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask", "class_labels")
CALL = ("prompt", *EMBEDDINGS, "timestep", "noise", "generator", "ensemble", "latents")


class Conditioning(nn.Module):
    """The tensors that condition the denoiser unless a call gives others, (1, ...) each, as persistent buffers."""

    def __init__(self, embeddings: Mapping[str, Tensor]):
        super().__init__()
        for name, tensor in embeddings.items():
            self.register_buffer(name, tensor)

    def items(self) -> Iterable[tuple[str, Tensor]]:
        return ((name, buffer) for name, buffer in self.named_buffers())


class DiffusionBackbone(nn.Module):
    """A frozen diffusion network that returns a pyramid of its activations. Made by :func:`~diffusion_backbones.create_model`.

    Every method that runs the network takes these keywords, which hold for that call alone:

    * ``prompt``: a string for the batch, or one per image; or its embeddings under diffusers' names: ``prompt_embeds``
      (tokens, channels) or (B, tokens, channels), ``pooled_prompt_embeds``, ``prompt_attention_mask``, ``class_labels``.
    * ``timestep``: what the network receives, a number or one per image.
    * ``noise``: ``"fixed"``, ``"random"``, ``"none"``, or a tensor of the latents' shape, (C, h, w) or (B, C, h, w).
    * ``generator``: for ``noise="random"``.
    * ``ensemble``: number of noise draws to average.
    * ``latents``: (B, C, h, w) clean latents in place of the image.

    Attributes:
        encoder, denoiser: The stock networks, without what the recipe does not reach.
        conditioning: The recipe's prompt, embedded.
        declaration: Name, checkpoint and recipe.
        levels: Channels, stride and source of every native level, fine to coarse.
        provenance: Where the weights came from; ``commit`` for the hub, empty for random weights.
        num_features: Channels of the coarsest map.
        pretrained_cfg: What ``timm.data.resolve_model_data_config`` reads.
    """

    num_classes, in_chans = 0, 3
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
        trainable: bool = False,
    ):
        super().__init__()
        recipe = declaration.recipe
        self.declaration, self.configs, self.catalogue = declaration, configs, catalogue
        self.levels, self.out_strides = tuple(levels), tuple(out_strides) if out_strides else None
        self.provenance = dict(provenance or {})
        self.encoder, self.denoiser = encoder, denoiser
        self.conditioning = Conditioning(embeddings)
        self.prompter = prompter or Prompter(declaration.checkpoint.family, configs, None, recipe.prompt_padding)
        self.latent_stride = self.family.latent_stride(configs)
        self.forward_process = self.family.forward_process(configs)
        fixed = recipe.noise == "fixed"
        self.register_buffer("canvas", canvas(recipe.seed, recipe.ensemble, self.latent_channels) if fixed else None)
        self.trainable = trainable
        self.denoiser.requires_grad_(trainable)
        self.encoder.requires_grad_(False)
        self.recorder = capture.Recorder(denoiser, self._sites(self.levels))
        self.pretrained_cfg = pretrained_cfg(declaration)
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
        chosen = [pyramid.nearest_level(stride, self.levels) for stride in self.out_strides]
        return [(self.levels[i].channels, stride, i) for stride, i in zip(self.out_strides, chosen, strict=True)]

    def extra_repr(self) -> str:
        maps = ", ".join(f"{channels}@{stride}" for channels, stride, _ in self._channels_and_strides())
        return f"{self.declaration.name}: {maps}"

    # Running it.

    def forward(self, x: Tensor | None = None, indices: int | Sequence[int] | None = None, **call: Any) -> list[Tensor]:
        """An image batch -> its feature pyramid.

        Args:
            x: (B, 3, H, W) floating point, normalised with mean = std = 0.5, that is in [-1, 1]. Any H and W from 1 up. None
                only with ``latents=``.
            indices: Which maps, by position; an integer n means the last n. All by default.
            **call: See the class.

        Returns:
            Maps (B, C_i, ceil(H / s_i), ceil(W / s_i)), fine to coarse, in the denoiser's dtype.

        Raises:
            TypeError: ``x`` is no floating-point tensor, or an unknown keyword.
            ValueError: ``x`` has another shape, is empty, or has NaN; a keyword has a value that cannot be.
        """
        z, size = self._input(x, call)
        return self._pyramid(z, size, self._take(indices), call)

    def forward_latents(self, z: Tensor, size: tuple[int, int] | None = None, indices: int | Sequence[int] | None = None, **call: Any) -> list[Tensor]:
        """Clean latents, as :meth:`encode` gives them -> the feature pyramid.

        Args:
            z: (B, C, h, w), h and w multiples of ``size_divisibility`` / latent stride.
            size: Height and width in pixels of the image before it was padded; by default all of ``z``.
            indices, **call: As in :meth:`forward`.

        Returns:
            As :meth:`forward` of an image of that size.
        """
        self._check_call(call)
        return self._pyramid(z, self._check_latents(z, size), self._take(indices), call)

    def encode(self, x: Tensor) -> Tensor:
        """Images -> the clean latents that the recipe's denoiser is given noise on.

        Args:
            x: As in :meth:`forward`.

        Returns:
            (B, C, h, w), padded to ``size_divisibility``, scaled as the recipe says, in the encoder's dtype.
        """
        self._check_image(x)
        d = self.size_divisibility
        x = F.pad(x, (0, -x.shape[-1] % d, 0, -x.shape[-2] % d))
        z = self.family.image_encoder.encode(self.encoder, x.to(_dtype(self.encoder)))
        if self.declaration.recipe.scaled:
            shift, factor = self.family.image_encoder.scaling(self.configs[self.family.encoder])
            z = (z - shift) * factor
        return z

    def forward_activations(
        self, x: Tensor | None, ids: Sequence[str], *, as_maps: bool = False, average_heads: bool = False, **call: Any
    ) -> dict[str, Tensor]:
        """Single activations, exactly as the stock network computes them.

        Args:
            x: As in :meth:`forward`.
            ids: Activation ids or stock module paths that this network still computes.
            as_maps: Turn tokens into (B, C, h, w) and crop the padding off, instead of giving the raw tensor of the padded image.
            average_heads: Average attention maps over heads.
            **call: See the class.

        Returns:
            Id -> (B, C, h, w), or (B, h·w, C) for tokens, or (B, heads, h·w, keys) for attention maps.

        Raises:
            KeyError: The network has no such activation, or it lies behind the point where this one is cut.
        """
        sites = [self._find(id) for id in ([ids] if isinstance(ids, str) else ids)]
        z, size = self._input(x, call)
        self.recorder.watch(self.denoiser, sites)
        acts = self._run(z, size, sites, call, average_heads)
        if not as_maps:
            return acts
        height, width = (s * self.latent_stride for s in z.shape[-2:])
        maps = {s.id: pyramid.to_map(acts[s.id], s, height, width) for s in sites if s.layout != "attention"}
        return {s.id: pyramid.assemble(LevelInfo((s,)), maps, size) if s.id in maps else acts[s.id] for s in sites}

    def _pyramid(self, z: Tensor, size: tuple[int, int], indices: Sequence[int], call: Mapping[str, Any]) -> list[Tensor]:
        maps_out = self._channels_and_strides()
        needed = sorted({maps_out[i][2] for i in indices})
        sites = self._sites([self.levels[i] for i in needed])
        acts = self._run(z, size, sites, call)
        height, width = (s * self.latent_stride for s in z.shape[-2:])
        maps = {site.id: pyramid.to_map(acts[site.id], site, height, width) for site in sites}
        native = {i: pyramid.assemble(self.levels[i], maps, size) for i in needed}
        return [pyramid.resample(native[level], self.levels[level].stride, stride, size) for _, stride, level in (maps_out[i] for i in indices)]

    def _run(self, z: Tensor, size: tuple[int, int], sites: Sequence[Site], call: Mapping[str, Any], average_heads: bool = False) -> dict[str, Tensor]:
        """Noise the latents, run the denoiser once, and read what it computed, averaged over the ensemble."""
        recipe, b = self.declaration.recipe, len(z)
        noise = call.get("noise", recipe.noise)
        ensemble = call.get("ensemble", recipe.ensemble if isinstance(noise, str) and noise != "none" else 1)
        timestep = call.get("timestep", recipe.timestep)
        z_t = self._add_noise(z, noise, timestep, ensemble, call.get("generator"))
        conditioning = {name: t.repeat(ensemble, *[1] * (t.ndim - 1)) for name, t in self._conditioning(b, call).items()}
        with self.recorder.recording(sites) as recorded:
            output = self.family.call(self.denoiser, z_t, self._timesteps(timestep, b, z.device).repeat(ensemble), conditioning, size)
        acts = {}
        for site in sites:
            tensors = capture.read(recorded, site)
            act = tensors[0]
            if site.port == "map":
                act = attention_map(self.denoiser.get_submodule(site.path), tensors[0], tensors[1], average=average_heads)
            act = capture.tie(act, output) if self.trainable else act
            acts[site.id] = act.view(ensemble, b, *act.shape[1:]).mean(0) if ensemble > 1 else act
        return acts

    # The parts of a call.

    def _input(self, x: Tensor | None, call: dict[str, Any]) -> tuple[Tensor, tuple[int, int]]:
        """The clean latents of a call and the size in pixels of its image before padding."""
        self._check_call(call)
        z = call.pop("latents", None)
        if (x is None) == (z is None):
            raise TypeError("give either images x or latents=")
        if z is not None:
            return z, self._check_latents(z, None)
        assert x is not None
        return self.encode(x), (x.shape[-2], x.shape[-1])

    def _check_call(self, call: dict[str, Any]) -> None:
        """Drop keywords that are None, as timm does, and refuse unknown ones."""
        for key in [key for key, value in call.items() if value is None]:
            del call[key]
        for key in call:
            if key not in CALL:
                raise TypeError(f"a call of {self.declaration.name} takes no {key!r}.{closest(key, CALL)} It takes: {', '.join(CALL)}.")

    def _check_latents(self, z: Any, size: tuple[int, int] | None) -> tuple[int, int]:
        step = self.size_divisibility // self.latent_stride
        if not isinstance(z, Tensor) or z.ndim != 4 or z.shape[1] != self.latent_channels or z.shape[-2] % step or z.shape[-1] % step or 0 in z.shape:
            raise ValueError(f"latents must be (B, {self.latent_channels}, h, w) with h and w multiples of {step}, as encode() gives them; got {_shape(z)}")
        full = (z.shape[-2] * self.latent_stride, z.shape[-1] * self.latent_stride)
        if size is None:
            return full
        if any(not f - self.size_divisibility < s <= f for s, f in zip(size, full, strict=True)):
            raise ValueError(f"size={tuple(size)} is not the size of an image whose latents are {tuple(z.shape[-2:])}, that is {full} pixels with padding")
        return int(size[0]), int(size[1])

    def _check_image(self, x: Any) -> None:
        expected = "expected (B, 3, H, W) floating point in [-1, 1]"
        if not isinstance(x, Tensor):
            raise TypeError(f"{expected}, got {type(x).__name__}; turn a PIL image into a tensor with timm's create_transform or torchvision")
        if x.ndim != 4 or x.shape[1] != 3:
            hints = {3: "; add the batch axis with x[None]", 4: "; repeat a grey image with x.repeat(1, 3, 1, 1)"}
            hint = hints[x.ndim] if x.ndim in hints and x.shape[-3] in (1, 3) else ""
            raise ValueError(f"{expected}, got {_shape(x)}{hint}")
        if not x.is_floating_point():
            raise TypeError(f"{expected}, got {x.dtype}; for uint8 images use x / 127.5 - 1")
        if 0 in x.shape:
            raise ValueError(f"{expected}, got an empty batch {_shape(x)}")
        if not torch.compiler.is_compiling() and not x.is_meta and not bool(torch.isfinite(x).all()):
            raise ValueError(f"{expected}, got NaN or infinite values")

    def _add_noise(self, z: Tensor, noise: Any, timestep: Any, ensemble: int, generator: torch.Generator | None) -> Tensor:
        """(B, C, h, w) clean latents -> (ensemble · B, C, h, w) noisy ones, in the denoiser's dtype."""
        if not isinstance(ensemble, int) or ensemble < 1:
            raise ValueError(f"ensemble must be an integer from 1 up, got {ensemble!r}")
        if generator is not None and noise != "random":
            raise ValueError("generator= is for noise='random'")
        dtype, shape = _dtype(self.denoiser), (ensemble, *z.shape)
        if isinstance(noise, Tensor):
            if tuple(noise.shape) not in (z.shape[1:], z.shape) or ensemble > 1:
                raise ValueError(f"noise must be {tuple(z.shape[1:])} or {tuple(z.shape)} without an ensemble, got {_shape(noise)} with ensemble={ensemble}")
            eps = noise.to(z.device).expand(shape)
        elif noise == "none":
            if ensemble > 1:
                raise ValueError("an ensemble averages noise draws, and noise='none' has none")
            return z.to(dtype)
        elif noise == "fixed":
            eps = crop(self._canvas(ensemble), z.shape[-2], z.shape[-1]).unsqueeze(1).expand(shape)
        elif noise == "random":
            eps = torch.randn(shape, generator=generator, device=generator.device if generator else z.device).to(z.device)
        else:
            raise ValueError(f"noise must be 'fixed', 'random', 'none' or a tensor, got {noise!r}")
        alpha, sigma = self.forward_process.levels(timestep if not isinstance(timestep, (Tensor, list, tuple)) else self._timesteps(timestep, len(z), z.device))
        return (alpha * z + sigma * eps.to(z.dtype)).flatten(0, 1).to(dtype)

    def _canvas(self, ensemble: int) -> Tensor:
        if self.canvas is not None and len(self.canvas) >= ensemble:
            return self.canvas[:ensemble]
        with torch.device(next(self.denoiser.parameters()).device):
            return canvas(self.declaration.recipe.seed, ensemble, self.latent_channels)

    def _timesteps(self, timestep: Any, b: int, device: torch.device) -> Tensor:
        if isinstance(timestep, (Tensor, list, tuple)):
            t = torch.as_tensor(timestep, device=device)
            if t.ndim > 1 or t.numel() not in (1, b):
                raise ValueError(f"timestep must be one number or {b}, one per image; got {_shape(t)}")
            return t.reshape(-1).expand(b)
        return torch.full((b,), timestep, device=device, dtype=torch.int64 if float(timestep).is_integer() else torch.float32)

    def _conditioning(self, b: int, call: Mapping[str, Any]) -> dict[str, Tensor]:
        """The tensors that condition this call, with a batch axis of ``b``."""
        given = {name: call[name] for name in EMBEDDINGS if name in call}
        tensors = dict(self.conditioning.items())
        if "prompt" in call:
            if given:
                raise TypeError(f"give either prompt= or {', '.join(given)}, not both")
            prompts = [call["prompt"]] if isinstance(call["prompt"], str) else call["prompt"]
            if not isinstance(prompts, (list, tuple)) or not all(isinstance(p, str) for p in prompts):
                raise TypeError(f"prompt must be a string or a list of strings, got {call['prompt']!r}")
            if len(prompts) not in (1, b):
                raise ValueError(f"prompt must be one string or {b}, one per image; got {len(prompts)}")
            given = dict(self.prompter(prompts))
        for name, tensor in given.items():
            if name not in tensors:
                raise TypeError(f"{self.declaration.name} is not conditioned on {name}; it takes {', '.join(tensors) or 'none'}")
            own = tensors[name]
            tensor = tensor if tensor.ndim == own.ndim else tensor[None]
            if tensor.ndim != own.ndim or tensor.shape[-1] != own.shape[-1] or len(tensor) not in (1, b):
                raise ValueError(f"{name} must be {tuple(own.shape[1:])} or ({b}, ...), got {_shape(given[name])}")
            tensors[name] = tensor.to(device=own.device, dtype=own.dtype)
        return {name: t.expand(b, *t.shape[1:]) for name, t in tensors.items()}

    def _take(self, indices: int | Sequence[int] | None) -> list[int]:
        return take(indices, len(self._channels_and_strides()))

    def _sites(self, levels: Iterable[LevelInfo]) -> list[Site]:
        return list(dict.fromkeys(site for level in levels for site in level.sites))

    def _find(self, id: str) -> Site:
        site = self.catalogue[id]
        if not capture.available(self.denoiser, site):
            raise KeyError(
                f"{self.declaration.checkpoint.name} has {id!r}, but {self.declaration.name} is cut behind the last activation of its recipe and no longer "
                f"computes it. Build a network that does: create_model({self.declaration.checkpoint.name!r}, recipe=[{id!r}])."
            )
        return site

    # timm's surface.

    def forward_features(self, x: Tensor, **call: Any) -> Tensor:
        """The coarsest map, (B, num_features, h, w)."""
        return self.forward(x, 1, **call)[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """There is no head.

        Raises:
            TypeError: Always.
        """
        raise TypeError(f"{self.declaration.name} has no classifier head; use the pyramid that forward() returns")

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        **call: Any,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """timm's way of asking for levels.

        Args:
            x: As in :meth:`forward`.
            indices: As in :meth:`forward`.
            norm: Must be False: activations have no final norm.
            stop_early: Accepted; nothing ever runs after the last activation.
            output_fmt: ``NCHW``, or ``NLC`` for (B, h·w, C).
            intermediates_only: Return the list alone.

        Returns:
            The list of maps, or (coarsest map, list of maps).
        """
        if norm:
            raise ValueError("norm=True asks for a final norm, and activations have none")
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        maps = self.forward(x, indices, **call)
        out = [m.flatten(2).transpose(1, 2) for m in maps] if output_fmt == "NLC" else maps
        return out if intermediates_only else (maps[-1], out)

    def prune_intermediate_layers(self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True) -> list[int]:
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
        self.family.truncate(self.denoiser, [path for site in self._sites(self.levels) for path in site.modules])
        self.num_features = self._channels_and_strides()[-1][0]
        return kept

    def get_classifier(self) -> nn.Module:
        return nn.Identity()

    def reset_classifier(self, num_classes: int = 0, global_pool: str | None = None) -> None:
        """Accepted for zero classes, since there is no classifier; anything else is a ``ValueError``."""
        if num_classes:
            raise ValueError(f"{self.declaration.name} has no classifier to reset to {num_classes} classes; put a head on its pyramid")

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade compute for memory in the denoiser while it is trained."""
        (self.denoiser.enable_gradient_checkpointing if enable else self.denoiser.disable_gradient_checkpointing)()  # type: ignore[operator]

    def group_matcher(self, coarse: bool = False) -> Any:
        """For timm's layer-wise learning rates: parameter name -> depth, from input to output."""
        return self._depth

    def _depth(self, name: str) -> int:
        return self.family.depth(name.removeprefix("denoiser.")) if name.startswith("denoiser.") else 0

    def no_weight_decay(self) -> set[str]:
        return set()

    # Frozen stays frozen.

    def train(self, mode: bool = True) -> DiffusionBackbone:
        """Only a trainable denoiser leaves eval; the encoder never does, whatever a framework calls."""
        super().train(False)
        self.training = mode and self.trainable
        self.denoiser.train(self.training)
        return self

    # Saving.

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write what was kept: weights, embedded prompt, recipe, configs and card. Returns the folder.

        ``create_model("local-dir:FOLDER")`` reads it back with no text encoder and no hub.
        """
        from diffusion_backbones.saved import save

        return save(self, Path(folder))

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, commit_message: str = "Upload backbone", token: str | None = None) -> str:
        """:meth:`save_pretrained` into a hub repository, created if it is not there. Returns its URL.

        The weights keep their licence, which the uploaded card states; see whether it lets you redistribute them.
        """
        from diffusion_backbones.saved import push

        return push(self, repo_id, private=private, commit_message=commit_message, token=token)


def take(indices: int | Sequence[int] | None, n: int) -> list[int]:
    """timm's way of naming some of n maps -> their positions, in the order given.

    Args:
        indices: None for all, an integer k for the last k, or positions, negative ones from the end.

    Raises:
        ValueError: A position that is not there, or twice the same.
    """
    if indices is None:
        return list(range(n))
    if isinstance(indices, int):
        if not 1 <= indices <= n:
            raise ValueError(f"the last {indices} maps were asked for, and there are {n}")
        return list(range(n - indices, n))
    wanted = [i + n if i < 0 else i for i in indices]
    if not wanted or any(not 0 <= i < n for i in wanted) or len(set(wanted)) < len(wanted):
        raise ValueError(f"indices must be different positions from {-n} to {n - 1}, got {list(indices)}")
    return wanted


def _dtype(module: nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters()), torch.get_default_dtype())


def _shape(x: Any) -> str:
    return f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
