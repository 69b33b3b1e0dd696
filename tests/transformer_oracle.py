"""An independent oracle for diffusion transformers: the stock, whole network with plain hooks.

It hooks every module, replaces the fused attention by one that keeps its probabilities, and finds an id's module by
rewriting its words. A family that is not in :data:`NETWORKS` needs no line here: its network is the tiny one of its
first registered checkpoint, cut to few layers, and its arguments are those that diffusers' pipeline gives to it.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import diffusers
import pytest
import tiny
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING
from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid
from torch import Tensor, nn

import diffusion_backbones as db
from diffusion_backbones.families import FAMILIES
from diffusion_backbones.ops import recording
from diffusion_backbones.spec.activations import Catalogue
from diffusion_backbones.spec.configs import package_configs

VAE = {
    "block_out_channels": [8, 8, 8, 8],
    "encoder_block_out_channels": [8, 8, 8, 8],
    "temperal_downsample": [False, True, True],
    "norm_num_groups": 8,
}
ENCODERS = {"sana": "AutoencoderDC", "qwen": "AutoencoderKLQwenImage", "flux2": "AutoencoderKLFlux2"}
TEXT = 7
NETWORKS = {
    "dit": {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "out_channels": 8,
        "num_layers": 4,
        "sample_size": 8,
        "num_embeds_ada_norm": 10,
    },
    "pixart": {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 4,
        "sample_size": 8,
        "cross_attention_dim": 16,
        "caption_channels": 12,
    },
    "pixart-1024": {
        "num_attention_heads": 2,
        "attention_head_dim": 48,
        "num_layers": 2,
        "sample_size": 128,
        "cross_attention_dim": 96,
        "caption_channels": 12,
    },
    "flux": {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 64,
        "num_layers": 2,
        "num_single_layers": 3,
        "joint_attention_dim": 12,
        "pooled_projection_dim": 10,
        "guidance_embeds": True,
        "axes_dims_rope": [4, 6, 6],
    },
    "flux-schnell": {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 64,
        "num_layers": 1,
        "num_single_layers": 2,
        "joint_attention_dim": 12,
        "pooled_projection_dim": 10,
        "guidance_embeds": False,
        "axes_dims_rope": [4, 6, 6],
    },
    "sd3": {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 16,
        "num_layers": 3,
        "sample_size": 8,
        "joint_attention_dim": 12,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 10,
        "pos_embed_max_size": 12,
    },
    "sd3.5": {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 16,
        "num_layers": 3,
        "sample_size": 8,
        "joint_attention_dim": 12,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 10,
        "pos_embed_max_size": 12,
        "qk_norm": "rms_norm",
        "dual_attention_layers": (0, 1),
    },
}
NETWORKS |= {
    "hunyuan": {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "patch_size": 2,
        "sample_size": 8,
        "hidden_size": 16,
        "num_layers": 6,
        "mlp_ratio": 4.3637,
        "cross_attention_dim": 12,
        "cross_attention_dim_t5": 24,
        "pooled_projection_dim": 16,
        "text_len": TEXT,
        "text_len_t5": TEXT,
        "use_style_cond_and_image_meta_size": False,
    },
    "auraflow": {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 4,
        "patch_size": 2,
        "sample_size": 8,
        "num_mmdit_layers": 2,
        "num_single_dit_layers": 3,
        "joint_attention_dim": 12,
        "caption_projection_dim": 16,
        "pos_embed_max_size": 64,
    },
    "sana": {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 4,
        "num_cross_attention_heads": 4,
        "cross_attention_head_dim": 4,
        "cross_attention_dim": 16,
        "caption_channels": 12,
        "mlp_ratio": 2.5,
        "sample_size": 8,
        "patch_size": 1,
    },
}
NETWORKS |= {
    "flux2": {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 16,
        "patch_size": 1,
        "num_layers": 2,
        "num_single_layers": 3,
        "joint_attention_dim": 12,
        "timestep_guidance_channels": 16,
        "mlp_ratio": 3.0,
        "axes_dims_rope": [4, 4, 4, 4],
        "guidance_embeds": True,
    },
    "qwen": {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 64,
        "out_channels": 16,
        "patch_size": 2,
        "num_layers": 3,
        "joint_attention_dim": 12,
        "axes_dims_rope": [4, 6, 6],
    },
    "lumina": {
        "hidden_size": 24,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "axes_dim_rope": [2, 2, 2],
        "axes_lens": [16, 13, 12],
        "multiple_of": 16,
        "num_layers": 3,
        "num_refiner_layers": 2,
        "cap_feat_dim": 12,
        "in_channels": 4,
    },
    "z_image": {
        "dim": 24,
        "n_heads": 2,
        "n_kv_heads": 2,
        "axes_dims": [4, 4, 4],
        "axes_lens": [128, 13, 12],
        "n_layers": 3,
        "n_refiner_layers": 2,
        "cap_feat_dim": 12,
        "in_channels": 4,
        "all_patch_size": [2],
        "all_f_patch_size": [1],
    },
}
NETWORKS["flux2-klein"] = NETWORKS["flux2"] | {"num_layers": 1, "num_single_layers": 2, "guidance_embeds": False}
NETWORKS["z_image-long"] = NETWORKS["z_image"]
NETWORKS["sana-1.5"] = NETWORKS["sana"] | {"qk_norm": "rms_norm_across_heads"}
NETWORKS["hunyuan-1.1"] = NETWORKS["hunyuan"] | {"use_style_cond_and_image_meta_size": True}

KNOWN = {re.split("[-.]", name)[0] for name in NETWORKS}
FIRST = {db.get_checkpoint(name).family: name for name in reversed(db.list_checkpoints())}
"""Family -> the first of its registered checkpoints."""
NEW = [name for name, family in FAMILIES.items() if family.denoiser == "transformer" and name not in KNOWN]
CASES = [*NETWORKS, *NEW]


def configs(name: str) -> dict[str, dict[str, Any]]:
    """Configs of a case: an entry of :data:`NETWORKS`, or a tiny checkpoint of the family with few layers."""
    if name in NETWORKS:
        encoder = ENCODERS.get(family_of(name), "AutoencoderKL")
        return {"transformer": NETWORKS[name], "vae": VAE | {"_class_name": encoder}}
    return _shallow(tiny.configs(FIRST[name]))


def family_of(name: str) -> str:
    """The family of a case: what stands before a variant."""
    return re.split("[-.]", name)[0]


def _shallow(configs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    denoiser = configs["transformer"]
    layers = {key: min(n, 3) for key, n in denoiser.items() if key.endswith("layers") and isinstance(n, int)}
    return configs | {"transformer": denoiser | layers}


class Case:
    """A tiny network of a family, what it is run on, and what the stock network computes."""

    def __init__(self, name: str, latent: tuple[int, int], timestep: int):
        self.name = name
        self.family = FAMILIES[family_of(name)](configs(name), name)
        torch.manual_seed(0)
        self.network = self.family.build_denoiser().eval()
        for p in self.network.parameters():
            if p.ndim < 2 or not p.std() > 0:  # norms and tables that start at one or zero would hide mistakes
                nn.init.normal_(p, std=0.3)
        self.cut = self.family.truncate(copy.deepcopy(self.network), blocks(self.network)[-1:])
        self.z = torch.randn(2, self.family.latent_channels, *latent)
        self.timestep = torch.full((2,), timestep)
        self.size = (latent[0] * self.family.latent_stride, latent[1] * self.family.latent_stride)
        patch = self.family.patch
        self.grid = (latent[0] // patch, latent[1] // patch)
        self.tokens = self.grid[0] * self.grid[1]
        text = 40 if name.endswith("-long") else TEXT  # Z-Image counts 32 tokens, and some prompts are longer
        given = {
            "class_labels": torch.tensor([10, 3]),
            "guidance": torch.tensor([3.5, 1.0]),
            "prompt_attention_mask": torch.ones(2, text),
        }
        given["prompt_attention_mask"][0, 4:] = 0
        given["prompt_attention_mask_2"] = given["prompt_attention_mask"].flip(0)
        self.conditioning = {
            k: given[k] if k in given else torch.randn(2, *((text, s[1]) if len(s) == 2 else s))
            for k, s in self.family.conditioning_shapes.items()
        }
        self.catalogue = Catalogue(self.family.sites(), name)

    @torch.no_grad()
    def ours(self, network: nn.Module, ids: list[str]) -> dict[str, Tensor]:
        """What the package records of a network."""
        sites = [self.catalogue[activation] for activation in ids]
        recorder = recording.Recorder(network, sites)
        with recorder.recording(sites) as acts:
            self.family.call(network, self.z, self.timestep, self.conditioning, self.size)
        return {
            s.id: self.family.activation(network, s, recording.collect(acts, s), self.conditioning, self.grid, False)
            for s in sites
        }

    @torch.no_grad()
    def stock(self, monkeypatch: pytest.MonkeyPatch) -> Kept:
        """What the modules of the whole network receive and return in the stock network's own forward."""
        kept, running = Kept(self.tokens), ["no block yet"]

        def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any):
            scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
            if attn_mask is not None and attn_mask.dtype == torch.bool:
                nothing = ~attn_mask.any(-1, keepdim=True)  # a row of padding attends to nothing; NaN elsewhere stays
                probabilities = scores.masked_fill(~attn_mask, -torch.inf).softmax(-1).masked_fill(nothing, 0)
            else:
                probabilities = (scores if attn_mask is None else scores + attn_mask).softmax(-1)
            kept.maps[running[-1]] = probabilities
            return kept.maps[running[-1]] @ value

        monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
        with ExitStack() as hooks:
            for path, module in self.network.named_modules():
                if path.endswith(("attn", "attn1", "attn2", "attention")):
                    hooks.callback(module.register_forward_pre_hook(lambda *_, path=path: running.append(path)).remove)
                keep = lambda _, args, output, path=path: kept.add(path, args, output)  # noqa: E731
                hooks.callback(module.register_forward_hook(keep).remove)
            self.network(**arguments(self))  # of DiT's result, an unpatchify for squares, nothing is read
        return kept

    def expected(self, kept: Kept, activation: str) -> Tensor:
        """What the stock network has at an id."""
        block, kind = re.fullmatch(r"vit-block(\d+)-(.+)", activation).groups()
        at = blocks(self.network)[int(block)]
        if hasattr(self.network, "context_refiner"):
            return self._ragged(kept, at, kind)
        if kind.endswith("-map"):
            return self._map(kept, at, kind)
        if at.startswith("single") and (fused := self._fused(kept, at, kind)) is not None:
            return fused
        return kept.image(self._path(kept, at, kind))

    def _map(self, kept: Kept, at: str, kind: str) -> Tensor:
        block, n = self.network.get_submodule(at), self.tokens
        if kind == "self-map" and "sana" in type(self.network).__name__.lower():  # linear attention
            attention = block.attn1
            norms = [norm or nn.Identity() for norm in (attention.norm_q, attention.norm_k)]
            q, k = (
                norm(kept.image(f"{at}.attn1.to_{x}")).unflatten(-1, (2, -1)).transpose(1, 2).relu()
                for x, norm in zip("qk", norms, strict=True)
            )
            scores = q @ k.transpose(-1, -2)
            return scores / (scores.sum(-1, keepdim=True) + 1e-15)
        layer = f"{at}.attn" if hasattr(block, "attn") else f"{at}.attn1"
        if kind == "cross-map" and f"{at}.attn2" in kept.maps and layer.endswith("attn1"):
            return kept.maps[f"{at}.attn2"]
        p = kept.maps[layer]
        if p.shape[-1] == n:  # text and image are not one sequence
            return p
        if type(self.network).__name__.startswith("SD3"):  # the image stands before the text
            return p[:, :, :n, :n] if kind == "self-map" else p[:, :, :n, n:]
        return p[:, :, -n:, -n:] if kind == "self-map" else p[:, :, -n:, -n - TEXT : -n]

    def _fused(self, kept: Kept, at: str, kind: str) -> Tensor | None:
        """Where a single block has one projection for several activations, or one norm for two layers."""
        attention, n = f"{at}.attn", self.tokens
        if f"{attention}.to_qkv_mlp_proj" in kept:
            width = self.network.inner_dim
            if kind in ("q", "k", "v"):
                start = "qkv".index(kind) * width
                return kept.image(f"{attention}.to_qkv_mlp_proj")[..., start : start + width]
            if kind == "attn-out":
                return kept.last(f"{attention}.to_out<")[:, -n:, :width]
            if kind == "norm-out":
                return kept.image(f"{attention}.to_qkv_mlp_proj<")
        if kind == "norm-out" and f"{at}.proj_mlp" in kept:
            return kept.image(f"{at}.proj_mlp<")
        return None

    def _path(self, kept: Kept, at: str, kind: str) -> str:
        block, attention = self.network.get_submodule(at), "attn" if f"{at}.attn" in kept else "attn1"
        if kind == "ffn-inner":
            for inner in ("out_projection", "conv_point"):  # what closes it, where the inside has no module
                if hasattr(getattr(block, "ff", None), inner):
                    return f"{at}.ff.{inner}<"
            ends = ("ff.net.0", "ff.act_fn", "act_mlp", "attn.mlp_act_fn", "img_mlp.net.0")
            return next(f"{at}.{end}" for end in ends if f"{at}.{end}" in kept)
        joint, own, cross = f"{at}.{attention}", f"{at}.attn1", f"{at}.attn2"
        return {
            "out": at,
            "norm-out": f"{at}.{'img_mlp' if f'{at}.img_mlp' in kept else 'ff'}<",
            "attn-out": joint,
            **{x: f"{joint}.to_{x}" for x in "qkv"},
            "self-out": own,
            **{f"self-{x}": f"{own}.to_{x}" for x in "qkv"},
            "cross-q": f"{cross}.to_q",
            "cross-out": cross,
        }[kind]

    def _ragged(self, kept: Kept, at: str, kind: str) -> Tensor:
        """What a network does whose sequences are text and image (Lumina) or image and text, both filled up to
        multiples of 32 (Z-Image).
        """
        n, mask = self.tokens, self.conditioning["prompt_attention_mask"]
        filled = "t_scale" in self.network.config
        layer, inner = ("attention", "w2") if filled else ("attn", "linear_2")
        path = {
            "out": at,
            "attn-out": f"{at}.{layer}",
            "norm-out": f"{at}.feed_forward<",
            "ffn-inner": f"{at}.feed_forward.{inner}<",
        }.get(kind, f"{at}.{layer}.to_{kind}")
        rows = []
        for i, length in enumerate(mask.sum(1).int().tolist()):
            start = 0 if filled or at.startswith("noise_refiner") else length
            image, behind = slice(start, start + n), _up(n)
            words = slice(behind, behind + min(_up(length), mask.shape[1])) if filled else slice(length)
            if kind.endswith("map"):
                p = kept.maps[f"{at}.{layer}"][i, :, image]
                row = p[..., image] if kind == "self-map" else p[..., words]
                rows.append(F.pad(row, (0, mask.shape[1] - row.shape[-1])) if kind == "cross-map" else row)
            else:
                rows.append(kept.last(path)[i, image])
        return torch.stack(rows)


def _up(length: int) -> int:
    """The next multiple of 32."""
    return -(-length // 32) * 32


class Kept:
    """What modules received and returned: ``path`` is what one returned, ``path<`` its first argument.

    ``maps`` holds the probabilities of attention layers by path. A module may run on text and on image: what has as
    many positions as the image has ``tokens`` is the image's, and in a longer sequence the image comes last.
    """

    def __init__(self, tokens: int):
        self.tokens, self.maps = tokens, dict[str, Tensor]()
        self._tensors: dict[str, list[Tensor]] = {}

    def add(self, path: str, args: tuple[Any, ...], output: Any) -> None:
        """Keep a call of a module."""
        for key, values in ((path, output if isinstance(output, tuple) else (output,)), (f"{path}<", args[:1])):
            self._tensors.setdefault(key, []).extend(v for v in values if isinstance(v, Tensor) and v.ndim > 2)

    def __contains__(self, path: str) -> bool:
        return path in self._tensors

    def last(self, path: str) -> Tensor:
        """The last tensor at a path, whatever it is of."""
        return self._tensors[path][-1]

    def image(self, path: str) -> Tensor:
        """The tensor at a path that belongs to the image: tokens (B, N, C), or a map (B, C, h, w)."""
        values = self._tensors[path]
        [*own] = (v for v in values if v.ndim == 4 or v.shape[1] == self.tokens)
        return own[-1] if own else values[-1][:, -self.tokens :]


def blocks(network: nn.Module) -> list[str]:
    """Paths of the blocks of a network in the order in which they run, without those that run on the text alone."""
    lists = [name for name, child in network.named_children() if isinstance(child, nn.ModuleList)]
    unread = ("context_refiner", "caption_projection")
    return [f"{name}.{i}" for name in lists if name not in unread for i in range(len(getattr(network, name)))]


def arguments(case: Case) -> dict[str, Any]:
    """What the stock network takes for a case: written by hand where :data:`ARGUMENTS` has it, else its pipeline's."""
    write = ARGUMENTS.get(type(case.network).__name__)
    return write(case, case.conditioning) if write else from_pipeline(case)


def pipeline_class(network: str) -> type:
    """diffusers' pipeline from text to image whose ``transformer`` is of a class; of several, the plainest."""
    takes = [
        cls
        for cls in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values()
        if (p := inspect.signature(cls.__init__).parameters.get("transformer"))
        and network in re.findall(r"\w+", str(p.annotation))
    ]
    assert takes, f"no pipeline of diffusers takes a {network}: write its arguments into ARGUMENTS"
    return min(takes, key=lambda cls: len(cls.__name__))


def from_pipeline(case: Case) -> dict[str, Any]:
    """What a pipeline of diffusers gives to its network in its first step, with the latents and timestep of a case."""
    cls, vae, scheduler = (
        pipeline_class(type(case.network).__name__),
        case.family.image_encoder.build(),
        _scheduler(case),
    )
    parts = {"transformer": case.network, "vae": vae, "scheduler": scheduler}
    pipeline = cls(**{name: parts.get(name) for name in inspect.signature(cls.__init__).parameters if name != "self"})
    taken = inspect.signature(cls.__call__).parameters
    given = {k: v.bool() if k.startswith("prompt_attention_mask") else v for k, v in case.conditioning.items()}
    asked = {"output_type": "latent", "num_inference_steps": 1, "use_resolution_binning": False, "guidance_scale": 1.0}
    guidance = given.pop("guidance", None)
    given |= {"height": case.size[0], "width": case.size[1]} | {k: v for k, v in asked.items() if k in taken}
    if "prompt_attention_mask" not in given and "prompt_attention_mask" in taken:
        given["prompt_attention_mask"] = torch.ones(given["prompt_embeds"].shape[:2], dtype=torch.bool)
    unread = given.keys() - taken.keys()
    assert not unread, (
        f"{cls.__name__} does not take {sorted(unread)}: write the arguments of its network into ARGUMENTS"
    )
    call = _first_call(case.network, lambda: pipeline(**given))
    first, said, t = scheduler.timesteps[0], call["timestep"].flatten()[0], case.timestep.float()
    backwards = torch.isclose(said.float(), 1 - first / 1000)  # some networks count from noise to image
    call["timestep"] = (1 - t / 1000 if backwards else t * (said / first)).to(call["timestep"].dtype)
    call["hidden_states"] = _packed(case.z, call["hidden_states"])
    return call | ({} if guidance is None else {"guidance": guidance})


def _scheduler(case: Case) -> Any:
    config = package_configs(db.get_checkpoint(FIRST[family_of(case.name)]))["scheduler"]
    infinite = {key: float(value) for key, value in config.items() if value == "-Infinity"}  # as diffusers writes it
    return getattr(diffusers, config["_class_name"]).from_config({**config, **infinite})


class _CalledError(Exception):
    """The network was called, which is all that was to be seen."""


def _first_call(network: nn.Module, run: Callable[[], Any]) -> dict[str, Any]:
    seen: dict[str, Any] = {}

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.update(inspect.signature(network.forward).bind(*args, **kwargs).arguments)
        raise _CalledError

    handle = network.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with pytest.raises(_CalledError):
            run()
    finally:
        handle.remove()
    return seen


def _packed(z: Tensor, like: Tensor) -> Tensor:
    """(B, C, h, w) latents in the form of ``like``: the same, or tokens (B, N, C · p · p) of p x p positions."""
    if like.ndim == 4:
        return z
    b, c, h, w = z.shape
    p = round((like.shape[-1] / c) ** 0.5)
    return z.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // p**2, c * p * p)


def _dit(case: Case, c: dict[str, Tensor]) -> dict[str, Any]:
    return {"hidden_states": case.z, "timestep": case.timestep.float(), "class_labels": c["class_labels"]}


def _pixart(case: Case, c: dict[str, Tensor]) -> dict[str, Any]:
    h, w = case.size
    sizes = {"resolution": torch.tensor([[h, w]] * 2).float(), "aspect_ratio": torch.tensor([[h / w]] * 2)}
    return _masked(case, c) | ({"added_cond_kwargs": sizes} if case.network.use_additional_conditions else {})


def _masked(case: Case, c: dict[str, Tensor]) -> dict[str, Any]:
    return {
        "hidden_states": case.z,
        "timestep": case.timestep.float(),
        "encoder_hidden_states": c["prompt_embeds"],
        "encoder_attention_mask": c["prompt_attention_mask"],
    }


def _sd3(case: Case, c: dict[str, Tensor]) -> dict[str, Any]:
    return {
        "hidden_states": case.z,
        "timestep": case.timestep.float(),
        "encoder_hidden_states": c["prompt_embeds"],
        "pooled_projections": c["pooled_prompt_embeds"],
    }


def _flux(case: Case, c: dict[str, Tensor]) -> dict[str, Any]:
    h, w = case.grid
    return _sd3(case, c) | {
        "hidden_states": diffusers.FluxPipeline._pack_latents(case.z, 2, 16, 2 * h, 2 * w),
        "timestep": case.timestep / 1000,
        "img_ids": diffusers.FluxPipeline._prepare_latent_image_ids(2, h, w, "cpu", torch.float32),
        "txt_ids": torch.zeros(TEXT, 3),
        "guidance": c.get("guidance"),
    }


def _hunyuan(case: Case, c: dict[str, Tensor]) -> dict[str, Any]:
    config, grid = case.network.config, case.grid
    corners = get_resize_crop_region_for_grid(grid, 32)
    stock = {
        "hidden_states": case.z,
        "timestep": case.timestep.float(),
        "encoder_hidden_states": c["prompt_embeds"],
        "text_embedding_mask": c["prompt_attention_mask"],
        "encoder_hidden_states_t5": c["prompt_embeds_2"],
        "text_embedding_mask_t5": c["prompt_attention_mask_2"],
        "image_rotary_emb": get_2d_rotary_pos_embed(config.attention_head_dim, corners, grid, output_type="pt"),
    }
    if config.use_style_cond_and_image_meta_size:
        meta = torch.tensor([[*case.size, *case.size, 0, 0]] * 2).float()
        stock |= {"image_meta_size": meta, "style": torch.zeros(2).long()}
    return stock


def _auraflow(case: Case, c: dict[str, Tensor]) -> dict[str, Any]:
    return {"hidden_states": case.z, "timestep": case.timestep / 1000, "encoder_hidden_states": c["prompt_embeds"]}


def _flux2(case: Case, c: dict[str, Tensor]) -> dict[str, Any]:
    pipeline = diffusers.Flux2Pipeline
    return {
        "hidden_states": pipeline._pack_latents(case.z),
        "timestep": case.timestep / 1000,
        "encoder_hidden_states": c["prompt_embeds"],
        "guidance": c.get("guidance"),
        "img_ids": pipeline._prepare_latent_ids(case.z),
        "txt_ids": pipeline._prepare_text_ids(c["prompt_embeds"]),
    }


def _qwen(case: Case, c: dict[str, Tensor]) -> dict[str, Any]:
    return {
        "hidden_states": diffusers.QwenImagePipeline._pack_latents(case.z, *case.z.shape),
        "timestep": case.timestep / 1000,
        "encoder_hidden_states": c["prompt_embeds"],
        "encoder_hidden_states_mask": c["prompt_attention_mask"],
        "img_shapes": [[(1, *case.grid)]] * 2,
    }


def _lumina(case: Case, c: dict[str, Tensor]) -> dict[str, Any]:
    mask = c["prompt_attention_mask"].long()
    return _masked(case, c) | {"timestep": 1 - case.timestep / 1000, "encoder_attention_mask": mask}


def _z_image(case: Case, c: dict[str, Tensor]) -> dict[str, Any]:
    rows = zip(c["prompt_embeds"], c["prompt_attention_mask"].sum(1).int(), strict=True)
    return {
        "x": [z[:, None] for z in case.z],
        "t": 1 - case.timestep / 1000,
        "cap_feats": [row[:length] for row, length in rows],
    }


ARGUMENTS: dict[str, Callable[[Case, dict[str, Tensor]], dict[str, Any]]] = {
    "DiTTransformer2DModel": _dit,
    "PixArtTransformer2DModel": _pixart,
    "SanaTransformer2DModel": _masked,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "HunyuanDiT2DModel": _hunyuan,
    "AuraFlowTransformer2DModel": _auraflow,
    "Flux2Transformer2DModel": _flux2,
    "QwenImageTransformer2DModel": _qwen,
    "Lumina2Transformer2DModel": _lumina,
    "ZImageTransformer2DModel": _z_image,
}
"""Class of a network -> its arguments for a case, as a reader of diffusers' pipeline writes them."""
