"""Single ``.safetensors`` files in the original latent-diffusion layout: one file with U-Net, VAE and text encoder.

diffusers' own converters say which stored tensor becomes which; they are run on ``meta`` tensors, so nothing is read, and
the renaming that they did is applied lazily.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_backbones.families import Configs, Family
from diffusion_backbones.sources import _digest
from diffusion_backbones.tensors import TensorFiles

MARK = "model.diffusion_model."


class SingleFile:
    """A single-file checkpoint. The architecture is the declared one, since such a file has no config.

    Args:
        path: The file.
        configs: Component -> config of the declared checkpoint.
        config_folder: Folder with those configs as files, for the text encoders.
    """

    def __init__(self, path: Path, configs: Configs, config_folder: Path):
        self.path, self._configs, self._config_folder = path, configs, config_folder
        self._stored = TensorFiles([path])
        self.provenance = {"path": str(path)}

    def configs(self, family: Family) -> Configs:
        return self._configs

    def tensors(self, component: str, half: bool) -> TensorFiles:
        from diffusers.loaders import single_file_utils as convert

        fakes = {name: torch.empty(shape, device="meta") for name, shape in self._stored.shapes.items()}
        convert_component = {"unet": convert.convert_ldm_unet_checkpoint, "vae": convert.convert_ldm_vae_checkpoint}[component]
        converted: dict[str, Tensor] = convert_component(dict(fakes), config=dict(self._configs[component]))
        stored = {id(fake): name for name, fake in fakes.items()}
        names = {new: stored[id(t) if id(t) in stored else id(t._base)] for new, t in converted.items()}
        if not names:
            raise ValueError(f"{self.path} holds no {component} in the original layout (names that start with {MARK!r} and so on)")
        files = self._stored.renamed(names)
        files.shapes = {new: tuple(t.shape) for new, t in converted.items()}
        return files

    def text(self, component: str) -> tuple[Any, Any]:
        import transformers
        from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm

        from diffusion_backbones.families.clip import BlankTokenizer

        prefixes = ("cond_stage_model.", "conditioner.embedders.")
        names = [name for name in self._stored.shapes if name.startswith(prefixes)]
        if not names:
            raise FileNotFoundError(f"{self.path} holds no text encoder; give prompt_embeds=, or a diffusers folder")
        cls = getattr(transformers, self._configs[component]["architectures"][0])
        weights = dict(self._stored.read(names, lambda _: torch.float32, torch.device("cpu")))
        model = create_diffusers_clip_model_from_ldm(cls, weights, subfolder=component, config=str(self._config_folder), torch_dtype=torch.float32, local_files_only=True)
        number = component.removeprefix("text_encoder")
        return BlankTokenizer(**self._configs[f"tokenizer{number}"]), model

    def text_fingerprint(self) -> str:
        stat = self.path.stat()
        return _digest([str(self.path.resolve()), str(stat.st_size), str(stat.st_mtime_ns)])


def is_single_file(files: TensorFiles) -> bool:
    """Whether a file is in the original layout."""
    return any(name.startswith(MARK) for name in files.shapes)
