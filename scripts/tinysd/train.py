"""Train tinysd: its VAE, then its U-Net with its text encoder, then write the checkpoint that travels in the package.

    python scripts/tinysd/data.py build/tinysd
    python scripts/tinysd/train.py build/tinysd                  # every stage that is not finished
    python scripts/tinysd/train.py build/tinysd --stage unet     # one stage

Each stage saves itself every two minutes and goes on from there when it is started again. ``STAGE.csv`` and
``STAGE.png`` show its loss. With a GPU the same commands use it, and multiply in bfloat16; then larger batches cost
little more.

There is no pretrained CLIP here, so the text encoder is trained along with the U-Net: the captions are a few hundred
nouns, which the denoising loss can tell apart by itself.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, PNDMScheduler, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

VAE = {
    "block_out_channels": (16, 32, 64, 64),
    "norm_num_groups": 2,
    "layers_per_block": 2,
    "sample_size": 256,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
UNET = {
    "block_out_channels": (48, 96, 112, 112),
    "norm_num_groups": 8,
    "attention_head_dim": 4,
    "cross_attention_dim": 96,
    "sample_size": 32,
}
TEXT = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "projection_dim": 96,
}
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}
ROOT = Path(__file__).parents[2]
SAVE_EVERY = 120
"""Seconds between two saved states."""


def accelerator() -> Accelerator:
    """All of them are alike; accelerate refuses another."""
    return Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")


class Training:
    """A network on its way to its last step, which may be reached in several starts.

    Args:
        folder: State, loss table and curve are kept here under ``name``.
        name: Of the stage.
        model: What is trained.
        steps: How many updates in all.
        lr: Largest learning rate of a cosine with warm-up.
    """

    def __init__(self, folder: Path, name: str, model: nn.Module, steps: int, lr: float):
        self.folder, self.name, self.steps = folder, name, steps
        folder.mkdir(parents=True, exist_ok=True)
        self.accelerator = accelerator()
        optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.01)
        schedule = get_cosine_schedule_with_warmup(optimizer, max(1, steps // 50), steps)
        self.model, self.optimizer, self.schedule = self.accelerator.prepare(model, optimizer, schedule)
        self.ema = EMAModel(model.parameters(), decay=0.9995, use_ema_warmup=True, power=0.8, foreach=True)
        self.ema.to(self.accelerator.device)
        self.step, self.seconds = 0, 0.0
        self.accelerator.register_for_checkpointing(self, self.ema)
        if (folder / name).is_dir():
            self.accelerator.load_state(str(folder / name))

    def state_dict(self) -> dict[str, float]:
        return {"step": self.step, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.step, self.seconds = int(state["step"]), state["seconds"]

    def save(self) -> None:
        """Write the state; the one before stays until this one is whole."""
        new, old = self.folder / f"{self.name}.new", self.folder / self.name
        shutil.rmtree(new, ignore_errors=True)
        self.accelerator.save_state(str(new))
        shutil.rmtree(old, ignore_errors=True)
        new.rename(old)

    def run(self, loss_of: Callable[[nn.Module, torch.Generator], dict[str, Tensor]]) -> nn.Module:
        """Go on to the last step and return the network with its averaged weights.

        Args:
            loss_of: Network, generator of this step -> named losses; their sum is minimised.

        Raises:
            SystemExit: A loss is not finite.
        """
        since, saved = time.monotonic(), time.monotonic()
        recent: dict[str, list[float]] = {}
        bar = tqdm(range(self.step, self.steps), initial=self.step, total=self.steps, desc=self.name, mininterval=5)
        for step in bar:
            losses = loss_of(
                self.model, torch.Generator().manual_seed(step)
            )  # so that a step is the same after a restart
            total = torch.stack(list(losses.values())).sum()
            if not torch.isfinite(total):
                last = self.folder / self.name
                sys.exit(
                    f"{self.name}: the loss is {total.item()} at step {step}. {last} holds the last good state, if it "
                    "was saved; lower the learning rate."
                )
            self.accelerator.backward(total)
            self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            self.ema.step(self.model.parameters())
            for key, value in losses.items():
                recent.setdefault(key, []).append(value.item())
            self.step = step + 1
            if self.step % 50 == 0 or self.step == self.steps:
                means = {key: float(np.mean(values)) for key, values in recent.items()}
                bar.set_postfix({key: f"{value:.4f}" for key, value in means.items()}, refresh=False)
                self._log(means)
                recent.clear()
            if time.monotonic() - saved > SAVE_EVERY or self.step == self.steps:
                self.seconds += time.monotonic() - since
                since = saved = time.monotonic()
                self.save()
                saved = time.monotonic()
        network = self.accelerator.unwrap_model(self.model)
        self.ema.copy_to(network.parameters())
        plot(self.folder / f"{self.name}.csv")
        return network.eval().requires_grad_(False)

    def _log(self, means: dict[str, float]) -> None:
        path = self.folder / f"{self.name}.csv"
        rows = [row for row in csv.reader(path.open())][1:] if path.is_file() and self.step > 50 else []
        rows = [row for row in rows if int(row[0]) < self.step]  # what a restart does again
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["step", *means], *rows, [self.step, *(f"{v:.6g}" for v in means.values())]])


def initialise(model: nn.Module) -> None:
    """Random weights that keep the size of a signal, no biases, and residual branches that start at zero.

    torch's default shrinks a signal at every convolution until constant biases outweigh it, and a VAE then spends
    thousands of steps on the mean colour. Residual branches that start at zero: Dhariwal and Nichol, arXiv 2105.05233,
    and common since.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)


def plot(table: Path) -> None:
    """Draw a loss table as a picture beside it."""
    from matplotlib.figure import Figure

    header, *rows = csv.reader(table.open())
    values = np.array(rows, float)
    figure = Figure(figsize=(3.2 * (len(header) - 1), 2.6), layout="constrained")
    for axis, column, key in zip(
        np.atleast_1d(figure.subplots(1, len(header) - 1)), values.T[1:], header[1:], strict=True
    ):
        axis.plot(values[:, 0], column, linewidth=0.8)
        axis.set(title=key, xlabel="step", yscale="log")
    figure.savefig(table.with_suffix(".png"), dpi=110)


def pick(images: np.ndarray, count: int, crop: int, generator: torch.Generator) -> Tensor:
    """Random crops (count, 3, crop, crop) in [-1, 1], mirrored half the time."""
    side = images.shape[1]
    which = torch.randint(len(images), (count,), generator=generator).tolist()
    places = torch.randint(side - crop + 1, (count, 2), generator=generator).tolist()
    parts = [images[i, y : y + crop, x : x + crop] for i, (y, x) in zip(which, places, strict=True)]
    mirrored = torch.rand(count, generator=generator) < 0.5
    batch = torch.from_numpy(np.stack([part[:, ::-1] if m else part for part, m in zip(parts, mirrored, strict=True)]))
    return batch.permute(0, 3, 1, 2).float() / 127.5 - 1


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]


def train_vae(folder: Path, steps: int, batch: int, crop: int) -> None:
    """L1 on pixels and on their differences (which keeps outlines sharp), squared error of mean colours, and a small KL
    term.
    """
    small, large = (np.load(folder / f"scenes-{side}.npy", mmap_mode="r") for side in (128, 256))
    torch.manual_seed(0)
    vae = AutoencoderKL(**VAE)
    initialise(vae)
    with torch.no_grad():
        vae.quant_conv.weight[4:] *= 0.1  # little noise at first: the decoder sees what the encoder says
        vae.quant_conv.bias[4:] = -4
    training = Training(folder, "vae", Reconstruction(vae), steps, 1.5e-3)

    def loss_of(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        x = torch.cat([pick(small, batch // 2, crop, generator), pick(large, batch - batch // 2, crop, generator)])
        return model(x.to(training.accelerator.device), generator)

    vae = training.run(loss_of).vae
    device = training.accelerator.device
    sample = np.concatenate(
        [small[:256], large[:64].reshape(-1, 128, 2, 128, 3).swapaxes(1, 2).reshape(-1, 128, 128, 3)]
    )
    z = torch.cat([moments(vae, part, device)[0] for part in np.array_split(sample, 16)])
    vae.register_to_config(scaling_factor=round(1 / z.std().item(), 5))
    vae.save_pretrained(folder / "checkpoint" / "vae")


class Reconstruction(nn.Module):
    """The VAE with its loss."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, x: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        posterior = self.vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(x.device)
        y = self.vae.decode(posterior.mean + posterior.std * noise).sample.float()
        outline = torch.stack([F.l1_loss(a, b) for a, b in zip(edges(x), edges(y), strict=True)]).sum()
        colours = F.mse_loss(F.avg_pool2d(y, 8), F.avg_pool2d(x, 8))
        kl = posterior.kl().mean() / posterior.mean[0, 0].numel()  # for each latent position
        return {"pixels": F.l1_loss(y, x), "colours": 2 * colours, "outlines": 0.5 * outline, "kl": 2e-5 * kl}


@torch.no_grad()
def moments(vae: AutoencoderKL, images: np.ndarray, device: torch.device) -> Tensor:
    """uint8 images (B, S, S, 3) -> mean and standard deviation of their latents, (2, B, 4, S / 8, S / 8)."""
    x = torch.from_numpy(np.array(images)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
    posterior = vae.encode(x).latent_dist
    return torch.stack([posterior.mean, posterior.std]).cpu()


def latents(folder: Path, side: int) -> tuple[Tensor, Tensor]:
    """Latents of all training scenes of one size: scaled mean and deviation (2, N, 4, S / 8, S / 8) float16; and token
    ids (N, 77).
    """
    path = folder / f"latents-{side}.pt"
    if not path.is_file():
        device = accelerator().device
        vae = AutoencoderKL.from_pretrained(folder / "checkpoint" / "vae").to(device)
        images = np.load(folder / f"scenes-{side}.npy", mmap_mode="r")
        size = (32 if device.type == "cpu" else 512) * 128 * 128 // side**2
        chunks = tqdm(range(0, len(images), size), desc=path.name, mininterval=5)
        z = [
            (moments(vae, images[start : start + size], device) * vae.config.scaling_factor).half() for start in chunks
        ]
        new = path.with_suffix(".new")
        torch.save(torch.cat(z, 1), new)
        new.rename(path)
    tokens = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    captions = json.loads((folder / f"captions-{side}.json").read_text())
    return torch.load(path), tokens(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


class Denoiser(nn.Module):
    """The U-Net and the text encoder, which are trained together."""

    def __init__(self, unet: UNet2DConditionModel, text: CLIPTextModel):
        super().__init__()
        self.unet, self.text = unet, text

    def forward(self, z: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        return self.unet(z, t, self.text(ids).last_hidden_state).sample


def train_unet(folder: Path, steps: int, batch: int, large_share: float) -> None:
    """v-prediction on latents of 128 x 128 scenes, then, for the last ``large_share`` of the steps, of 256 x 256
    scenes.

    One caption in ten is dropped, for classifier-free guidance and because features are read under the empty prompt.
    """
    sets = {side: latents(folder, side) for side in (128, 256)}
    tokens = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    empty = torch.tensor(tokens("", padding="max_length").input_ids)
    ids = {
        "bos_token_id": tokens.bos_token_id,
        "eos_token_id": tokens.eos_token_id,
        "pad_token_id": tokens.pad_token_id,
    }
    torch.manual_seed(0)
    model = Denoiser(UNet2DConditionModel(**UNET), CLIPTextModel(CLIPTextConfig(vocab_size=len(tokens), **TEXT, **ids)))
    initialise(model.unet)
    nn.init.zeros_(model.unet.conv_out.weight)
    training = Training(folder, "unet", model, steps, 1.2e-3)
    noise = DDPMScheduler(**NOISE)

    def loss_of(network: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        side = 256 if training.step >= steps * (1 - large_share) else 128
        (mean, std), captions = sets[side]
        n = batch * 128 * 128 // side**2
        which = torch.randint(len(mean), (n,), generator=generator)
        sampled, e = torch.randn(2, n, *mean.shape[1:], generator=generator)
        z = mean[which].float() + std[which].float() * sampled
        t = (
            (torch.arange(n) + torch.rand(n, generator=generator)) / n * 1000
        ).long()  # stratified: less variance than independent draws
        prompts = torch.where((torch.rand(n, generator=generator) < 0.1)[:, None], empty, captions[which])
        noisy, target = noise.add_noise(z, e, t), noise.get_velocity(z, e, t)
        device = training.accelerator.device
        return {"v": F.mse_loss(network(noisy.to(device), t.to(device), prompts.to(device)), target.to(device))}

    model = training.run(loss_of)
    model.unet.save_pretrained(folder / "checkpoint" / "unet")
    model.text.save_pretrained(folder / "checkpoint" / "text_encoder")


def export(folder: Path, target: Path) -> None:
    """Write what was trained as a diffusers folder in float16."""
    trained = folder / "checkpoint"
    shutil.rmtree(target, ignore_errors=True)
    AutoencoderKL.from_pretrained(trained / "vae").half().save_pretrained(target / "vae")
    UNet2DConditionModel.from_pretrained(trained / "unet").half().save_pretrained(target / "unet")
    CLIPTextModel.from_pretrained(trained / "text_encoder").half().save_pretrained(target / "text_encoder")
    for config in target.glob("*/config.json"):  # diffusers notes where it was read, which is of this machine alone
        kept = {key: value for key, value in json.loads(config.read_text()).items() if key != "_name_or_path"}
        config.write_text(json.dumps(kept, indent=2) + "\n")
    PNDMScheduler(**NOISE, skip_prk_steps=True, steps_offset=1).save_pretrained(target / "scheduler")
    shutil.copytree(folder / "tokenizer", target / "tokenizer")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "PNDMScheduler"],
    }
    (target / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print(f"{target}: {size / 2**20:.1f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what data.py wrote; states and results go there too")
    parser.add_argument(
        "--stage", choices=("vae", "unet", "export"), help="only this one; the default is all, in order"
    )
    parser.add_argument("--vae-steps", type=int, default=3400)
    parser.add_argument("--vae-batch", type=int, default=8, help="crops in a step")
    parser.add_argument("--vae-crop", type=int, default=64, help="their side in pixels, at most 128")
    parser.add_argument("--unet-steps", type=int, default=1700)
    parser.add_argument(
        "--unet-batch", type=int, default=32, help="scenes of 128 x 128, or a quarter as many of 256 x 256"
    )
    parser.add_argument(
        "--large-share", type=float, default=0.5, help="share of the steps, at the end, that are on 256 x 256"
    )
    parser.add_argument("--target", type=Path, default=ROOT / "diffusion_backbones/configs/tinysd")
    args = parser.parse_args()
    stages = [args.stage] if args.stage else ["vae", "unet", "export"]
    if not (args.folder / "tokenizer").is_dir():
        sys.exit(
            f"{args.folder} holds no finished training data; run python scripts/tinysd/data.py {args.folder} first"
        )
    if "vae" in stages:
        train_vae(args.folder, args.vae_steps, args.vae_batch, args.vae_crop)
    if "unet" in stages:
        train_unet(args.folder, args.unet_steps, args.unet_batch, args.large_share)
    if "export" in stages:
        export(args.folder, args.target)


if __name__ == "__main__":
    main()
