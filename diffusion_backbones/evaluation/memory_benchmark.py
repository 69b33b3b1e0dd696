"""What a network takes in a process of its own: seconds until its weights are in memory, and the most memory in use
until it ran once.

The backbone is read from the compact folder that ``save_pretrained`` writes, the usual pipeline from the folders of its
components, as diffusers and transformers read them. Both map large files and return before a byte was read, so seconds
are counted until every page is in memory.
"""

from __future__ import annotations

import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_backbones.backbone.module import DiffusionBackbone
from diffusion_backbones.factory.entry_points import create_model
from diffusion_backbones.families import FAMILIES
from diffusion_backbones.ops import truncation
from diffusion_backbones.ops.recording import Recorder
from diffusion_backbones.spec.configs import Configs, package_configs
from diffusion_backbones.spec.declaration import Declaration


@dataclass(frozen=True)
class Footprint:
    """What one way takes.

    Args:
        seconds: Until its weights are in memory.
        weights: Bytes of them.
        peak: Bytes in use at most until it ran once, less what importing took; None where that cannot be read.
    """

    seconds: float
    weights: int
    peak: int | None


def backbone(saved: Path, x: Tensor, dtype: str, device: str, **options: Any) -> Footprint:
    """Of a backbone in the folder ``saved``, run on images ``x``, (B, 3, H, W) on the CPU in ``dtype``."""
    name = f"local-dir:{saved}"
    create_model(name, device="meta")  # imports all that is needed, so that it counts for nothing
    with _counting(device) as count:
        built = create_model(name, dtype=dtype, device=device, **options)
        count.loaded([built])
        built(x.to(device))
    return count.footprint()


@torch.no_grad()
def pipeline(folder: Path, declaration: Declaration, x: Tensor, dtype: str, device: str) -> Footprint:
    """Of all that a pipeline in ``folder`` holds, its whole denoiser run on images ``x`` and read with hooks."""
    family, configs = FAMILIES[declaration.checkpoint.family], package_configs(declaration.checkpoint)
    kinds = {name: type(module) for name, module in components(declaration, configs, "meta")}
    catalogue = family.activations(configs, declaration.checkpoint.name)
    sites = [site for site in (catalogue[id] for id in declaration.recipe.ids) if not site.encoder]
    with _counting(device) as count:
        parts = {name: _read(kind, folder / name, getattr(torch, dtype)).to(device) for name, kind in kinds.items()}
        count.loaded(parts.values())
        denoiser, x = parts[family.denoiser], x.to(device)
        z = family.image_encoder(configs).encode(parts[family.encoder], x) if family.encoder else x
        with torch.device(device):
            conditioning = {
                name: t.repeat(len(x), *[1] * (t.ndim - 1)) for name, t in family.blank_conditioning(configs).items()
            }
        conditioning = {name: t.to(z.dtype) if t.is_floating_point() else t for name, t in conditioning.items()}
        timestep = torch.full((len(x),), declaration.recipe.timestep, device=device)
        with Recorder(denoiser, sites).recording(sites):
            family.call(denoiser, z, timestep, conditioning, (x.shape[-2], x.shape[-1]))
    return count.footprint()


def _read(kind: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    from diffusers import ModelMixin

    network: nn.Module = kind.from_pretrained(
        folder, **{"torch_dtype" if issubclass(kind, ModelMixin) else "dtype": dtype}
    )
    return network


def components(declaration: Declaration, configs: Configs, device: str) -> Iterator[tuple[str, Any]]:
    """(Name, stock network with random weights), one by one, of all that a pipeline of this checkpoint holds."""
    family = FAMILIES[declaration.checkpoint.family]
    builders: dict[str, Callable[[], nn.Module]] = {
        family.denoiser: partial(family.build_denoiser, configs[family.denoiser])
    }
    if family.encoder:
        builders[family.encoder] = partial(family.image_encoder(configs).build, family.encoder_config(configs))
    for name in family.text_encoder_names(configs):
        builders[name] = partial(_text_encoder, configs[name])
    for name, build in builders.items():
        with torch.device(device):
            yield name, build()


def _text_encoder(config: Mapping[str, Any]) -> nn.Module:
    import transformers

    cls = getattr(transformers, config["architectures"][0])
    network: nn.Module = cls(
        cls.config_class(**{key: value for key, value in config.items() if key != "architectures"})
    )
    return network


@contextmanager
def written(built: DiffusionBackbone, dtype: str, say: Callable[[str], None]) -> Iterator[tuple[Path, Path]]:
    """A temporary folder with a backbone as ``save_pretrained`` writes it, and one with the components of its pipeline,
    random, in ``dtype``.

    Raises:
        OSError: The disk has no room for them.
    """
    declaration, configs = built.declaration, package_configs(built.declaration.checkpoint)
    size = sum(
        truncation.count_bytes(network.to(getattr(torch, dtype)))
        for _, network in components(declaration, configs, "meta")
    )
    size += truncation.count_bytes(built)
    room = shutil.disk_usage(tempfile.gettempdir()).free
    if size > room:
        raise OSError(f"{declaration.name}: {size / 1e9:.1f} GB of weights are written to be read again, and "
                      f"{tempfile.gettempdir()} has room for "
                      f"{room / 1e9:.1f} GB; set TMPDIR to a folder on a larger disk, or leave --load out")  # fmt: skip
    say(f"Writing {size / 1e9:.1f} GB of random weights, to be read again.")
    with tempfile.TemporaryDirectory(prefix="diffusion_backbones_") as scratch:
        saved, pipeline = Path(scratch) / "backbone", Path(scratch) / "pipeline"
        built.save_pretrained(saved)
        for name, network in components(declaration, configs, "cpu"):
            network.to(getattr(torch, dtype)).save_pretrained(pipeline / name)
        yield saved, pipeline


def alone(work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a function gives in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *args, **kwargs).result()


class _Count:
    """Of one footprint, while it is taken."""

    def __init__(self, device: str):
        import transformers  # noqa: F401

        self._device, self._weights, self._seconds = device, 0, 0.0
        self._before, self._began = _memory(device, start=True), time.perf_counter()

    def loaded(self, networks: Any) -> None:
        for network in networks:
            for tensor in network.state_dict().values():
                tensor.reshape(-1)[::1024].sum()  # one value of every page: a mapped file is in memory now
                self._weights += tensor.numel() * tensor.element_size()
        self._seconds = time.perf_counter() - self._began

    def ran(self) -> None:
        if torch.device(self._device).type == "cuda":
            torch.cuda.synchronize(self._device)
        self._after = _memory(self._device)

    def footprint(self) -> Footprint:
        known = self._before is not None and self._after is not None
        return Footprint(self._seconds, self._weights, self._after - self._before if known else None)  # type: ignore[operator]


@contextmanager
def _counting(device: str) -> Iterator[_Count]:
    count = _Count(device)
    yield count
    count.ran()


def _memory(device: str, start: bool = False) -> int | None:
    """Bytes in use: at the ``start`` of a measurement now, later the most since then. None where it cannot be read."""
    if torch.device(device).type == "cuda":
        if start:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    if start:
        Path("/proc/self/clear_refs").write_text("5")
    return next(
        (int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM")), None
    )
