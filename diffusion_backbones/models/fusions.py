"""Published fusions: GDF's of three models and of two, SD+DINO, and CleanDIFT in its place. Their members are declared
beside their checkpoints, which :mod:`diffusion_backbones.models` imports first.
"""

from diffusion_backbones.models import notes
from diffusion_backbones.models.papers import papers
from diffusion_backbones.models.sdxl import SDXL
from diffusion_backbones.models.stable_diffusion import SD15
from diffusion_backbones.spec.checkpoint import License
from diffusion_backbones.spec.declaration import Declaration
from diffusion_backbones.spec.fusion import Fusion, Member, TimmModel
from diffusion_backbones.spec.recipe import Recipe
from diffusion_backbones.spec.registry import get_declaration, register_fusion

DINOV2_B = TimmModel(
    "vit_base_patch14_dinov2.lvd142m",
    license=License("apache-2.0", link="https://github.com/facebookresearch/dinov2/blob/main/LICENSE"),
    input_size=518,
    out_indices=(11,),
    title="DINOv2 ViT-B/14",
    paper=papers["oquab2023dinov2"],
)

_GDF = papers["meng2024gdf"]
_TRAINED = "GDF puts trained convolutions on these channels, which are not part of this pyramid."
_ORDER = "Channels are in the order of GDF's code: SDXL first, {}."

_SD15_PART = Recipe(
    name="gdf_amalgamation",
    levels=(
        ("up-level2-upsampler-out", "up-level3-repeat0-vit-block0-self-k", "attn[up_cross]"),
        "up-level2-repeat1-vit-block0-cross-q",
        "up-level1-repeat1-vit-block0-cross-q",
    ),
    timestep=51,
    nominal_timestep=50,
    input_size=512,
    paper=_GDF,
    source="Darkbblue/generic-diffusion-feature at e4361a6, feature/configs/config_15_amalgamation.json with "
    "--attention up_cross",
)
register_fusion(
    Fusion(
        name="xlt_gdf",
        title="GDF's Ours-XL-t for correspondence and label-scarce segmentation",
        members=(
            Member(get_declaration("sdxl_gdf"), maps=(1, 0)),
            Member(Declaration("sd15_gdf_amalgamation", SD15, _SD15_PART), maps=(2, 1, 0)),
            Member(get_declaration("pgv2_gdf")),
        ),
        strides=(8,),
        normalize="none",
        paper=_GDF,
        source="Darkbblue/generic-diffusion-feature at e4361a6, correspondence/README.md and "
        "correspondence/correspondence/aggregation_network.py; arXiv 2410.03558, appendix B.3",
        notes=(
            _ORDER.format("Stable Diffusion 1.5, Playground v2, each model's in forward order, its attention last"),
            "All maps are brought to 128 x 128 for images of 1024, as for correspondence; for label-scarce "
            "segmentation GDF enlarges each model's maps to its widest by the nearest position.",
            _TRAINED,
            *notes.gdf(size_conditioning=True),
        ),
    )
)

_SDXL_SEGMENTATION = Recipe(
    name="gdf_seg",
    levels=(
        "up-level1-upsampler-out",
        ("up-level1-repeat0-vit-block0-cross-q", "up-level1-repeat0-vit-block0-out"),
        ("up-level0-repeat0-vit-block7-out", "up-level0-repeat0-vit-block5-out"),
    ),
    timestep=50,
    input_size=1024,
    paper=_GDF,
    source="Darkbblue/generic-diffusion-feature at e4361a6, segmentation/configs/ade_full.py and city_full.py",
)

register_fusion(
    Fusion(
        name="xlt_gdf_seg",
        title="GDF's Ours-XL-t for segmentation",
        members=(
            Member(Declaration("sdxl_gdf_seg", SDXL, _SDXL_SEGMENTATION)),
            Member(get_declaration("pgv2_gdf_seg")),
        ),
        strides=(8, 16, 32),
        normalize="none",
        paper=_GDF,
        source="Darkbblue/generic-diffusion-feature at e4361a6, segmentation/configs/ade_full.py, city_full.py and "
        "segmentation/models/diffusion_segmentor.py; arXiv 2410.03558, appendix B.4",
        notes=(
            _ORDER.format("then Playground v2; of SDXL's stride 32 block 7 before block 5"),
            _TRAINED,
            "GDF cuts crops of 512 x 512 (ADE20K) or 1024 x 1024 (Cityscapes) and enlarges them to 1024 x 1024.",
            "GDF prompts ADE20K and Cityscapes with a sentence each; prompt= in a call does it.",
            *notes.gdf(size_conditioning=True),
        ),
    )
)

_CO_PCA = (
    "The source fits the principal components on the two images of a pair; fit() takes the pair, or any images.",
    "The source enlarges the maps of strides 32 and 64 twice as large at a time; here it is done at once.",
    "The source resizes images with Lanczos and pads them to a square; here the aspect ratio is kept.",
    "The source reads the DINOv2 of its authors' repository; timm's has the same weights, and interpolates the "
    "positions of other image sizes by its own code.",
)

register_fusion(
    Fusion(
        name="sd_dino",
        title="SD+DINO",
        members=(
            Member(get_declaration("sd15_sd_dino"), input_size=960, components=256),
            Member(DINOV2_B, input_size=840),
        ),
        strides=(16,),
        paper=papers["zhang2023tale"],
        source="Junyi42/sd-dino at b85df18, pck_spair_pascal.py and utils/utils_correspondence.py, with its defaults",
        notes=(
            "Stable Diffusion's maps are in the order of the source, fine to coarse, 256 components each.",
            *_CO_PCA,
        ),
    )
)

register_fusion(
    Fusion(
        name="cleandift_dino",
        title="CleanDIFT in the place of Stable Diffusion in SD+DINO",
        members=(
            Member(get_declaration("sd15_cleandift"), input_size=512, components=256),
            Member(DINOV2_B, input_size=840),
        ),
        strides=(14,),
        paper=papers["stracke2025cleandift"],
        source="arXiv 2412.03439, table 5 and appendix A; the fusion as Junyi42/sd-dino at b85df18",
        notes=_CO_PCA,
        unverified=(
            "CleanDIFT's released code has no fusion: components, normalization, weights and DINOv2's input size "
            "are taken to be SD+DINO's, and the common stride is DINOv2's.",
        ),
    )
)
