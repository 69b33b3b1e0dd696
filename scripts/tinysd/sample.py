"""A sheet of pictures that tinysd draws for captions, without selection.

    python scripts/tinysd/sample.py docs/tinysd_samples.jpg [--photographs DATA] [--folder FOLDER] [--side 256]

Captions are those of the evaluation set, which training never had; with DATA (``photo_tasks.py``) they are one of each
of the 32 classes of photographs with most held-out ones. ``recognized.py`` says in a number what they are worth.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path

import photo_tasks
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image, ImageDraw
from tqdm import tqdm

from diffusion_backbones.evaluation.scenes import load_scenes
from diffusion_backbones.spec.configs import CONFIGS

COLUMNS, ROWS, MARGIN, CELL, BATCH = 8, 4, 40, 160, 8


def options(parser: argparse.ArgumentParser) -> None:
    """What says how pictures are drawn."""
    parser.add_argument("--folder", type=Path, default=CONFIGS / "tinysd", help="the checkpoint")
    parser.add_argument("--side", type=int, default=256, help="pixels")
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--steps", type=int, default=25)


def draw(captions: Sequence[str], args: argparse.Namespace) -> list[Image.Image]:
    """A picture for every caption; the seed of each is its place."""
    pipeline = StableDiffusionPipeline.from_pretrained(args.folder, safety_checker=None, torch_dtype=torch.float32)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    shape = {"height": args.side, "width": args.side}
    how = {"guidance_scale": args.guidance, "num_inference_steps": args.steps}
    images: list[Image.Image] = []
    for start in tqdm(range(0, len(captions), BATCH), desc="samples", mininterval=10):
        some = list(captions[start : start + BATCH])
        seeds = [torch.Generator().manual_seed(start + i) for i in range(len(some))]
        images += pipeline(some, generator=seeds, **shape, **how).images
    return images


def sheet(images: Sequence[Image.Image], captions: Sequence[str], columns: int = COLUMNS) -> Image.Image:
    """Rows of pictures, each above its caption."""
    rows = -(-len(images) // columns)
    canvas = Image.new("RGB", (columns * CELL, rows * (CELL + MARGIN)), "white")
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = i % columns * CELL, i // columns * (CELL + MARGIN)
        canvas.paste(image.resize((CELL - 4, CELL - 4), Image.Resampling.LANCZOS), (x + 2, y + 2))
        text = "\n".join(textwrap.wrap(caption, 32)[:3])
        ImageDraw.Draw(canvas).multiline_text((x + 4, y + CELL), text, fill="black", font_size=9, spacing=1)
    return canvas


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--photographs", type=Path, metavar="DATA", help="draw classes of photographs")
    options(parser)
    args = parser.parse_args()
    if args.photographs:
        _, held_out = photo_tasks.rows(args.photographs / "photos192")
        captions = [photo_tasks.caption(held_out, name) for name in photo_tasks.common(held_out, COLUMNS * ROWS)]
    else:
        captions = [scene.caption for scene in load_scenes().scenes[: COLUMNS * ROWS]]
    sheet(draw(captions, args), captions).save(args.out, quality=90)
    print(args.out)


if __name__ == "__main__":
    main()
