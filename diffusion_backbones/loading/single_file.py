"""Single ``.safetensors`` files in the original latent-diffusion layout: one file with U-Net, VAE and text encoder.

diffusers' own converters rename the stored tensors. They run on ``meta`` tensors, so nothing is read; the new names are
looked up when weights are read.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from diffusion_backbones.families import Architecture
from diffusion_backbones.loading import fingerprint
from diffusion_backbones.loading.source import digest
from diffusion_backbones.ops.safetensors_io import TensorFiles
from diffusion_backbones.spec.configs import Config, Configs

log = logging.getLogger(__name__)

MARK = "model.diffusion_model."
AVERAGED = "model_ema."
_TEXT = {
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0."),
    "text_encoder_2": ("conditioner.embedders.1.",),
}


class SingleFile:
    """A single-file checkpoint of a U-Net. Its configs are those that are declared, since such a file has none.

    Args:
        path: The file.
        configs: Component -> config of the declared checkpoint.

    Raises:
        ValueError: It is not a safetensors file.
    """

    def __init__(self, path: Path, configs: Configs):
        self.path, self._configs = path, configs
        self._stored = TensorFiles([path])
        self.provenance = {"path": str(path)}

    def configs(self, family: type[Architecture]) -> Configs:
        """The declared configs.

        Raises:
            ValueError: The denoiser is not a U-Net, whose names alone are known.
        """
        if family.denoiser != "unet":
            raise ValueError(
                f"{self.path} is a single file in the original layout, which is read for U-Nets alone; give a folder "
                f"in the diffusers layout, with {family.denoiser}/"
            )
        return self._configs

    def tensors(self, component: str, half: bool) -> TensorFiles:
        """The weights of ``unet`` or ``vae``, under diffusers' names; see
        :meth:`diffusion_backbones.loading.source.Source.tensors`.

        Raises:
            ValueError: The file does not hold it.
        """
        from diffusers.loaders import single_file_utils as convert

        fakes = {
            name: torch.empty(shape, device="meta")
            for name, shape in self._stored.shapes.items()
            if not name.startswith(AVERAGED)
        }
        if component == "unet" and len(fakes) < len(self._stored.shapes):
            log.warning("%s holds averaged (EMA) weights too; the others are read, as diffusers does", self.path)
        convert_component = {"unet": convert.convert_ldm_unet_checkpoint, "vae": convert.convert_ldm_vae_checkpoint}[
            component
        ]
        converted: dict[str, Tensor] = convert_component(dict(fakes), config=dict(self._configs[component]))
        if not converted:
            raise ValueError(
                f"{self.path} holds no {component} in the original layout, where names begin with {MARK!r} or "
                "'first_stage_model.'"
            )
        stored = {id(fake): name for name, fake in fakes.items()}
        names = {new: stored[id(t) if id(t) in stored else id(t._base)] for new, t in converted.items()}
        files = self._stored.renamed(names)
        if not half and files.dtype(next(iter(names))).itemsize == 2:
            log.warning(
                "%s has the weights of %s in 16 bits only, and they are used in higher precision", self.path, component
            )
        files.shapes = {new: tuple(t.shape) for new, t in converted.items()}  # some are stored as 1 x 1 convolutions
        return files

    def text(self, component: str) -> tuple[Any, Any]:
        """Tokenizer and text model, in float32 on the CPU.

        Raises:
            FileNotFoundError: The file does not hold it.
        """
        from diffusion_backbones.families.text import clip

        config = self._configs[component]
        tokenizer = clip.BlankTokenizer(**self._configs[component.replace("text_encoder", "tokenizer")])
        return tokenizer, clip.text_model(config, self._text_weights(component, config), str(self.path))

    def _text_weights(self, component: str, config: Config) -> dict[str, Tensor]:
        """A text encoder's weights under transformers' names; the file has them in one of two layouts."""
        from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

        names = [name for name in self._stored.shapes if name.startswith(_TEXT[component])]
        if not names:
            raise FileNotFoundError(
                f"{self.path} holds no {component}, so the prompt cannot be encoded; give a file that holds it, or a "
                "diffusers folder"
            )
        weights = dict(self._stored.read(names, torch.float32, torch.device("cpu")))
        prefix = next(prefix for prefix in _TEXT[component] if names[0].startswith(prefix))
        if any(name.startswith(f"{prefix}transformer.") for name in names):
            return {name.removeprefix(f"{prefix}transformer."): tensor for name, tensor in weights.items()}
        like = SimpleNamespace(config=SimpleNamespace(hidden_size=config["hidden_size"]))
        converted: dict[str, Tensor] = convert_open_clip_checkpoint(like, weights, f"{prefix}model.")
        return {
            name: tensor for name, tensor in converted.items() if _layer(name) < config["num_hidden_layers"]
        }  # SD 2.x leaves the last one out

    def text_fingerprint(self) -> str:
        """A string that changes with the content of the file, and with the declared configs of its text encoders."""
        declared = {name: config for name, config in self._configs.items() if name.startswith("t")}
        return digest([fingerprint.content(self.path), json.dumps(declared, sort_keys=True, default=str)])


def _layer(name: str) -> int:
    found = re.search(r"encoder\.layers\.(\d+)\.", name)
    return int(found[1]) if found else -1


def is_single_file(files: TensorFiles) -> bool:
    """Whether a file is in the original layout."""
    return any(name.startswith(MARK) for name in files.shapes)
