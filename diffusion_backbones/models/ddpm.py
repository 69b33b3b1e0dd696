"""DDPM: unconditional U-Nets on pixels, of Google. Read them with ``recipe=``."""

from diffusion_backbones.models.papers import papers
from diffusion_backbones.spec.checkpoint import Checkpoint, License
from diffusion_backbones.spec.registry import register_checkpoint

_PICKLES = "Whether its repository holds safetensors files was not seen; pickles are refused."


def _register(data: str, size: int, *unverified: str, configs: str = "") -> Checkpoint:
    return register_checkpoint(
        Checkpoint(
            name=f"ddpm_{data}_{size}",
            title=f"DDPM {data} {size}",
            hub_id=f"google/ddpm-{data}-{size}",
            license=License("apache-2.0"),
            paper=papers["ho2020ddpm"],
            input_size=size,
            family="pixel",
            configs=configs,
            unverified=unverified,
        )
    )


DDPM_CIFAR10 = _register("cifar10", 32, _PICKLES)
DDPM_CELEBAHQ = _register("celebahq", 256, _PICKLES)
DDPM_CAT = _register(
    "cat", 256, "Its config was not read; its file has the size of that of CelebA-HQ's.", configs="ddpm_celebahq_256"
)
DDPM_CHURCH = _register(
    "church",
    256,
    "Its config was not read; its file has the size of that of CelebA-HQ's.",
    _PICKLES,
    configs="ddpm_celebahq_256",
)
DDPM_BEDROOM = _register(
    "bedroom",
    256,
    "Its config was not read; its file has the size of that of CelebA-HQ's.",
    _PICKLES,
    configs="ddpm_celebahq_256",
)
