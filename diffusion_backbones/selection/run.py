"""The whole selection in one folder: measured, filtered, compared, chosen.

::

    selection/
      report.html           all of it to look at, in one file
      recipe.yaml           the choice: create_model(checkpoint, recipe="selection/recipe.yaml")
      card.md               its model card
      activations.csv       every activation: what it is, costs, is like, why it was dropped, what it scored
      curves.csv            of each its noise by octave of frequency, and the similarity of two places by their distance
      redundancy.csv        similarity (linear CKA) of those that were measured
      measured.json         the properties, so that a second run need not measure again
      evidence/, pictures/  what the comparison and the report keep; may be removed
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from diffusion_backbones.backbone.module import DiffusionBackbone
from diffusion_backbones.factory.entry_points import architecture, create_model
from diffusion_backbones.families import FAMILIES
from diffusion_backbones.reports import backbone_card
from diffusion_backbones.reports.costs import measure as count
from diffusion_backbones.selection import pictures, report
from diffusion_backbones.selection import rules as filtering
from diffusion_backbones.selection.choose import Step, affordable, choose
from diffusion_backbones.selection.compare import Evidence, scores
from diffusion_backbones.selection.data import Data
from diffusion_backbones.selection.measure import FEWEST, Measured, candidates, check, matching, measure
from diffusion_backbones.selection.properties import Properties
from diffusion_backbones.selection.reach import reach
from diffusion_backbones.selection.result import Selection, number
from diffusion_backbones.selection.rules import Rule
from diffusion_backbones.selection.tasks import Task
from diffusion_backbones.spec.activations import Site
from diffusion_backbones.spec.declaration import Declaration
from diffusion_backbones.spec.recipe import Level, Recipe

Progress = Callable[[Iterable[Any], str], Iterable[Any]]


def select(
    checkpoint: str,
    data: Data,
    out: Path,
    *,
    pretrained: bool = True,
    checkpoint_path: Path | None = None,
    device: torch.device | str | None = None,
    timestep: float = 50,
    prompt: str | None = None,
    ids: Sequence[str] = ("*",),
    rules: Sequence[Rule] | None = None,
    everything: bool = False,
    draws: int = 2,
    properties_from: int = 24,
    channels: int | None = None,
    gflops: float | None = None,
    members: int = 6,
    seed: int = 0,
    progress: Progress = lambda items, what: items,
    say: Callable[[str], None] = lambda text: None,
) -> Selection:
    """Choose a recipe for a checkpoint. A run that was stopped goes on where it was.

    Args:
        checkpoint: Of :func:`~diffusion_backbones.list_checkpoints`, or ``local-dir:`` or ``hf-hub:`` of a diffusers
            folder.
        data: Images and task; see :mod:`~diffusion_backbones.selection.data`.
        out: Folder for the results.
        pretrained, checkpoint_path, device: As for :func:`~diffusion_backbones.create_model`.
        timestep: At which the network is read.
        prompt: What it is told, empty by default.
        ids: Shell-style patterns of the activations to look at, all by default.
        rules: The filter; the paper's by default.
        everything: Compare also what the rules drop; the choice is still made of the rest, if there is one.
        draws: Noise draws for each image that properties are measured on.
        properties_from: How many of the images those are, at most.
        channels: Of the whole pyramid, at most.
        gflops: Of the denoiser up to the last activation, at most.
        members: Activations in the recipe, at most.
        seed: Of noise.
        progress: Wraps what takes long, and is told what it is.
        say: Is told what is done.

    Raises:
        KeyError: No such checkpoint.
        FileNotFoundError: A folder that holds no diffusion network.
        ValueError: Too few images, another size than the network takes, rules that drop everything, or a budget that
            nothing fits.
    """
    filter_rules = list(filtering.load() if rules is None else rules)
    size = int(data.images[0].shape[-1])
    folder = (
        checkpoint_path if checkpoint_path and checkpoint_path.is_dir() else None
    )  # a folder has configs of its own
    known, configs = architecture(checkpoint, folder)
    catalogue = FAMILIES[known.family].activations(configs, known.name)
    sites = candidates(catalogue[id] for id in catalogue)
    whole = [sites[-1].id]  # a network that is cut behind its last activation is whole
    blank = create_model(checkpoint, checkpoint_path=folder, recipe=whole, device="meta")
    sites = matching(sites, ids)
    ids = [site.id for site in sites]
    looked_at = data.images[:properties_from]
    check(looked_at, blank.size_divisibility, minimum=FEWEST)
    left = {id: "" for id in ids} if everything else filtering.by_name(filter_rules, ids)
    filtering.check(left)
    costs = reach(blank, ids, size)

    def cost(choice: Sequence[Site]) -> float:
        return max(costs[site.id].gflops for site in choice)

    affordable([site for site in sites if not left[site.id]], channels, cost, gflops)
    say(
        f"{len(ids)} activations of {checkpoint}, "
        f"{_estimate(blank, size, len(looked_at), draws, data.task, [s for s in sites if not left[s.id]])}"
    )

    backbone = create_model(
        checkpoint, pretrained=pretrained and not checkpoint_path, checkpoint_path=checkpoint_path, recipe=whole, timestep=timestep, prompt=prompt,
        device=device,
    )  # fmt: skip
    key = {
        "checkpoint": checkpoint, "weights": dict(backbone.provenance), "timestep": timestep, "prompt": prompt or "", "size": size, "seed": seed,
        "data": data.source, "images": _digest(data),
    }  # fmt: skip
    evidence = Evidence(out / "evidence", key)
    measured = _measured(
        out / "measured.json",
        backbone,
        data,
        ids,
        {**key, "draws": draws, "measured_on": len(looked_at), "ids": ids},
        progress,
    )
    dropped = filtering.apply(filter_rules, measured.properties)
    if not everything:
        filtering.check(dropped)
    survivors = [site for site in sites if not dropped[site.id]]
    compared = ids if everything else [site.id for site in survivors]
    affordable(survivors or sites, channels, cost, gflops)
    unseen = (
        "; --everything compares the others too and tells what the filter loses" if len(compared) < len(ids) else ""
    )
    say(f"{len(survivors)} of {len(ids)} pass the filter; comparing {len(compared)} on {data.source}{unseen}")

    evidence.gather(backbone, data.task, compared, lambda items: progress(items, "looking"))
    alone = scores(data.task, evidence, compared, lambda items: progress(items, "scoring"))
    if everything:
        best = sorted(ids, key=lambda id: -float(alone[id].mean()))[:10]
        kept = sum(not dropped[id] for id in best)
        advice = (
            "; rules that are [] choose among all, in the same folder and without looking again"
            if kept < len(best)
            else ""
        )
        say(f"of the best {len(best)} of all {len(ids)} the filter keeps {kept}; the best of all is {best[0]}{advice}")

    steps = choose(
        survivors or sites, alone, lambda together: data.task.score([evidence[id] for id in together]),
        channels=channels, cost=cost, budget=gflops, members=members,
    )  # fmt: skip
    arguments = f'"{checkpoint}"' + (
        f', checkpoint_path="{checkpoint_path}"' if checkpoint_path else ", pretrained=True" if pretrained else ""
    )
    declaration = Declaration(
        f"{known.name}_selected", known, _recipe(steps, sites, timestep, prompt or "", data, size)
    )
    selection = Selection(
        arguments,
        declaration,
        configs,
        data.source,
        tuple(filter_rules),
        tuple(sites),
        costs,
        measured,
        dropped,
        alone,
        data.task.metric,
        tuple(steps),
    )
    write(selection, out)
    say("painting the report")
    shown = data.images[: pictures.SHOWN]
    pictures.paint(backbone, shown, ids, out / "pictures", key)
    strips = {id: Image.open(out / "pictures" / f"{id}.png") for id in ids}
    pyramid = pictures.pyramid(backbone, shown, [level.activations for level in selection.recipe.levels])
    (out / "report.html").write_text(
        report.render(selection, strips, [pictures.photograph(image) for image in shown], pyramid), encoding="utf-8"
    )
    return selection


def _estimate(
    blank: DiffusionBackbone, size: int, images: int, draws: int, task: Task, compared: Sequence[Site]
) -> str:
    """What it will cost, in words, before it begins."""
    one = count(replace(blank.declaration, recipe=replace(blank.declaration.recipe, input_size=size)), blank.configs)
    looked = sum(len(look) for look in task.looks)
    denoiser = number(one.denoiser_gflops * (draws * images + looked) / 1000)
    encoder = number(one.encoder_gflops * (images + looked) / 1000)
    disk = number(sum(task.kept(site.channels) for site in compared) / 1e9)
    return (
        f"{images} images x {draws} noise draws and {len(task.looks)} looks: {denoiser} TFLOPs in the denoiser, "
        f"{encoder} in the image encoder, "
        f"and at most {disk} GB on the disk"
    )


def write(selection: Selection, out: Path) -> None:
    """The recipe, its card and the tables."""
    selection.recipe.to_yaml(out / "recipe.yaml")
    usage = backbone_card.USAGE_OF_RECIPE.replace("ARGUMENTS", selection.arguments)
    (out / "card.md").write_text(backbone_card.card(selection.declaration, selection.configs, usage), encoding="utf-8")
    chosen = {step.id: i + 1 for i, step in enumerate(selection.steps)}
    with (out / "activations.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        about = ("id", "module", "channels", "stride", "gflops", "parameters", "bytes")
        writer.writerow([*about, *filtering.MEASURED, "dropped", selection.metric, "spread", "chosen"])
        for site in selection.sites:
            cost, score = selection.reach[site.id], selection.scores.get(site.id)
            properties = [f"{getattr(selection.measured.properties[site.id], name):.4g}" for name in filtering.MEASURED]
            scored = ["", ""] if score is None else [f"{score.mean():.2f}", f"{score.std(ddof=1):.2f}"]
            row = [
                site.id,
                site.path,
                site.channels,
                site.stride,
                f"{cost.gflops:.2f}",
                cost.parameters,
                4 * cost.parameters,
                *properties,
            ]
            writer.writerow([*row, selection.dropped[site.id], *scored, chosen.get(site.id, "")])
    with (out / "curves.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "curve", "at", "value"])
        for site in selection.sites:
            found = selection.measured.properties[site.id]
            writer.writerows(
                [site.id, "noise, from cycles per image", f"{at:g}", f"{value:.4g}"] for at, value in found.noise_curve
            )
            writer.writerows(
                [site.id, "similarity, at pixels", f"{at:g}", f"{value:.4g}"] for at, value in found.similarity
            )
    with (out / "redundancy.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        ids = [site.id for site in selection.sites]
        writer.writerow(["", *ids])
        for id, row in zip(ids, selection.measured.redundancy.tolist(), strict=True):
            writer.writerow([id, *(f"{value:.3f}" for value in row)])


def _digest(data: Data) -> str:
    found = hashlib.sha256()
    for look in (*data.images, *data.task.looks):
        found.update(look.numpy().tobytes())
    return found.hexdigest()[:12]


def _measured(
    path: Path, backbone: DiffusionBackbone, data: Data, ids: Sequence[str], key: dict[str, Any], progress: Progress
) -> Measured:
    """The properties, from the file if it was made with the same settings."""
    if path.is_file():
        known = json.loads(path.read_text())
        if known["key"] == key:
            properties = {
                id: Properties(**{**values, "similarity": tuple(map(tuple, values["similarity"]))})
                for id, values in known["properties"].items()
            }
            return Measured(properties, torch.tensor(known["redundancy"]), key["measured_on"], key["draws"])
    images = data.images[: key["measured_on"]]
    state = path.with_name("measuring.pt")
    found = measure(
        backbone,
        images,
        ids,
        draws=key["draws"],
        seed=key["seed"],
        progress=lambda items: progress(items, "measuring"),
        state=state,
        key=json.dumps(key),
    )
    values = {id: asdict(properties) for id, properties in found.properties.items()}
    new = path.with_suffix(".new")
    new.write_text(
        json.dumps(
            {
                "key": key,
                "properties": values,
                "redundancy": [[round(v, 4) for v in row] for row in found.redundancy.tolist()],
            }
        )
    )
    new.replace(path)
    state.unlink(missing_ok=True)
    return found


def _recipe(
    steps: Sequence[Step], sites: Sequence[Site], timestep: float, prompt: str, data: Data, size: int
) -> Recipe:
    chosen = {step.id for step in steps}
    taken = [site for site in sites if site.id in chosen]  # forward order
    levels = tuple(
        Level(tuple(site.id for site in taken if site.stride == stride))
        for stride in sorted({site.stride for site in taken})
    )
    trail = ", then ".join(f"{step.id} ({data.task.metric} {step.score:.2f})" for step in steps)
    return Recipe(
        name="selected",
        levels=levels,
        timestep=timestep,
        prompt=prompt,
        input_size=size,
        source=f"diffusion-backbones select, on {data.source}",
        notes=(f"Chosen greedily: {trail}.",),
    )
