"""``python -m diffusion_backbones.cli``: the command line."""

from diffusion_backbones.cli.program import main

main(prog_name="diffusion-backbones")
