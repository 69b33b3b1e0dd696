"""The card of a checkpoint: what is known of a network for which nobody published a recipe, or before one is chosen."""

from __future__ import annotations

from diffusion_backbones.families import Architecture
from diffusion_backbones.reports import facts as about
from diffusion_backbones.reports import markdown
from diffusion_backbones.reports.facts import CheckpointFacts
from diffusion_backbones.spec.activations import ActivationId, Site, parse
from diffusion_backbones.spec.checkpoint import Checkpoint
from diffusion_backbones.spec.levels import LevelInfo


def card(checkpoint: Checkpoint) -> str:
    """A checkpoint's card: YAML front matter, then Markdown. Its architecture is in the package."""
    facts = CheckpointFacts.of(checkpoint)
    site = _example(facts.network)
    call = f'db.create_model("{checkpoint.name}", recipe=["{site.id}"], pretrained=True)'
    return markdown.render(
        "checkpoint.md.j2",
        facts=facts,
        front_matter=markdown.front_matter(facts.metadata()),
        whom="the source of the weights",
        size=checkpoint.input_size,
        load=f"{call}     # an example, not advice",
        shapes=about.shapes([LevelInfo((site,))], checkpoint.input_size),
        unverified=checkpoint.unverified,
    )


def _example(network: Architecture) -> Site:
    """A transformer block in the middle of the network."""
    sites = [site for site in network.sites() if _is_block(parse(site.id))]
    return sites[len(sites) // 2]


def _is_block(parsed: ActivationId) -> bool:
    return parsed.kind == "vit-out" or (parsed.stage, parsed.kind) == ("vit", "out")
