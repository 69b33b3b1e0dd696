"""A sheet of 32 scenes that tinysd draws for captions of the evaluation set, which training never had.

python scripts/tinysd/sample.py docs/tinysd_samples.jpg [--folder FOLDER] [--side 256]
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image, ImageDraw

from diffusion_backbones.evaluation.scenes import load_scenes
from diffusion_backbones.spec.configs import CONFIGS

COLUMNS, ROWS, MARGIN = 8, 4, 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--folder", type=Path, default=CONFIGS / "tinysd")
    parser.add_argument("--side", type=int, default=256, help="pixels")
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--steps", type=int, default=25)
    args = parser.parse_args()
    pipeline = StableDiffusionPipeline.from_pretrained(args.folder, safety_checker=None, torch_dtype=torch.float32)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    captions = [scene.caption for scene in load_scenes().scenes[: COLUMNS * ROWS]]
    shape = {
        "height": args.side,
        "width": args.side,
        "guidance_scale": args.guidance,
        "num_inference_steps": args.steps,
    }
    images: list[Image.Image] = []
    for start in range(0, len(captions), 8):
        images += pipeline(captions[start : start + 8], generator=torch.Generator().manual_seed(start), **shape).images
    cell = 160
    sheet = Image.new("RGB", (COLUMNS * cell, ROWS * (cell + MARGIN)), "white")
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = i % COLUMNS * cell, i // COLUMNS * (cell + MARGIN)
        sheet.paste(image.resize((cell - 4, cell - 4), Image.Resampling.LANCZOS), (x + 2, y + 2))
        text = "\n".join(textwrap.wrap(caption, 32)[:3])
        ImageDraw.Draw(sheet).multiline_text((x + 4, y + cell), text, fill="black", font_size=9, spacing=1)
    sheet.save(args.out, quality=90)
    print(args.out)


if __name__ == "__main__":
    main()
