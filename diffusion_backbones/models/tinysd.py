"""tinysd: a small trained checkpoint inside the package, with the topology of Stable Diffusion 1.x."""

from diffusion_backbones.models import stable_diffusion  # noqa: F401  (its recipes are read below)
from diffusion_backbones.spec.checkpoint import Checkpoint, License, TinyEncoder
from diffusion_backbones.spec.registry import get_declaration, register_checkpoint, register_model

TINYSD = register_checkpoint(
    Checkpoint(
        name="tinysd",
        title="tinysd",
        hub_id="",
        license=License("apache-2.0"),
        paper=None,
        input_size=256,
        tiny_encoder=TinyEncoder("tinysd/vae/tiny", License("apache-2.0"), source="docs/tinysd.md"),
        status="Trained from scratch for this package on drawn scenes: data, training, figures and limits are in "
        "docs/tinysd.md",
    )
)

for _name in (
    "sd15_gdf",
    "sd15_legacy",
    "sd15_hyperfeatures",
    "sd15_sd_dino",
    "sd15_vpd",
    "sd15_tadp",
    "sd13_odise",
    "sd21_dift",
    "sd21_dift_geo",
    "sd21_genpercept",
):
    register_model(TINYSD, get_declaration(_name).recipe.override(input_size=256))
