"""Measure what the README claims about cost: ``make bench``.

Everything is measured in pairs inside one run, alternating, on full-size random weights of Stable Diffusion 1.5 in
float32 on the CPU, and reported as ratios: a machine's own speed cancels. Loading is measured in fresh processes, and
every loaded weight is touched, so that memory-mapped files count.

    python benchmarks/run.py [--only forward] [--rounds 5] [--images 64] [--json results.json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from extraction import extract, extract_memory

LIMITS = {
    "forward / hand-written stock code": 1.02,
    "forward / whole U-Net with hooks": 1.0,
    "load: peak memory / kept bytes": 1.15,
    "load: first start / StableDiffusionPipeline.from_pretrained": 1.0,
    "load: later start / StableDiffusionPipeline.from_pretrained": 1.0,
    "import: seconds added to torch and timm": 0.3,
    "info: slowest backbone, seconds": 5.0,
    "threads: largest difference between eight and one": 0.0,
    "latents: on cached latents / encoded in every epoch": 1 / 1.8,
    "latents: the same, encoding once included": 0.8,
    "latents: largest difference of the loss": 1e-3,
    "select: sdxl, peak memory beyond the weights, GB": 8.0,
    "extract: stand-in, at once / one after another": 0.65,
    "extract: stand-in, at once / the device alone": 1.2,
    "extract: CPU, 64 x 64, seconds, batch 16 / batch 1": 0.6,
    "extract_memory: bytes more for each image more": 2000,
}


def alternate(rounds: int, **functions: Callable[[], Any]) -> dict[str, list[float]]:
    """Seconds of each function, run in turn ``rounds`` times after one warm-up."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if i:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(times: dict[str, list[float]], a: str, b: str) -> float:
    """Median over rounds of time a / time b."""
    return statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))


def stock(unet: Any, vae: Any, x: Any, prompt: Any, noise: Any, alpha: float, sigma: float) -> Any:
    """What a careful person writes by hand for ``sd15_gdf``: stock modules, and nothing behind the last activation."""
    import torch

    z = vae.encode(x, return_dict=False)[0].mode() * 0.18215
    h = unet.conv_in(alpha * z + sigma * noise)
    t = torch.full((len(x),), 51)
    emb = unet.time_embedding(unet.time_proj(t))
    skips = [h]
    for block in unet.down_blocks:
        h, more = (
            block(h, emb, encoder_hidden_states=prompt)
            if getattr(block, "has_cross_attention", False)
            else block(h, emb)
        )
        skips += more
    h = unet.mid_block(h, emb, encoder_hidden_states=prompt)
    maps = {}
    for i, block in enumerate(unet.up_blocks[:3]):
        for r, resnet in enumerate(block.resnets):
            h = resnet(torch.cat([h, skips.pop()], 1), emb)
            if (i, r) == (1, 2):
                maps["res-out"] = h
            if getattr(block, "has_cross_attention", False):
                vit = block.attentions[r]
                queries = vit.transformer_blocks[0].attn2.to_q
                handle = queries.register_forward_hook(lambda _m, _a, o, key=(i, r): maps.__setitem__(key, o))
                h = vit(h, encoder_hidden_states=prompt, return_dict=False)[0]
                handle.remove()
        h = block.upsamplers[0](h)
    last = unet.up_blocks[3]
    h = last.resnets[0](torch.cat([h, skips.pop()], 1), emb)
    vit = last.attentions[0]
    tokens, _ = vit._operate_on_continuous_inputs(h)
    first = vit.transformer_blocks[0]
    maps["k"] = first.attn1.to_k(first.norm1(tokens))

    def spatial(tokens: Any, size: int) -> Any:
        return tokens.transpose(1, 2).unflatten(2, (size, size)).contiguous()

    return [spatial(maps["k"], 64), spatial(maps[2, 1], 32), torch.cat([spatial(maps[1, 1], 16), maps["res-out"]], 1)]


def forward(rounds: int) -> dict[str, float]:
    """Time of ``sd15_gdf`` at 512 x 512, batch 1, against hand-written stock code and against the whole U-Net with
    hooks.
    """
    import torch
    from diffusers import UNet2DConditionModel

    import diffusion_backbones as db

    torch.manual_seed(0)
    backbone = db.create_model("sd15_gdf")
    unet = UNet2DConditionModel.from_config(backbone.configs["unet"]).eval().requires_grad_(False)
    unet.load_state_dict(backbone.denoiser.state_dict(), strict=False)
    vae = backbone.encoder
    x, prompt = torch.rand(1, 3, 512, 512) * 2 - 1, torch.randn(1, 77, 768)
    noise = backbone.canvas[0, :, :64, :64]
    alpha, sigma = backbone.forward_process.levels(51)
    hooked: dict[str, Any] = {}
    for site in (s for level in backbone.levels for s in level.sites):
        unet.get_submodule(site.path).register_forward_hook(
            lambda _m, _a, o, activation=site.id: hooked.__setitem__(activation, o)
        )

    def ours() -> Any:
        return backbone(x, prompt_embeds=prompt)

    def by_hand() -> Any:
        with torch.no_grad():
            return stock(unet, vae, x, prompt, noise, alpha, sigma)

    def whole() -> Any:
        with torch.no_grad():
            z = vae.encode(x).latent_dist.mode() * 0.18215
            return unet(alpha * z + sigma * noise, 51, encoder_hidden_states=prompt)

    difference = max((a - b).abs().max().item() for a, b in zip(ours(), by_hand(), strict=True))
    assert difference < 1e-4, f"the hand-written code computes something else: {difference}"
    times = alternate(rounds, ours=ours, by_hand=by_hand, whole=whole)
    return {
        "forward: seconds, ours": statistics.median(times["ours"]),
        "forward / hand-written stock code": ratio(times, "ours", "by_hand"),
        "forward / whole U-Net with hooks": ratio(times, "ours", "whole"),
    }


MEASURE = """
import json, sys, time, torch, transformers, diffusers
from diffusers import StableDiffusionPipeline, UNet2DConditionModel, AutoencoderKL
import diffusion_backbones as db
from diffusion_backbones import factory
from transformers import AutoTokenizer, CLIPTextModel
kind, folder = sys.argv[1:]
def memory(key):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(key))
open("/proc/self/clear_refs", "w").write("5")                 # reset the peak to what the imports left
before, start = memory("VmRSS"), time.perf_counter()
if kind == "ours":
    m = db.create_model("sd15_gdf", checkpoint_path=folder)
    modules = [m.denoiser, m.encoder]
else:
    p = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True)
    modules = [p.unet, p.vae, p.text_encoder]
returned = time.perf_counter() - start
for module in modules:
    for t in module.state_dict().values():
        t.view(-1)[::1024].sum()  # one value of every page: a mapped file is in memory now
seconds = time.perf_counter() - start
kept = sum(t.numel() * t.element_size() for module in modules for t in module.state_dict().values())
print(json.dumps(dict(seconds=seconds, returned=returned, peak=memory("VmHWM") - before, kept=kept)))
"""


def load(rounds: int) -> dict[str, float]:
    """Peak memory and time of loading ``sd15_gdf`` from a full-size folder, against diffusers' whole pipeline.

    Seconds are counted until every weight is in memory, since both map large files and return before a byte was read;
    what passes until the call returns is given beside it. The pipeline encodes no prompt while it loads; the first
    start of a backbone does, and keeps what came out.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_full_size(Path(scratch) / "sd15")
        runs: dict[str, list[dict[str, float]]] = {"first": [], "stock": [], "later": []}
        for i in range(rounds):
            env = os.environ | {"DIFFUSION_BACKBONES_CACHE": f"{scratch}/cache{i}", "HF_HUB_OFFLINE": "1"}
            for (
                start,
                results,
            ) in runs.items():  # the first start loads and runs the text encoder, later ones read what came out
                kind = "stock" if start == "stock" else "ours"
                out = subprocess.run(
                    [sys.executable, "-c", MEASURE, kind, str(folder)],
                    check=True,
                    capture_output=True,
                    text=True,
                    env=env,
                )
                results.append(json.loads(out.stdout.splitlines()[-1]))
    seconds = {kind: [r["seconds"] for r in results] for kind, results in runs.items()}
    returned = {kind: [r["returned"] for r in results] for kind, results in runs.items()}
    return {
        "load: kept bytes": runs["first"][0]["kept"],
        "load: seconds, first start": statistics.median(seconds["first"]),
        "load: seconds, later starts": statistics.median(seconds["later"]),
        "load: seconds, StableDiffusionPipeline.from_pretrained": statistics.median(seconds["stock"]),
        "load: peak memory / kept bytes": max(r["peak"] / r["kept"] for r in [*runs["first"], *runs["later"]]),
        "load: first start / StableDiffusionPipeline.from_pretrained": ratio(seconds, "first", "stock"),
        "load: later start / StableDiffusionPipeline.from_pretrained": ratio(seconds, "later", "stock"),
        "load: first start / StableDiffusionPipeline.from_pretrained, until the call returns": ratio(
            returned, "first", "stock"
        ),
        "load: later start / StableDiffusionPipeline.from_pretrained, until the call returns": ratio(
            returned, "later", "stock"
        ),
    }


def write_full_size(folder: Path) -> Path:
    """A diffusers folder of Stable Diffusion 1.5's full size with random weights."""
    import shutil

    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from diffusion_backbones.spec.configs import CONFIGS, package_configs
    from diffusion_backbones.spec.registry import get_checkpoint

    configs = package_configs(get_checkpoint("sd15"))
    UNet2DConditionModel.from_config(configs["unet"]).save_pretrained(folder / "unet")
    AutoencoderKL.from_config(configs["vae"]).save_pretrained(folder / "vae")
    CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])).save_pretrained(folder / "text_encoder")
    shutil.copytree(CONFIGS / "tinysd" / "tokenizer", folder / "tokenizer")
    shutil.copytree(CONFIGS / "sd15" / "scheduler", folder / "scheduler")
    index = json.loads((CONFIGS / "tinysd" / "model_index.json").read_text()) | {
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def imports(rounds: int) -> dict[str, float]:
    """Seconds that importing the package adds to importing torch and timm."""
    code = (
        "import torch, timm, time; t = time.perf_counter(); import diffusion_backbones; print(time.perf_counter() - t)"
    )
    times = [
        float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
        for _ in range(rounds)
    ]
    return {"import: seconds added to torch and timm": statistics.median(times)}


def info(_rounds: int) -> dict[str, float]:
    """Seconds of ``diffusion-backbones info NAME``, a whole process, for the slowest backbone."""
    import diffusion_backbones as db

    slowest = 0.0
    for name in db.list_models():
        start = time.perf_counter()
        subprocess.run(
            [Path(sys.executable).with_name("diffusion-backbones"), "info", name], check=True, capture_output=True
        )
        slowest = max(slowest, time.perf_counter() - start)
    return {"info: slowest backbone, seconds": slowest}


def threads(_rounds: int) -> dict[str, float]:
    """Largest difference between features computed by eight threads at once and by one."""
    import torch

    import diffusion_backbones as db

    backbone = db.create_model("tinysd_gdf", pretrained=True)
    inputs = [torch.rand(1, 3, 128, 192) * 2 - 1 for _ in range(8)]
    expected, results = [backbone(x) for x in inputs], [None] * 8
    workers = [threading.Thread(target=lambda i=i: results.__setitem__(i, backbone(inputs[i]))) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    differences = [
        (a - b).abs().max().item()
        for got, want in zip(results, expected, strict=True)
        for a, b in zip(got, want, strict=True)
    ]
    return {"threads: largest difference between eight and one": max(differences)}


def latents(images: int, batch: int = 4, epochs: int = 2) -> dict[str, float]:
    """Seconds of two epochs of a linear head on frozen ``sd15_gdf`` at 256 x 256: on cached latents, and with every
    image encoded in every epoch.

    By operations an epoch on latents takes 0.37 of one with the encoder, and two of them with encoding once 0.68.
    """
    import torch

    import diffusion_backbones as db

    torch.manual_seed(0)
    backbone = db.create_model("sd15_gdf")
    x, y = torch.rand(images, 3, 256, 256) * 2 - 1, torch.randint(10, (images,))

    def train(features: Callable[[int], Any]) -> list[float]:
        torch.manual_seed(1)
        head = torch.nn.Sequential(
            torch.nn.LayerNorm(backbone.num_features), torch.nn.Linear(backbone.num_features, 10)
        )
        optimizer, losses = torch.optim.SGD(head.parameters(), 1e-2), []
        for start in [*range(0, images, batch)] * epochs:
            loss = torch.nn.functional.cross_entropy(head(features(start)[-1].mean((2, 3))), y[start : start + batch])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    began = time.perf_counter()
    encoded = train(lambda start: backbone(x[start : start + batch]))
    between = time.perf_counter()
    z = torch.cat([backbone.encode(x[start : start + batch]) for start in range(0, images, batch)])
    ready = time.perf_counter()
    cached = train(lambda start: backbone.forward_latents(z[start : start + batch]))
    ended = time.perf_counter()
    return {
        "latents: images": images,
        "latents: seconds, encoded in every epoch": between - began,
        "latents: seconds, encoding once": ready - between,
        "latents: seconds, on cached latents": ended - ready,
        "latents: on cached latents / encoded in every epoch": (ended - ready) / (between - began),
        "latents: the same, encoding once included": (ended - between) / (between - began),
        "latents: largest difference of the loss": max(abs(a - b) for a, b in zip(encoded, cached, strict=True)),
    }


def select(images: int = 4) -> dict[str, float]:
    """Memory and time of measuring every activation of ``sdxl`` at full size, on random images of 512 x 512 with two
    noise draws each.
    """
    import torch

    import diffusion_backbones as db
    from diffusion_backbones.selection.measure import candidates, measure

    torch.manual_seed(0)
    backbone = db.create_model("sdxl", recipe=["unet-out"])
    ids = [site.id for site in candidates(backbone.catalogue[activation] for activation in backbone.catalogue)]
    weights = sum(tensor.numel() * tensor.element_size() for tensor in (*backbone.parameters(), *backbone.buffers()))
    x = [torch.rand(3, 512, 512) * 2 - 1 for _ in range(images)]
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from what is there now
    began = time.perf_counter()
    measure(backbone, x, ids)
    seconds = time.perf_counter() - began
    peak = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    return {
        "select: sdxl, activations": len(ids),
        "select: sdxl, seconds an image": seconds / images,
        "select: sdxl, weights, GB": weights / 1e9,
        "select: sdxl, peak memory beyond the weights, GB": (peak - weights) / 1e9,
    }


def main() -> None:
    parts: dict[str, Callable[[int], dict[str, float]]] = {
        f.__name__: f for f in (imports, info, threads, load, forward, extract)
    }
    parts["latents"] = lambda _: latents(args.images)  # pairs of epochs are their own rounds
    parts["select"] = lambda _: select()  # 10 GB of weights, seen once
    parts["extract_memory"] = lambda _: extract_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=parts, action="append")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=64, help="of the training with cached latents")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results: dict[str, float] = {}
    for name in args.only or parts:
        for key, value in parts[name](args.rounds).items():
            results[key] = value
            limit = LIMITS.get(key)
            verdict = "" if limit is None else f"   at most {limit:.3g}: {'yes' if value <= limit else 'NO'}"
            print(f"{key:<60} {value:14.4g}{verdict}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")
    sys.exit(any(results[key] > limit for key, limit in LIMITS.items() if key in results))


if __name__ == "__main__":
    main()
