"""Stable Diffusion XL and the checkpoints that share its topology: SDXL-Turbo and Playground v2."""

from diffusion_backbones.models import notes
from diffusion_backbones.models.papers import papers
from diffusion_backbones.models.tiny_encoders import TAESDXL
from diffusion_backbones.spec.checkpoint import Checkpoint, License
from diffusion_backbones.spec.recipe import Recipe
from diffusion_backbones.spec.registry import register_checkpoint, register_model

SDXL = register_checkpoint(
    Checkpoint(
        name="sdxl",
        title="Stable Diffusion XL base 1.0",
        hub_id="stabilityai/stable-diffusion-xl-base-1.0",
        # main in the clone github.com/HDRJ-One/stable-diffusion-xl-base-1.0
        revision="462165984030d82259a11f4367a4eed129e94a7b",
        license=License(
            "openrail++", link="https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/blob/main/LICENSE.md"
        ),
        paper=papers["podell2023sdxl"],
        input_size=1024,
        tiny_encoder=TAESDXL,
        encoder_float16=False,
    )
)

SDXL_TURBO = register_checkpoint(
    Checkpoint(
        name="sdxl_turbo",
        title="SDXL-Turbo",
        hub_id="stabilityai/sdxl-turbo",
        # huggingface.co/stabilityai/sdxl-turbo/commit/71153311d3db
        revision="71153311d3dbb46851df1931d3ca6e939de83304",
        configs="sdxl",
        license=License(
            "other", name="sai-nc-community", link="https://huggingface.co/stabilityai/sdxl-turbo/blob/main/LICENSE.md"
        ),
        paper=papers["sauer2024add"],
        input_size=512,
        tiny_encoder=TAESDXL,
        encoder_float16=False,
    )
)

PGV2 = register_checkpoint(
    Checkpoint(
        name="pgv2",
        title="Playground v2 1024px aesthetic",
        hub_id="playgroundai/playground-v2-1024px-aesthetic",
        revision="737a24ebe3ae4e5421110879168be188853d86c8",  # the commit of this repository's public resolve/ URLs
        configs="sdxl",
        license=License(
            "other",
            name="playground-v2-community",
            link="https://huggingface.co/playgroundai/playground-v2-1024px-aesthetic/blob/main/LICENSE.md",
        ),
        paper=papers["playgroundv2"],
        input_size=1024,
        tiny_encoder=TAESDXL,
        encoder_float16=False,
        unverified=(
            "Its scheduler config was read in a duplicate repository; its VAE and text encoder configs are taken to "
            "be SDXL's.",
            "Its own BibTeX entry was not seen; the authors are those of the entry for v2.5.",
        ),
    )
)

_GDF_NOTES = notes.gdf(size_conditioning=True)

register_model(
    SDXL,
    Recipe(
        name="gdf",
        levels=(
            ("up-level1-repeat0-vit-block0-cross-q", "up-level1-repeat0-vit-block0-out"),
            ("up-level0-repeat0-vit-block5-out", "up-level0-repeat0-vit-block7-out"),
        ),
        timestep=50,
        input_size=1024,
        paper=papers["meng2024gdf"],
        source="Darkbblue/generic-diffusion-feature at e4361a6, feature/configs/config_xl_practical.json; arXiv "
        "2410.03558, appendix B",
        notes=(
            *_GDF_NOTES,
            "Activations of a level are in forward order, block 5 before block 7; GDF's segmentation configs read "
            "block 7 first.",
        ),
        unverified=(
            "The paper prints the same scores for SDXL's block 3 and block 7 at stride 32; one pair may be a slip.",
        ),
    ),
)

register_model(
    SDXL,
    Recipe(
        name="legacy",
        levels=(
            ("up-level1-upsampler-out", "up-level2-repeat2-res-out"),
            "up-level0-upsampler-out",
        ),
        timestep=50,
        input_size=1024,
        paper=papers["meng2024gdf"],
        source="Darkbblue/generic-diffusion-feature at e4361a6, feature/configs/config_xl_legacy.json",
        notes=("The paper's baseline, not its proposal.", *_GDF_NOTES),
    ),
)

register_model(
    PGV2,
    Recipe(
        name="gdf",
        levels=("up-level0-repeat0-vit-block3-out",),
        timestep=50,
        input_size=1024,
        paper=papers["meng2024gdf"],
        source="Darkbblue/generic-diffusion-feature at e4361a6, feature/configs/config_pg_amalgamation.json; arXiv "
        "2410.03558, appendix B",
        notes=(
            "Playground v2's part of Ours-XL-t for correspondence and label-scarce segmentation, which joins it with "
            "SDXL and SD 1.5.",
            *_GDF_NOTES,
        ),
    ),
)

register_model(
    PGV2,
    Recipe(
        name="gdf_seg",
        levels=("up-level1-upsampler-out", "up-level1-repeat0-vit-block0-cross-q", "up-level0-repeat0-vit-block5-out"),
        timestep=50,
        input_size=1024,
        paper=papers["meng2024gdf"],
        source="Darkbblue/generic-diffusion-feature at e4361a6, segmentation/configs/ade_full.py and city_full.py; "
        "arXiv 2410.03558, appendix B",
        notes=(
            "Playground v2's part of Ours-XL-t for segmentation, which joins it with SDXL; alone it has no published "
            "number.",
            *_GDF_NOTES,
        ),
    ),
)
