"""The whole selection in one folder: measured, filtered, compared, chosen.

::

    selection/
      report.html           everything to look at, in one file
      recipe.yaml           the choice: create_model(checkpoint, recipe="selection/recipe.yaml")
      card.md               its model card
      activations.csv       every activation: what it is, its cost, its properties, why it was dropped, its score
      curves.csv            the noise of each by octave of frequency, the similarity of two places by their distance
      redundancy.csv        similarity (linear CKA) of those that were measured
      measured.json         the properties, so that a second run need not measure again
      evidence/, pictures/  the caches of the comparison and of the report; may be removed
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from diffusion_backbones.backbone.module import DiffusionBackbone
from diffusion_backbones.extraction.settings import weights_digest
from diffusion_backbones.ops import atomic
from diffusion_backbones.selection import pictures, report, tables
from diffusion_backbones.selection import rules as filtering
from diffusion_backbones.selection.choose import Budget, Step, choose
from diffusion_backbones.selection.compare import FeatureCache, single_scores
from diffusion_backbones.selection.data import Data
from diffusion_backbones.selection.measure import Measured, measure
from diffusion_backbones.selection.prepare import Network, Prepared, Settings, prepare
from diffusion_backbones.selection.properties import Properties
from diffusion_backbones.selection.result import Selection
from diffusion_backbones.selection.rules import Rule
from diffusion_backbones.selection.treatment import Treatment
from diffusion_backbones.spec.activations import Site
from diffusion_backbones.spec.declaration import Declaration
from diffusion_backbones.spec.recipe import Level, Recipe

MARKS = ("measured.json", "measuring.pt", "evidence/done.json")
"""Files by which the folder of a selection is known, however early it was stopped."""
RESULTS = ("recipe.yaml", "card.md", "activations.csv", "curves.csv", "redundancy.csv", "report.html", "pictures")
"""What is written besides."""
Progress = Callable[[Iterable[Any], str], Iterable[Any]]


@dataclass(frozen=True)
class Feedback:
    """How a run reports: ``progress`` wraps what takes long, ``say`` is called with messages."""

    progress: Progress
    say: Callable[[str], None]


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
    discard: str | None = None,
    normalize: str | None = None,
    progress: Progress = lambda items, _: items,
    say: Callable[[str], None] = lambda _: None,
) -> Selection:
    """Choose a recipe for a checkpoint. A run that was stopped resumes.

    Args:
        checkpoint: A name from :func:`~diffusion_backbones.list_checkpoints`, or ``local-dir:`` or ``hf-hub:`` and a
            diffusers folder.
        data: Images and task; see :mod:`~diffusion_backbones.selection.data`.
        out: Folder for the results.
        pretrained, checkpoint_path, device: As in :func:`~diffusion_backbones.create_model`.
        timestep: Timestep at which the network is read.
        prompt: Prompt that the network reads, empty by default.
        ids: Shell-style patterns of the candidates, all by default.
        rules: The filter; the paper's by default.
        everything: Compare also what the rules drop. The choice is still made among the rest, if there is one.
        draws: Noise draws for each image that properties are measured on.
        properties_from: Most images that properties are measured on.
        channels: Most channels of the whole pyramid.
        gflops: Most GFLOPs of the denoiser up to the last activation.
        members: Most activations in the recipe.
        seed: Seed of the noise.
        discard: ``"auto"`` sets the massive channels of every candidate to zero before anything is measured, and of the
            recipe's activations then.
        normalize: ``"layer"`` or ``"l2"``: done to every candidate likewise, as a recipe does it.
        progress: Wraps what takes long, such as ``tqdm``; called with the items and a label.
        say: Called with progress messages.

    Raises:
        KeyError: The checkpoint is unknown.
        FileNotFoundError: A folder holds no diffusion network.
        ValueError: There are too few images or they have a size that the network does not take, the rules drop
            everything, nothing fits the budget, or ``out`` holds the results of other settings.
    """
    network = Network(checkpoint, pretrained, checkpoint_path, device, timestep, prompt or "")
    treatment = Treatment(discard or "", normalize or "none")
    chosen_rules = tuple(filtering.load() if rules is None else rules)
    budget = Budget(channels, gflops, members)
    settings = Settings(network, tuple(ids), chosen_rules, everything, draws, properties_from, budget, seed, treatment)
    return _run(settings, data, out, Feedback(progress, say))


def _run(settings: Settings, data: Data, out: Path, feedback: Feedback) -> Selection:
    """The steps of a selection, in order."""
    _check_folder(out)
    prepared = prepare(settings, data)
    ids = prepared.ids
    estimate = prepared.estimate(settings.draws, data.task)
    feedback.say(f"{len(ids)} activations of {settings.network.checkpoint}, {estimate}")
    backbone = settings.network.build(prepared.last)
    key = _key(settings, prepared, backbone, data)
    treat = settings.treatment.of(backbone, ids, prepared.size) if settings.treatment.key else settings.treatment
    cache = FeatureCache(out / "evidence", key)
    measured_by = {**key, "draws": settings.draws, "measured_on": len(prepared.images), "ids": ids}
    measured = _measured(out / "measured.json", backbone, data, ids, measured_by, feedback.progress, treat)
    dropped = filtering.apply(settings.rules, measured.properties)
    if not settings.everything:
        filtering.check_some_kept(dropped)
    kept = prepared.check_affordable(dropped)
    compared = ids if settings.everything else [site.id for site in kept]
    scores = _compare(backbone, data, cache, compared, len(kept), len(ids), feedback, treat)
    if settings.everything:
        feedback.say(_cost_of_filter(scores, dropped))
    steps = choose(
        kept or prepared.sites,
        scores,
        lambda together: data.task.score([cache[name] for name in together]),
        prepared.budget,
    )
    recipe = _recipe(steps, prepared.sites, settings.network, data, prepared.size)
    recipe = recipe.override(**treat.settings(recipe.ids))
    selection = Selection(
        arguments=settings.network.arguments,
        declaration=Declaration(f"{prepared.checkpoint.name}_selected", prepared.checkpoint, recipe),
        configs=prepared.configs,
        source=data.source,
        rules=settings.rules,
        sites=prepared.sites,
        prefix_costs=prepared.costs,
        measured=measured,
        dropped=dropped,
        scores=scores,
        metric=data.task.metric,
        steps=tuple(steps),
    )
    tables.write(selection, out)
    feedback.say("painting the report")
    _write_report(selection, backbone, data, out, key)
    return selection


def _check_folder(out: Path) -> None:
    """Check that nothing in the folder would be replaced but what an earlier selection wrote there.

    Raises:
        ValueError: There is a file that no selection made.
    """
    if any((out / name).is_file() for name in MARKS):
        return
    if foreign := [name for name in RESULTS if (out / name).exists()]:
        raise ValueError(f"{out / foreign[0]} is there, and no selection made it; choose another folder")


def _key(settings: Settings, prepared: Prepared, backbone: DiffusionBackbone, data: Data) -> dict[str, Any]:
    """All that the caches of a run depend on."""
    return {
        "checkpoint": settings.network.checkpoint,
        "weights": dict(backbone.provenance),
        "weights_digest": weights_digest(backbone),
        "timestep": settings.network.timestep,
        "prompt": settings.network.prompt,
        "size": prepared.size,
        "seed": settings.seed,
        "data": data.source,
        "images": _digest(data),
        **settings.treatment.key,
    }


def _compare(
    backbone: DiffusionBackbone,
    data: Data,
    cache: FeatureCache,
    compared: Sequence[str],
    kept: int,
    total: int,
    feedback: Feedback,
    treat: Treatment,
) -> dict[str, NDArray[np.float64]]:
    """The score of every compared activation by itself, for each split."""
    others = "; --everything compares the others too, to see what the filter costs" if len(compared) < total else ""
    feedback.say(f"{kept} of {total} pass the filter; comparing {len(compared)} on {data.source}{others}")
    cache.gather(backbone, data.task, compared, lambda items: feedback.progress(items, "reading"), treat)
    return single_scores(data.task, cache, compared, lambda items: feedback.progress(items, "scoring"))


def _cost_of_filter(scores: dict[str, NDArray[np.float64]], dropped: dict[str, str]) -> str:
    """How many of the best activations the filter keeps, in words."""
    best = sorted(scores, key=lambda name: -float(scores[name].mean()))[:10]
    kept = sum(not dropped[name] for name in best)
    lossless = kept == len(best)
    advice = "" if lossless else "; rules that are [] choose among all, in the same folder, with the cached features"
    return f"of the best {len(best)} of all {len(scores)} the filter keeps {kept}; the best of all is {best[0]}{advice}"


def _write_report(
    selection: Selection, backbone: DiffusionBackbone, data: Data, out: Path, key: dict[str, Any]
) -> None:
    shown, ids = data.images[: pictures.SHOWN], [site.id for site in selection.sites]
    pictures.paint(backbone, shown, ids, out / "pictures", key)
    strips = {name: Image.open(out / "pictures" / f"{name}.png") for name in ids}
    pyramid = pictures.pyramid(backbone, shown, [level.activations for level in selection.recipe.levels])
    photographs = [pictures.photograph(image) for image in shown]
    atomic.write_text(out / "report.html", report.render(selection, strips, photographs, pyramid))


def _digest(data: Data) -> str:
    found = hashlib.sha256()
    for view in (*data.images, *data.task.views):
        found.update(view.numpy().tobytes())
    return found.hexdigest()[:12]


def _measured(
    path: Path,
    backbone: DiffusionBackbone,
    data: Data,
    ids: Sequence[str],
    key: dict[str, Any],
    progress: Progress,
    treat: Treatment,
) -> Measured:
    """The properties, from the file if it has the same key."""
    if path.is_file():
        known = json.loads(path.read_text())
        if known["key"] == key:
            properties = {
                name: Properties(**{**values, "similarity": tuple(map(tuple, values["similarity"]))})
                for name, values in known["properties"].items()
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
        treat=treat,
    )
    values = {name: asdict(properties) for name, properties in found.properties.items()}
    redundancy = [[round(v, 4) for v in row] for row in found.redundancy.tolist()]
    atomic.write_text(path, json.dumps({"key": key, "properties": values, "redundancy": redundancy}))
    state.unlink(missing_ok=True)
    return found


def _recipe(steps: Sequence[Step], sites: Sequence[Site], network: Network, data: Data, size: int) -> Recipe:
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
        timestep=network.timestep,
        prompt=network.prompt,
        input_size=size,
        source=f"diffusion-backbones select, on {data.source}",
        notes=(f"Chosen greedily: {trail}.",),
    )
