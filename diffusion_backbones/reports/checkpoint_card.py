"""Cards of checkpoints: what is known of a network for which nobody published a recipe, or before one is chosen."""

from __future__ import annotations

from diffusion_backbones.families import FAMILIES
from diffusion_backbones.reports import backbone_card
from diffusion_backbones.reports.costs import Costs, costs, entire
from diffusion_backbones.spec import registry
from diffusion_backbones.spec.activations import ActivationId, parse
from diffusion_backbones.spec.checkpoint import Checkpoint
from diffusion_backbones.spec.configs import Config, Configs, is_flow, package_configs
from diffusion_backbones.spec.schedule import noise_level

USAGE = """```python
import torch
import diffusion_backbones as db

backbone = db.create_model("{name}", recipe=["{id}"], pretrained=True)     # an example, not advice
images = torch.rand(1, 3, {size}, {size}) * 2 - 1     # RGB in [-1, 1]
for level in backbone(images):
    print(tuple(level.shape))
# (1, {channels}, {side}, {side})
```"""


def card(checkpoint: Checkpoint) -> str:
    """A checkpoint's card: YAML front matter, then Markdown. Its architecture is in the package."""
    configs = package_configs(checkpoint)
    published = read_by(checkpoint)
    known = (
        f"read by {', '.join(f'`{name}`' for name in published)}" if published else "for which no recipe was published"
    )
    chosen = (
        "[Activations](../docs/activations.md) are chosen with `recipe=`, and only what is in front of the last "
        "of them is read."
    )
    sections = [
        f"# {checkpoint.name}\n\n{checkpoint.title}, {known}. {chosen}",
        backbone_card.section("Details", backbone_card.table(["", ""], details(checkpoint, configs))),
        backbone_card.section("Usage", _usage(checkpoint, configs)),
        backbone_card.section("Not verified", backbone_card.bullets(checkpoint.unverified)),
        backbone_card.section("Licence", backbone_card.license(checkpoint)),
        backbone_card.section("Citation", backbone_card.citation(checkpoint.paper, whom="the source of the weights")),
    ]
    return backbone_card.document(backbone_card.front_matter(checkpoint), sections)


def read_by(checkpoint: Checkpoint) -> list[str]:
    """Names of the backbones that are this checkpoint under a published recipe."""
    return [name for name in registry.list_models() if registry.get_declaration(name).checkpoint == checkpoint]


def details(checkpoint: Checkpoint, configs: Configs) -> list[tuple[str, str]]:
    """What there is to know: (heading, text)."""
    family, cost, side = FAMILIES[checkpoint.family], costs(entire(checkpoint)), checkpoint.input_size
    compute = (
        f"denoiser {backbone_card.gflops(cost.denoiser_gflops)} GFLOPs, image encoder "
        f"{backbone_card.gflops(cost.encoder_gflops)} GFLOPs"
    )
    return [
        ("Weights", backbone_card.weights(checkpoint)),
        ("Input", backbone_card.accepts(checkpoint, configs)),
        ("Default size", f"{side} × {side} pixels"),
        ("Noise", forward_process(configs["scheduler"])),
        ("Conditioning", conditioning(checkpoint, configs)),
        ("Latents", backbone_card.latents(checkpoint, configs)),
        (
            "Activations",
            f"{len(family.catalogue(configs, checkpoint.name).all())}, listed by `diffusion-backbones activations "
            f"{checkpoint.name} --all`",
        ),
        ("Parameters", parameters(cost)),
        (
            "Compute",
            f"{compute}, the whole network on one image of {cost.size} × {cost.size}; a multiply-add counts as two",
        ),
        ("Size in memory", f"{backbone_card.memory(cost)}, the whole network"),
        *([] if checkpoint.encoder_float16 else [("float16", backbone_card.OVERFLOWS)]),
    ]


def parameters(cost: Costs) -> str:
    """Those of the whole network."""
    return (
        f"denoiser {backbone_card.millions(cost.parameters_total)}, image encoder "
        f"{backbone_card.millions(cost.encoder_parameters)}"
    )


def forward_process(scheduler: Config) -> str:
    """How noise is mixed in, with two levels as examples."""
    kind = (
        "rectified flow, z_t = (1 - t / 1000) z + t / 1000 noise"
        if is_flow(scheduler)
        else "variance preserving, z_t = alpha_t z + sigma_t noise"
    )
    examples = (
        f"{alpha:.4f} z + {sigma:.4f} noise at t = {t}"
        for t in (50, 261)
        for alpha, sigma in [noise_level(scheduler, t)]
    )
    return f"{kind}: {', '.join(examples)}"


def conditioning(checkpoint: Checkpoint, configs: Configs) -> str:
    """The tensors that a call may give, without batch, and what makes them of a prompt."""
    family = FAMILIES[checkpoint.family]
    shapes = [
        f"`{name}` ({', '.join(map(str, shape))})" if shape else f"`{name}`"
        for name, shape in family.conditioning_shapes(configs).items()
    ]
    encoders = family.text_encoder_names(configs)
    return (
        ", ".join(shapes) + (f"; from {', '.join(f'`{name}`' for name in encoders)}" if encoders else "")
        if shapes
        else "the timestep alone"
    )


def _usage(checkpoint: Checkpoint, configs: Configs) -> str:
    """With what a block in the middle gives."""
    sites = [
        site
        for site in FAMILIES[checkpoint.family].catalogue(configs, checkpoint.name).all()
        if _is_block(parse(site.id))
    ]
    site, size = sites[len(sites) // 2], checkpoint.input_size
    return USAGE.format(
        name=checkpoint.name, id=site.id, size=size, channels=site.channels, side=-(-size // site.stride)
    )


def _is_block(id: ActivationId) -> bool:
    return id.kind == "vit-out" or (id.stage, id.kind) == ("vit", "out")
