"""Hunyuan-DiT of Tencent. No recipe was published for it: read it with ``recipe=``."""

from diffusion_backbones.models.papers import papers
from diffusion_backbones.spec.checkpoint import Checkpoint, License
from diffusion_backbones.spec.registry import register_checkpoint

HUNYUAN_DIT_12 = register_checkpoint(
    Checkpoint(
        name="hunyuan_dit_12",
        title="Hunyuan-DiT 1.2",
        hub_id="Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers",
        revision="5e96094e0ad19e7f475de8711f03634ca0ccc40c",
        license=License(
            "other",
            name="tencent-hunyuan-community",
            link="https://github.com/Tencent-Hunyuan/HunyuanDiT/blob/main/LICENSE.txt",
        ),
        paper=papers["li2024hunyuandit"],
        input_size=1024,
        family="hunyuan",
        unverified=(
            "Of the configs of 1.2 only the sizes in bytes were seen; they are those of 1.0 with what the code says "
            "of 1.2.",
        ),
    )
)
