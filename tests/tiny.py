"""Tiny checkpoints of the real topologies, in the real formats, with random weights.

``folder(name, path)`` writes what a hub repository of that checkpoint holds: denoiser, VAE, scheduler, text encoders
and tokenizers. Depths, block types, conditioning and flags are the declared ones; only widths shrink.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from diffusion_backbones.families import FAMILIES, architecture
from diffusion_backbones.families.text import language_model
from diffusion_backbones.families.tiny import T5, shrink_vae
from diffusion_backbones.families.unet import latent
from diffusion_backbones.spec.activations import Catalogue
from diffusion_backbones.spec.configs import CONFIGS, package_configs
from diffusion_backbones.spec.recipe import Recipe
from diffusion_backbones.spec.registry import get_checkpoint, get_declaration

TOKENIZER = CONFIGS / "tinysd" / "tokenizer"
CROSS, POOLED, TIME = latent.CROSS, latent.POOLED, latent.TIME
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content if m.content is string else m.content[0].text "
    "}}<|im_end|>\n{% endfor %}"
)
CHAT += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def configs(name: str) -> dict[str, dict[str, Any]]:
    """The configs of a registered checkpoint, shrunk."""
    checkpoint = get_checkpoint(name)
    out = {k: dict(copy.deepcopy(v)) for k, v in package_configs(checkpoint).items() if not k.startswith("tokenizer")}
    shrink_vae(out)
    FAMILIES[checkpoint.family].tiny(out)
    return out


def recipe(name: str) -> Recipe:
    """The recipe of a registered backbone for its tiny checkpoint, whose smaller width holds the discarded channels; of
    many timesteps the first two.
    """
    declared = get_declaration(name).recipe
    fewer = {"timesteps": declared.timesteps[:2]} if declared.timesteps else {}
    return declared.override(discard=tuple(channel % 10 for channel in declared.discard), **fewer)


def denoiser_catalogue(name: str, configs: dict[str, Any] | None = None) -> Catalogue:
    """The activations of a checkpoint's denoiser, at full size unless configs are given."""
    return Catalogue(architecture(get_checkpoint(name), configs).sites(), name)


def build(name: str, seed: int = 0) -> dict[str, Any]:
    """Stock networks of a tiny checkpoint, float32, eval, by component: the denoiser, ``vae``, the text encoders."""
    import transformers

    torch.manual_seed(seed)
    c = configs(name)
    network = architecture(get_checkpoint(name), c)
    out: dict[str, Any] = {network.denoiser: network.build_denoiser().eval()}
    if network.encoder:
        out["vae"] = network.image_encoder.build().eval()
    for text in network.text_encoders:
        cls = getattr(transformers, c[text]["architectures"][0])
        out[text] = cls(cls.config_class(**{k: v for k, v in c[text].items() if k != "architectures"})).eval()
    return out


def folder(name: str, path: Path, seed: int = 0, **save: Any) -> Path:
    """Write a tiny checkpoint as a diffusers folder; ``save`` goes to ``save_pretrained`` (``variant``,
    ``max_shard_size``).
    """
    c = configs(name)
    networks = build(name, seed)
    if list(networks) == ["unet"]:  # one network alone lies at the root
        networks["unet"].save_pretrained(path, **save)
        (path / "scheduler_config.json").write_text(json.dumps(c["scheduler"]))
        return path
    for component, network in networks.items():
        network.save_pretrained(path / component, **save)
    if "force_upcast" not in c.get("vae", {"force_upcast": None}):
        _drop(path / "vae" / "config.json", "force_upcast")  # which diffusers writes though nobody published it
    (path / "scheduler").mkdir(parents=True, exist_ok=True)
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(c["scheduler"]))
    for text in (component for component in networks if component.startswith("text_encoder")):
        tokenizer = path / text.replace("text_encoder", "tokenizer")
        if "T5" in c[text]["architectures"][0]:
            sentencepiece(tokenizer)
        else:
            shutil.copytree(TOKENIZER, tokenizer, dirs_exist_ok=True)
            if c[text]["architectures"][0] in language_model.GENERATIVE:
                (tokenizer / "chat_template.jinja").write_text(CHAT)
    (path / "model_index.json").write_text(json.dumps(c.get("model_index", {"_class_name": "StableDiffusionPipeline"})))
    return path


def _drop(file: Path, key: str) -> None:
    config = json.loads(file.read_text())
    config.pop(key, None)
    file.write_text(json.dumps(config))


def sentencepiece(path: Path) -> None:
    """A tokenizer in T5's original format: a SentencePiece unigram model, and no tokenizer.json."""
    from sentencepiece import SentencePieceTrainer

    path.mkdir(parents=True, exist_ok=True)
    sentences = [
        f"a photo of a {noun} in the {place}"
        for noun in ("cat", "dog", "horse", "car", "tree")
        for place in ("park", "street", "house")
    ]
    SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(path / "spiece"),
        vocab_size=T5["vocab_size"],
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (path / "spiece.vocab").unlink()
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "T5Tokenizer", "model_max_length": 512, "extra_ids": 0})
    )
