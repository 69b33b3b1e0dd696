"""A feature extractor of timm with the interface of a backbone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_backbones.backbone.contract import Backbone
from diffusion_backbones.backbone.device import check_device
from diffusion_backbones.backbone.fusion.copies import freeze_unread, frozen_view
from diffusion_backbones.backbone.fusion.timm_networks import check_any_size, network
from diffusion_backbones.backbone.state import compute_dtype
from diffusion_backbones.ops.describe import shape
from diffusion_backbones.ops.tensor_checks import FLOATING
from diffusion_backbones.spec.checkpoint import License
from diffusion_backbones.spec.fusion import TimmModel
from diffusion_backbones.spec.input_format import InputFormat
from diffusion_backbones.spec.levels import OutMap, take

ON_THE_HUB = ("apache-2.0", "mit", "bsd-3-clause", "cc-by-nc-4.0")
"""Licences that timm states by the names that the Hugging Face hub has for them."""


class TimmExtractor(Backbone):
    """A network that ``timm.create_model(..., features_only=True)`` gives: frozen and in eval mode, for images of any
    size.

    Args:
        declaration: What it is.
        net: timm's network.
        trainable: Whether it is trained: what of it needs gradients, as far as its maps depend on it.

    Raises:
        ValueError: It takes images of its own size alone.

    Attributes:
        input_format: As its ``pretrained_cfg`` says.
        kept: Positions among timm's maps of those that it returns.
    """

    def __init__(self, declaration: TimmModel, net: nn.Module, trainable: bool = False):
        super().__init__()
        cfg: Any = net.pretrained_cfg
        self.net = net if trainable else frozen_view(net)  # whoever made it may train it elsewhere
        self.trainable, self.provenance = trainable, {}
        self.input_format = InputFormat(tuple(cfg["mean"]), tuple(cfg["std"]))
        self.declaration = _completed(declaration, cfg)
        info: Any = net.feature_info
        self._maps = [OutMap(c, r, i) for i, (c, r) in enumerate(zip(info.channels(), info.reduction(), strict=True))]
        self._names = list(info.module_name())
        self._channels_last = "NHWC" in str(getattr(net, "output_fmt", ""))
        self.kept = list(range(len(self._maps)))
        check_any_size(self.declaration.name, net, self.size_divisibility)
        freeze_unread(self, self.kept)
        self.train(self.training)

    @property
    def out_maps(self) -> list[OutMap]:
        """Channels and stride of every map."""
        return [self._maps[i] for i in self.kept]

    @property
    def module_names(self) -> list[str]:
        """timm's names of the modules that each map is read from."""
        return [self._names[i] for i in self.kept]

    @property
    def activations(self) -> list[tuple[str, ...]]:
        """The same, one each."""
        return [(name,) for name in self.module_names]

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.net.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return compute_dtype(self.net)

    @property
    def widest_map(self) -> float:
        """Values of the widest of its maps, for every pixel."""
        return max(m.channels / m.stride**2 for m in self._maps)

    @property
    def configs(self) -> Mapping[str, Any]:
        """timm's description of the network."""
        cfg = self.pretrained_cfg
        return {key: cfg[key] for key in ("architecture", "tag", "input_size", "mean", "std") if key in cfg}

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """timm's own."""
        cfg: Any = self.net.pretrained_cfg
        return dict(cfg)

    @property
    def size_divisibility(self) -> int:
        """What images are padded to a multiple of, in pixels. Any size is accepted."""
        return math.lcm(*(m.stride for m in self._maps))

    def forward(self, x: Tensor, indices: int | Sequence[int] | None = None) -> list[Tensor]:
        """Images -> maps.

        Args:
            x: (B, 3, H, W) in ``input_format``, any H and W; padded with its last pixels on the right and bottom.
            indices: Which maps, by position; an integer n means the last n. All by default.

        Returns:
            Maps (B, C_i, ceil(H / s_i), ceil(W / s_i)), as the network gives them, fine to coarse.
        """
        chosen, (height, width) = take(indices, len(self.kept)), x.shape[-2:]
        check_device("images", x, self.net, self.declaration.name)
        d = self.size_divisibility
        padded = F.pad(x, (0, -width % d, 0, -height % d), mode="replicate") if height % d or width % d else x
        maps = self.net(padded.to(self.dtype))
        out = []
        for position in (self.kept[i] for i in chosen):
            m = maps[position].permute(0, 3, 1, 2) if self._channels_last else maps[position]
            stride = self._maps[position].stride
            out.append(m[..., : -(-height // stride), : -(-width // stride)].contiguous())
        return out

    def encode(self, x: Tensor) -> Tensor:
        """The images themselves: what it computes depends on them alone."""
        return x

    def forward_latents(
        self, z: Tensor, size: tuple[int, int] | None = None, indices: int | Sequence[int] | None = None
    ) -> list[Tensor]:
        """What :meth:`encode` gives -> maps, as :meth:`forward`.

        Raises:
            ValueError: It is something else, or of another size.
        """
        fits = isinstance(z, Tensor) and z.ndim == 4 and z.shape[1] == 3 and z.dtype in FLOATING
        if not fits or (size is not None and tuple(z.shape[-2:]) != tuple(size)):
            of = f" of {size[0]} x {size[1]} pixels" if size else ""
            raise ValueError(
                f"{self.declaration.name} has no latents: encode() gives its images (B, 3, H, W){of}, got {shape(z)}"
            )
        return self.forward(z, indices)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Return only some maps. Returns the positions that were kept."""
        chosen = take(indices, len(self.kept))
        self.kept = [self.kept[i] for i in chosen]
        freeze_unread(self, range(len(self.kept)))
        return chosen

    def fill_buffers(self) -> None:
        """Compute the buffers that are in no file, as timm does, where a loader left them without values."""
        kept = self.state_dict()
        missing = [name for name, _ in self.named_buffers() if name not in kept]
        if missing:
            new = extractor(self.declaration, device=torch.device("cpu"))
            for name in missing:
                owner, _, leaf = name.rpartition(".")
                tensor = new.get_buffer(name).to(self.device)
                self.get_submodule(owner).register_buffer(leaf, tensor, persistent=False)

    def train(self, mode: bool = True) -> TimmExtractor:
        """Only a trainable network leaves eval, whatever a framework calls."""
        super().train(mode and bool(self.trainable))
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade compute for memory while it is trained, where timm can."""
        net: Any = getattr(self.net, "model", self.net)
        if hasattr(net, "set_grad_checkpointing"):
            net.set_grad_checkpointing(enable)


def extractor(
    model: TimmModel,
    pretrained: bool = False,
    *,
    checkpoint_path: str | Path | None = None,
    cache_dir: str | Path | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    trainable: bool = False,
) -> TimmExtractor:
    """Build a feature extractor of timm.

    Args:
        model: Which.
        pretrained: Whether timm downloads its weights.
        checkpoint_path: A ``.safetensors`` file of the whole network in place of that, as timm writes and reads it.
        cache_dir: huggingface_hub's cache folder.
        device, dtype: Where, and in what, it computes.
        trainable: Whether it is trained.

    Raises:
        FileNotFoundError: There is no such file.
        KeyError: timm has no such model; the closest are named.
        ValueError: It gives no feature maps, or takes images of one size alone; or the weights are in a pickle, do not
            fit or are not whole.
    """
    net, indices = network(model, pretrained, checkpoint_path=checkpoint_path, cache_dir=cache_dir, device=device)
    built = TimmExtractor(replace(model, out_indices=indices), net.to(dtype), trainable).eval()
    if checkpoint_path:
        built.provenance = {"path": str(checkpoint_path)}
    elif pretrained:
        built.provenance = {"repo": str(built.pretrained_cfg.get("hf_hub_id") or built.pretrained_cfg.get("url"))}
    return built


def _completed(model: TimmModel, cfg: Mapping[str, Any]) -> TimmModel:
    """The declaration with timm's own facts where it has none."""
    license = model.license  # noqa: A001  (the field's name)
    if not license.verified and cfg.get("license"):
        found = str(cfg["license"])
        license = License(found) if found in ON_THE_HUB else License("other", name=found)  # noqa: A001
    size = model.input_size or int(cfg["input_size"][-1])
    return replace(model, license=license, input_size=size, title=model.title or model.name)
