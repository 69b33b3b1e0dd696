"""The footprint of a network in a process of its own: seconds until its weights are in memory, and peak memory until it
has run once.

The backbone is loaded from the compact folder that ``save_pretrained`` writes, the usual pipeline from the folders of
its components, by diffusers and transformers. Both map large files and return before a byte was read, so seconds are
counted until every page is in memory.
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
from diffusion_backbones.families import architecture
from diffusion_backbones.ops import truncation
from diffusion_backbones.ops.recording import Recorder
from diffusion_backbones.spec.declaration import Declaration
from diffusion_backbones.surgery.plan import Plan


@dataclass(frozen=True)
class Footprint:
    """The footprint of one way.

    Args:
        seconds: Seconds until its weights are in memory.
        weights: Bytes of the weights.
        peak: Peak memory in bytes until it has run once, without what the imports took; None if it cannot be read.
    """

    seconds: float
    weights: int
    peak: int | None


def backbone(saved: Path, x: Tensor, dtype: str, device: str, **options: Any) -> Footprint:
    """The footprint of a backbone in the folder ``saved``, run on images ``x`` (B, 3, H, W), which are on the CPU."""
    name = f"local-dir:{saved}"
    create_model(name, device="meta")  # imports everything beforehand, so that it is not counted
    with _counting(device) as count:
        built = create_model(name, dtype=dtype, device=device, **options)
        count.loaded([built])
        built(x.to(device))
    return count.footprint()


@torch.no_grad()
def pipeline(folder: Path, declaration: Declaration, x: Tensor, dtype: str, device: str) -> Footprint:
    """The footprint of all components of the pipeline in ``folder``: its whole denoiser is run on images ``x`` and read
    with hooks.
    """
    plan = Plan.of(declaration, truncate=False)
    network, sites = plan.architecture, [site for site in plan.sites if not site.encoder]
    kinds = {name: type(module) for name, module in components(declaration, "meta")}
    with _counting(device) as count:
        parts = {name: _read(kind, folder / name, getattr(torch, dtype)).to(device) for name, kind in kinds.items()}
        count.loaded(parts.values())
        denoiser, x = parts[network.denoiser], x.to(device)
        z = network.image_encoder.encode(parts[network.encoder], x) if network.encoder else x
        with torch.device(device):
            blank = network.blank_conditioning()
        conditioning = {
            name: t.repeat(len(x), *[1] * (t.ndim - 1)).to(z.dtype if t.is_floating_point() else None)
            for name, t in blank.items()
        }
        timestep = torch.full((len(x),), declaration.recipe.timestep, device=device)
        with Recorder(denoiser, sites).recording(sites):
            network.call(denoiser, z, timestep, conditioning, (x.shape[-2], x.shape[-1]))
    return count.footprint()


def _read(kind: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    from diffusers import ModelMixin

    network: nn.Module = kind.from_pretrained(
        folder, **{"torch_dtype" if issubclass(kind, ModelMixin) else "dtype": dtype}
    )
    return network


def components(declaration: Declaration, device: str) -> Iterator[tuple[str, Any]]:
    """The components of a checkpoint's pipeline, one by one: name, and stock network with random weights."""
    network = architecture(declaration.checkpoint)
    builders: dict[str, Callable[[], nn.Module]] = {network.denoiser: network.build_denoiser}
    if network.encoder:
        builders[network.encoder] = network.image_encoder.build
    for name in network.text_encoders:
        builders[name] = partial(_text_encoder, network.configs[name])
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
    """Two temporary folders: the backbone as ``save_pretrained`` writes it, and the components of its pipeline with
    random weights in ``dtype``.

    Args:
        built: The backbone.
        dtype: Dtype of the pipeline.
        say: Called with progress messages.

    Raises:
        OSError: The disk has no room for them.
    """
    declaration = built.declaration
    size = sum(
        truncation.count_bytes(network.to(getattr(torch, dtype))) for _, network in components(declaration, "meta")
    )
    size += truncation.count_bytes(built)
    room = shutil.disk_usage(tempfile.gettempdir()).free
    if size > room:
        raise OSError(
            f"{declaration.name}: {size / 1e9:.1f} GB of weights must be written, and {tempfile.gettempdir()} has room "
            f"for {room / 1e9:.1f} GB; set TMPDIR to a folder on a larger disk, or leave --load out"
        )
    say(f"Writing {size / 1e9:.1f} GB of random weights, to load them.")
    with tempfile.TemporaryDirectory(prefix="diffusion_backbones_") as scratch:
        saved, pipeline = Path(scratch) / "backbone", Path(scratch) / "pipeline"
        built.save_pretrained(saved)
        for name, network in components(declaration, "cpu"):
            network.to(getattr(torch, dtype)).save_pretrained(pipeline / name)
        yield saved, pipeline


def alone(work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function in a fresh process, and return its result."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *args, **kwargs).result()


class _Count:
    """The measurement of one footprint."""

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
    """Bytes in use at the ``start`` of a measurement, later the peak since then. None if it cannot be read."""
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
