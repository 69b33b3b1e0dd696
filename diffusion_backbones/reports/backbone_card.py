"""The card of a backbone, written from its declaration and the measured numbers alone. Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Iterator

from diffusion_backbones.reports import facts as about
from diffusion_backbones.reports import markdown, measurements, settings
from diffusion_backbones.reports.facts import BackboneFacts
from diffusion_backbones.spec.configs import Configs, package_configs
from diffusion_backbones.spec.declaration import Declaration

FOLDER = 'db.create_model("local-dir:FOLDER")     # or "hf-hub:OWNER/REPOSITORY"'


def card(declaration: Declaration, saved: Configs | None = None, load: str = "") -> str:
    """A backbone's model card: YAML front matter that the Hugging Face hub reads, then Markdown.

    Args:
        declaration: A backbone, registered or not.
        saved: For the card of a folder that ``save_pretrained`` wrote: the architecture of what is in it. The usage
            then loads that folder instead of the published weights.
        load: Other code for the usage: an expression that gives the backbone, where ``db`` is this package.

    Raises:
        ValueError: The package does not have the architecture, and ``saved`` does not give it.
    """
    if not (saved or package_configs(declaration.checkpoint)):
        raise ValueError(
            f"the package has no architecture for {declaration.checkpoint.name}; give the configs of what was saved: "
            "card(declaration, configs)"
        )
    facts, recipe, size = BackboneFacts.of(declaration, saved), declaration.recipe, declaration.input_size
    published = f'db.create_model("{declaration.name}", pretrained=True)     # frozen, in eval mode'
    deviations = measurements.deviations().get(declaration.name, [])
    results, caveats = measurements.results_table(measurements.results().get(declaration.name, []))
    return markdown.render(
        "backbone.md.j2",
        facts=facts,
        front_matter=markdown.front_matter(facts.metadata(recipe.name)),
        whom="the sources of the recipe and of the weights",
        levels=facts.plan.levels,
        sites=list(_sites(facts, size)),
        size=size,
        load=load or (FOLDER if saved else published),
        published=not (load or saved),
        shapes=about.shapes(facts.plan.levels, size),
        draws=settings.times(facts.plan.passes),
        postprocessing=settings.postprocessing(recipe),
        unverified=facts.unverified,
        deviations=deviations,
        deviations_table=measurements.deviations_table(deviations),
        results=results,
        caveats=caveats,
    )


def _sites(facts: BackboneFacts, size: int) -> Iterator[list[str]]:
    """A row for every activation; its level is named once."""
    for index, level in enumerate(facts.plan.levels):
        shape = " × ".join(map(str, about.shapes([level], size)[0][1:]))
        for part, site in enumerate(level.sites):
            first = ["", "", ""] if part else [str(index), str(site.stride), shape]
            each = f"{level.timesteps} × " if level.timesteps > 1 and not site.encoder else ""
            yield [*first, f"`{site.id}`", f"{each}{site.channels}", f"`{site.path}`"]


def entry_help(declaration: Declaration) -> str:
    """The text that ``torch.hub.help`` prints."""
    facts, size = BackboneFacts.of(declaration), declaration.input_size
    return f"""{facts.summary}

Arguments are those of diffusion_backbones.create_model, except that pretrained is True unless it is given.

>>> backbone = torch.hub.load(".", "{declaration.name}", source="local")     # in a clone of the repository
>>> [tuple(level.shape) for level in backbone(torch.rand(1, 3, {size}, {size}) * 2 - 1)]
{about.shapes(facts.plan.levels, size)}
"""
