"""Single ``.safetensors`` files: a whole checkpoint in its authors' layout, or a denoiser alone in any names.

diffusers' own converters rename, cut and join the stored tensors. They run on ``meta`` tensors, so nothing is read;
what they did is repeated when weights are read.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from diffusion_backbones.families import FAMILIES, Architecture
from diffusion_backbones.loading import fingerprint, layouts
from diffusion_backbones.loading.looks_like import difference, has_layers, readers
from diffusion_backbones.loading.source import digest, modern_attention
from diffusion_backbones.loading.what_it_is import what_a_file_is
from diffusion_backbones.ops.conversion import ConvertedFiles
from diffusion_backbones.ops.safetensors_io import TensorFiles
from diffusion_backbones.spec.configs import Config, Configs

log = logging.getLogger(__name__)

AVERAGED = "model_ema."
ENDS_IN_NOISE = "ztsnr"
"""An empty tensor by which trainers mark a schedule without signal at its last step."""
_CLIP = {
    "text_encoder": (
        "cond_stage_model.clip_l.",
        "conditioner.embedders.0.clip_l.",
        "text_encoders.clip_l.",
        "cond_stage_model.",
        "conditioner.embedders.0.",
    ),
    "text_encoder_2": (
        "conditioner.embedders.1.clip_g.",
        "text_encoders.clip_g.",
        "conditioner.embedders.1.",
    ),
}
"""Text encoder -> what stands before its names; the first that is there counts."""
_T5 = ("text_encoders.t5xxl.", "text_encoders.pile_t5xl.")
_IMAGE_ENCODER = ("first_stage_model.", "vae.")
_HINT = "Is it a file of another architecture?"
_UNREADABLE = (KeyError, IndexError, RuntimeError, ValueError, AttributeError)
"""What diffusers' converters raise for names and shapes that they do not expect."""


class SingleFile:
    """A single-file checkpoint. Such a file has no configs, so they are those that are declared, or of its base.

    Args:
        path: The file.
        configs: Component -> config of the declared checkpoint or of the base.

    Raises:
        ValueError: It is not a safetensors file.
    """

    def __init__(self, path: Path, configs: Configs):
        self.path, self._stored = path, TensorFiles([path])
        self._configs = self._with_schedule(configs)
        self.provenance = {"path": str(path)}

    def __str__(self) -> str:
        return str(self.path)

    def names(self) -> list[str]:
        """The names of all tensors as they are stored."""
        return list(self._stored.shapes)

    def has(self, component: str) -> bool:
        """Whether the file holds a part of a checkpoint; of tokenizers, what the empty prompt needs."""
        if component.startswith("tokenizer"):
            return component in self._configs
        if component == "vae":
            return any(name.startswith(_IMAGE_ENCODER) for name in self._stored.shapes)
        if component.startswith("text_encoder"):
            return bool(self._text_prefix(component))
        return bool(layouts.denoiser_names(self._stored.shapes))

    def check(self, network: Architecture, wanted: str) -> None:
        """Check that this is a file of a network's kind, before anything is read.

        Args:
            network: What was asked for.
            wanted: Names it in errors.

        Raises:
            ValueError: It is something else; what, and what to do with it, is said.
        """
        if other := what_a_file_is(self.path, self._stored.shapes):
            raise ValueError(f"{self.path} {other}")
        for name in ("edm_mean", "edm_std"):
            if name in self._stored:
                raise ValueError(
                    f"{self.path} holds {name}: its latents are normalized and its noise is scheduled in another way "
                    f"(EDM), which no config beside it says; give a folder in the diffusers layout"
                )
        if not self.has(network.denoiser):
            return
        names, family = layouts.denoiser_names(self._stored.shapes), type(network)
        author = layouts.author(names)
        if not layouts.named_as_diffusers(names, network) and author != _name(family):
            raise ValueError(self._another(author, names, wanted, network))
        if not layouts.named_as_diffusers(names, network) and not layouts.converter(family):
            raise ValueError(
                f"{self.path} has the names of the authors of {family.__name__}, for which diffusers has no converter; "
                f"give a folder in the diffusers layout, or a file of its {network.denoiser}/"
            )

    def check_sizes(self, network: Architecture, wanted: str, widths: bool = True) -> None:
        """Check that the denoiser's layers are those of a network, of its ``widths`` or of any; other arguments and
        errors as for :meth:`check`.
        """
        if not self.has(network.denoiser):
            return
        shapes = self.converted(network)
        if not widths and shapes is not None and has_layers(shapes, network):
            return
        how = "it lacks layers" if shapes is None else difference(shapes, network)
        said = readers(layouts.denoiser_names(self._stored.shapes), self.converted) if how else ""
        if shapes is None and not said:
            self._denoiser(network)  # says why the converter does not read it
        if how:
            raise ValueError(f"{self.path} is not a file of {wanted}: {how}. {said}".rstrip())

    def _another(self, author: str | None, names: Mapping[str, str], wanted: str, network: Architecture) -> str:
        head = f"{self.path} holds no {network.denoiser} of the kind of {wanted}"
        if author is None and (called := layouts.stranger(names)):
            return f"{head}: by its names it is of {called}, which is not read."
        if said := readers(names, self.converted):
            return f"{head}. {said}"
        if author:
            return f"{head}: it has the names that the authors of {FAMILIES[author].__name__} give."
        few = ", ".join(list(self._stored.shapes)[:3])
        return f"{head}, nor another that is known here; its first tensors are {few}."

    def configs(self, family: type[Architecture]) -> Configs:  # noqa: ARG002  (a folder's)
        """The declared configs, or those of the base."""
        return self._configs

    def over(self, configs: Configs, family: type[Architecture]) -> Configs:  # noqa: ARG002  (a folder's)
        """The configs of a base, or the declared ones where there is none."""
        return self._with_schedule(configs) or self._configs

    def _with_schedule(self, configs: Configs) -> Configs:
        """Configs with what the file itself says of its noise."""
        scheduler = configs.get("scheduler")
        if ENDS_IN_NOISE not in self._stored or scheduler is None:
            return configs
        return {**configs, "scheduler": {**scheduler, "rescale_betas_zero_snr": True}}

    def text_config(self, component: str) -> Config:
        """The config of a text encoder."""
        config: Config = self._configs[component]
        return config

    def converted(self, network: Architecture) -> Mapping[str, tuple[int, ...]] | None:
        """Name -> shape of the denoiser's tensors in diffusers' names, as a network's config says; None where it has
        other tensors than that.
        """
        try:
            return self._denoiser(network).shapes
        except ValueError:
            return None

    def tensors(self, component: str, half: bool) -> TensorFiles:
        """The weights of the denoiser or of the ``vae``, under diffusers' names; see
        :meth:`diffusion_backbones.loading.source.Source.tensors`.

        Raises:
            ValueError: The file does not hold it.
        """
        if component == "vae":
            files = self._image_encoder()
        else:
            if component == "unet" and any(name.startswith(AVERAGED) for name in self._stored.shapes):
                log.warning("%s holds averaged (EMA) weights too; the others are read, as diffusers does", self.path)
            files = self._denoiser(self._network(component))
        if not half and files.shapes and files.dtype(next(iter(files.shapes))).itemsize == 2:
            log.warning(
                "%s has the weights of %s in 16 bits only, and they are used in higher precision", self.path, component
            )
        return files

    def _network(self, component: str) -> Architecture:
        family = next(f for f in FAMILIES.values() if f.denoiser == component and f.matches(self._configs[component]))
        return family(self._configs)

    def _denoiser(self, network: Architecture) -> TensorFiles:
        names = layouts.denoiser_names(self._stored.shapes)
        convert = None if layouts.named_as_diffusers(names, network) else layouts.converter(type(network))
        if convert is None:
            files = self._stored.renamed({modern_attention(name): stored for name, stored in names.items()})
            files.hint = _HINT
            return files
        prefix = layouts.MARK if network.denoiser == "unet" else ""  # that converter wants it, others take it off
        try:
            files = ConvertedFiles(
                self._stored,
                {prefix + name: stored for name, stored in names.items()},
                lambda state: convert(state, config=dict(network.config)),
            )
        except _UNREADABLE as error:
            raise ValueError(
                f"{self.path}: diffusers' converter for {type(network).__name__} does not read it ({error!r}); convert "
                "it where it comes from to the diffusers layout"
            ) from error
        files.hint = _HINT
        return files

    def _image_encoder(self) -> TensorFiles:
        from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

        names = [name for name in self._stored.shapes if name.startswith(_IMAGE_ENCODER)]
        config = self._configs["vae"]
        known = SINGLE_FILE_LOADABLE_CLASSES.get(config.get("_class_name", "AutoencoderKL"))
        if known is None:
            raise ValueError(f"{self.path}: diffusers has no converter for the image encoder {config['_class_name']}")
        convert = known["checkpoint_mapping_fn"]
        try:
            return ConvertedFiles(
                self._stored,
                {name: name for name in names},
                lambda state: convert(state, config=dict(config)),
            )
        except _UNREADABLE as error:
            raise ValueError(
                f"{self.path}: diffusers' converter does not read its image encoder ({error!r})"
            ) from error

    def text(self, component: str, words: Path | None = None) -> tuple[Any, Any]:
        """Tokenizer and text model, in float32 on the CPU.

        Args:
            component: Name of its folder in the diffusers layout.
            words: The folder of a tokenizer; without it only the empty prompt is encoded.

        Raises:
            FileNotFoundError: The file does not hold it.
        """
        from diffusion_backbones.families.text import clip, language_model, reading, tokenizers

        config = reading.read_config(self.text_config(component), f"{self.path}: the config of {component}")
        [kind] = config["architectures"]
        prefix = self._text_prefix(component)
        if not prefix:
            raise FileNotFoundError(f"{self.path} holds no {component}, so the prompt cannot be encoded")
        weights, behind = self._text_weights(prefix, config)
        build = language_model.text_model if kind in language_model.ARCHITECTURES else clip.text_model
        model = build(config, weights, f"{self.path} (behind {behind!r})")
        if words is None:
            blank = self._configs[component.replace("text_encoder", "tokenizer")]
            return clip.BlankTokenizer(**blank), model
        tokenizer = tokenizers.load(words, kind)
        tokenizers.fit(tokenizer, model, words)
        return tokenizer, model

    def tokenizer_folder(self, component: str) -> Path:
        """Raise ``FileNotFoundError``: such a file has no vocabulary."""
        raise FileNotFoundError(f"{self.path} holds no {component}, so prompts cannot be encoded")

    def _text_prefix(self, component: str) -> str:
        """What stands before the names of a text encoder; empty where there is none."""
        known = _T5 if self._is_t5(component) else _CLIP.get(component, ())
        return next((p for p in known if any(name.startswith(p) for name in self._stored.shapes)), "")

    def _is_t5(self, component: str) -> bool:
        return "T5" in str((self._configs.get(component) or {}).get("architectures"))

    def _text_weights(self, prefix: str, config: Config) -> tuple[dict[str, Tensor], str]:
        """A text encoder's weights under transformers' names, of which the file has those or OpenCLIP's. What lies
        beside the transformer (``logit_scale`` and other companions) is left, as diffusers' converter leaves it.
        Beside them, what stands before their names in the file.
        """
        from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

        names = [name for name in self._stored.shapes if name.startswith(prefix)]
        inner = f"{prefix}model." if any(name.startswith(f"{prefix}model.") for name in names) else prefix
        if any(name.startswith(f"{inner}transformer.resblocks.") for name in names):
            like = SimpleNamespace(config=SimpleNamespace(hidden_size=config["hidden_size"]))
            converted: dict[str, Tensor] = convert_open_clip_checkpoint(like, self._read(names), inner)
            layers = config["num_hidden_layers"]  # SD 2.x leaves the last one out
            return {name: tensor for name, tensor in converted.items() if _layer(name) < layers}, inner
        inside = f"{inner}transformer."
        behind = inside if any(name.startswith(inside) for name in names) else inner
        read = self._read([name for name in names if name.startswith(behind)])
        return {name.removeprefix(behind): tensor for name, tensor in read.items()}, behind

    def _read(self, names: list[str]) -> dict[str, Tensor]:
        return dict(self._stored.read(names, torch.float32, torch.device("cpu")))

    def text_fingerprint(self) -> str:
        """A string that changes with the content of the file, and with the declared configs of its text encoders."""
        declared = {name: config for name, config in self._configs.items() if name.startswith("t")}
        return digest([fingerprint.content(self.path), json.dumps(declared, sort_keys=True, default=str)])


def _name(family: type[Architecture]) -> str:
    return next(name for name, known in FAMILIES.items() if known is family)


def _layer(name: str) -> int:
    found = re.search(r"encoder\.layers\.(\d+)\.", name)
    return int(found[1]) if found else -1
