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

from diffusion_backbones.families import FAMILIES
from diffusion_backbones.families.text import language_model
from diffusion_backbones.spec.configs import CONFIGS, package_configs
from diffusion_backbones.spec.recipe import Recipe
from diffusion_backbones.spec.registry import get_checkpoint, get_declaration

TOKENIZER = CONFIGS / "tinysd" / "tokenizer"
WORDS = {
    key: package_configs(get_checkpoint("tinysd"))["text_encoder"][key]
    for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
}
CROSS, POOLED, TIME = 32, 16, 8
T5 = {"d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 3, "vocab_size": 60}
DECODER = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    **WORDS,
}
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content if m.content is string else m.content[0].text "
    "}}<|im_end|>\n{% endfor %}"
)
CHAT += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CLIP = {
    "hidden_size": 8,
    "projection_dim": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    **WORDS,
}


def configs(name: str) -> dict[str, dict[str, Any]]:
    """The configs of a registered checkpoint, shrunk."""
    checkpoint = get_checkpoint(name)
    out = {k: dict(copy.deepcopy(v)) for k, v in package_configs(checkpoint).items() if not k.startswith("tokenizer")}
    if out.get("vae", {}).get("_class_name") == "AutoencoderKL":
        out["vae"] |= {"block_out_channels": [8, 16, 32, 32], "norm_num_groups": 8, "sample_size": 64}
    SHRINK[checkpoint.family](out)
    return out


def recipe(name: str) -> Recipe:
    """The recipe of a registered backbone, for its tiny checkpoint: channels to discard lie within the smaller width."""
    declared = get_declaration(name).recipe
    return declared.override(discard=tuple(channel % 10 for channel in declared.discard))


def _unet(c: dict[str, dict[str, Any]]) -> None:
    unet = c["unet"]
    n = len(unet["block_out_channels"])
    unet |= {
        "block_out_channels": [16, 32, 64, 64][:n],
        "norm_num_groups": 8,
        "cross_attention_dim": CROSS,
        "sample_size": 8,
    }
    unet["attention_head_dim"] = 8 if isinstance(unet["attention_head_dim"], int) else [1, 2, 4, 4][:n]
    text = {
        "hidden_size": CROSS,
        "projection_dim": CROSS,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        **WORDS,
    }
    c["text_encoder"] |= text
    if "text_encoder_2" in c:
        c["text_encoder"] |= {"hidden_size": CROSS // 2, "projection_dim": CROSS // 2}
        c["text_encoder_2"] |= text | {"hidden_size": CROSS // 2, "projection_dim": POOLED}
        unet |= {"addition_time_embed_dim": TIME, "projection_class_embeddings_input_dim": POOLED + 6 * TIME}


def _dit(c: dict[str, dict[str, Any]]) -> None:
    c["transformer"] |= {"num_attention_heads": 2, "attention_head_dim": 8}


def _pixart(c: dict[str, dict[str, Any]]) -> None:
    c["transformer"] |= {
        "num_attention_heads": 2,
        "attention_head_dim": 24,
        "cross_attention_dim": 48,
        "caption_channels": T5["d_model"],
    }
    c["text_encoder"] |= T5


def _sd3(c: dict[str, dict[str, Any]]) -> None:
    c["transformer"] |= {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "caption_projection_dim": 16,
        "joint_attention_dim": T5["d_model"],
        "pooled_projection_dim": 2 * CLIP["projection_dim"],
    }
    c["text_encoder"] |= CLIP
    c["text_encoder_2"] |= CLIP
    c["text_encoder_3"] |= T5


def _flux(c: dict[str, dict[str, Any]]) -> None:
    c["transformer"] |= {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "axes_dims_rope": [4, 6, 6],
        "joint_attention_dim": T5["d_model"],
        "pooled_projection_dim": CLIP["projection_dim"],
    }
    c["text_encoder"] |= CLIP
    c["text_encoder_2"] |= T5


def _hunyuan(c: dict[str, dict[str, Any]]) -> None:
    bert = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": WORDS["vocab_size"],
    }
    c["transformer"] |= {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "hidden_size": 16,
        "cross_attention_dim": bert["hidden_size"],
        "cross_attention_dim_t5": T5["d_model"],
        "pooled_projection_dim": 16,
    }
    c["text_encoder"] |= bert
    c["text_encoder_2"] |= T5


def _auraflow(c: dict[str, dict[str, Any]]) -> None:
    c["transformer"] |= {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "joint_attention_dim": T5["d_model"],
        "caption_projection_dim": 16,
    }
    c["text_encoder"] |= T5


def _sana(c: dict[str, dict[str, Any]]) -> None:
    widths = [8, 8, 16, 16, 32, 32]
    c["vae"] |= {"encoder_block_out_channels": widths, "decoder_block_out_channels": widths, "attention_head_dim": 8}
    c["transformer"] |= {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 16,
        "caption_channels": 24,
    }
    c["text_encoder"] |= {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": WORDS["vocab_size"],
    }


def _qwen(c: dict[str, dict[str, Any]]) -> None:
    c["vae"] |= {"base_dim": 8, "z_dim": 16}
    c["transformer"] |= {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "axes_dims_rope": [4, 6, 6],
        "joint_attention_dim": 24,
    }
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}
    c["text_encoder"]["text_config"] |= DECODER | {"num_attention_heads": 3, "rope_parameters": rope}
    c["text_encoder"]["vision_config"] |= {
        "depth": 1,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_heads": 2,
        "out_hidden_size": 24,
    }


def _flux2(c: dict[str, dict[str, Any]]) -> None:
    c["vae"] |= {"block_out_channels": [8, 16, 32, 32], "norm_num_groups": 8}
    c["transformer"] |= {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "axes_dims_rope": [4, 4, 4, 4],
        "joint_attention_dim": 72,
    }
    deep = DECODER | {"num_hidden_layers": 31}
    if "text_config" in c["text_encoder"]:
        c["text_encoder"]["text_config"] |= deep
        c["text_encoder"]["vision_config"] |= {
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
    else:
        c["text_encoder"] |= deep


def _lumina(c: dict[str, dict[str, Any]]) -> None:
    c["transformer"] |= {
        "hidden_size": 24,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "axes_dim_rope": [2, 2, 2],
        "multiple_of": 16,
        "cap_feat_dim": 24,
    }
    c["text_encoder"] |= DECODER


def _z_image(c: dict[str, dict[str, Any]]) -> None:
    c["transformer"] |= {"dim": 24, "n_heads": 2, "n_kv_heads": 2, "axes_dims": [4, 4, 4], "cap_feat_dim": 24}
    c["text_encoder"] |= DECODER


def _pixel(c: dict[str, dict[str, Any]]) -> None:
    c["unet"] |= {
        "block_out_channels": [8, 8, 16, 16, 24, 24][: len(c["unet"]["block_out_channels"])],
        "norm_num_groups": 4,
    }


def _deepfloyd(c: dict[str, dict[str, Any]]) -> None:
    c["unet"] |= {
        "block_out_channels": [8, 16, 24, 32],
        "norm_num_groups": 8,
        "attention_head_dim": 8,
        "cross_attention_dim": CROSS,
        "encoder_hid_dim": T5["d_model"],
        "addition_embed_type_num_heads": 4,
    }
    c["text_encoder"] |= T5


SHRINK = {
    "unet": _unet,
    "dit": _dit,
    "pixart": _pixart,
    "sd3": _sd3,
    "flux": _flux,
    "hunyuan": _hunyuan,
    "auraflow": _auraflow,
    "pixel": _pixel,
    "sana": _sana,
    "qwen": _qwen,
    "flux2": _flux2,
    "deepfloyd": _deepfloyd,
}
SHRINK |= {"lumina": _lumina, "z_image": _z_image}


def build(name: str, seed: int = 0) -> dict[str, Any]:
    """Stock networks of a tiny checkpoint, float32, eval, by component: the denoiser, ``vae``, the text encoders."""
    import transformers

    torch.manual_seed(seed)
    c, family = configs(name), FAMILIES[get_checkpoint(name).family]
    out: dict[str, Any] = {family.denoiser: family.build_denoiser(c[family.denoiser]).eval()}
    if family.encoder:
        out["vae"] = family.image_encoder(c).build(c["vae"]).eval()
    for text in family.text_encoder_names(c):
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


def sentencepiece(path: Path) -> None:
    """A tokenizer in T5's original format: a SentencePiece unigram model, and no tokenizer.json."""
    from sentencepiece import SentencePieceTrainer

    path.mkdir(parents=True, exist_ok=True)
    sentences = [
        f"a photo of a {noun} in the {place}"
        for noun in ("cat", "dog", "horse", "car", "tree")
        for place in ("park", "street", "house")
    ]
    SentencePieceTrainer.train(sentence_iterator=iter(sentences), model_prefix=str(path / "spiece"), vocab_size=T5["vocab_size"], hard_vocab_limit=False,
                               pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)  # fmt: skip
    (path / "spiece.vocab").unlink()
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "T5Tokenizer", "model_max_length": 512, "extra_ids": 0})
    )
