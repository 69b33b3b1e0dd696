"""Qwen-Image of Alibaba. No recipe was published for it: read it with ``recipe=``."""

from diffusion_backbones.models.papers import papers
from diffusion_backbones.spec.checkpoint import Checkpoint, License
from diffusion_backbones.spec.registry import register_checkpoint

QWEN_IMAGE = register_checkpoint(
    Checkpoint(
        name="qwen_image",
        title="Qwen-Image",
        hub_id="Qwen/Qwen-Image",
        license=License("apache-2.0"),
        paper=papers["wu2025qwenimage"],
        input_size=1024,
        family="qwen",
        unverified=(
            "The configs of its image encoder and its language model were not read; they are taken to be diffusers' "
            "defaults and those of Qwen2.5-VL 7B.",
            "Its licence is that of its code repository.",
        ),
    )
)
