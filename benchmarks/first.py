"""What the first features of a process cost, and a run of ``extract`` with nothing to do.

Each way is a process of its own, run in turn, and its CPU time counts, to which other programs add least. Medians are
printed, and the least.

    python benchmarks/first.py [--rounds 5]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

PHOTO = Path(__file__).parent.parent / "docs" / "cat.jpg"
SIZE = 256
FIRST = f"""
import torch, diffusion_backbones as db
backbone = db.create_model("tinysd_gdf", pretrained=True)
x = torch.zeros(1, 3, {SIZE}, {SIZE})
backbone(x)
"""
FEATURES, AGAIN = "first features", f"{FIRST}\nbackbone(x)"
WAYS = {
    "import torch, timm": "import torch, timm",
    "the same, and the classes of diffusers": (
        "import torch, timm; from diffusers import UNet2DConditionModel, AutoencoderKL, DDPMScheduler"
    ),
    FEATURES: FIRST,
    f"{FEATURES}, twice": AGAIN,
    "import diffusion_backbones": "import diffusion_backbones",
}
EXTRACT = "from diffusion_backbones.cli.program import main; main()"


def seconds(code: str, *arguments: str) -> float:
    """The CPU time of a process that runs some code, in seconds."""
    before = os.times()
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    """Measure all, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    os.environ["OMP_NUM_THREADS"] = "1"  # threads that wait for each other count, and say nothing here
    with tempfile.TemporaryDirectory() as folder:
        command = ("extract", "tinysd_gdf", str(PHOTO), "-o", folder, "--size", "64")
        ways = {name: (code,) for name, code in WAYS.items()} | {"extract, nothing to do": (EXTRACT, *command)}
        seconds(EXTRACT, *command)
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, way in ways.items():
                times[name].append(seconds(*way))
    for name, found in times.items():
        print(f"{name:42}{statistics.median(found):6.2f} s, least {min(found):.2f}")
    for which in (statistics.median, min):
        bare, first, both = (which(times[name]) for name in ("import torch, timm", FEATURES, f"{FEATURES}, twice"))
        network = max(both - first, 0.0)
        print(f"{which.__name__}: first features / (import torch, timm + the network) {first / (bare + network):.2f}")


if __name__ == "__main__":
    main()
