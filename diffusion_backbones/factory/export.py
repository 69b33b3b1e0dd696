"""A backbone as one file that runs without this package: ``torch.export``, AOTInductor, ONNX.

Weights, recipe, prompt, timestep and fixed noise are constants of the file. What a call of a backbone may change
(``prompt=``, ``timestep=``, ``indices=``, ``latents=`` ...) can no longer be changed, and images are not checked: (B,
3, H, W) in the backbone's input format go in, the maps come out.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffusion_backbones.backbone.module import DiffusionBackbone
from diffusion_backbones.ops.describe import dtype_name
from diffusion_backbones.surgery import compilation

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from diffusion_backbones.spec.recipe import Recipe

SUFFIXES = (".pt2", ".onnx")
MOST = {"batch": 32, "pixels": 2048}
"""The largest batch and side that a file with dynamic sizes is made for. The smallest side is twice
``size_divisibility``: PyTorch takes a size of one for a constant, and the coarsest map may have it.
"""
ONE_FILE = 2**31 - 2**24
"""Bytes of weights that an ONNX file itself can hold; more go into a second file beside it."""
METADATA = "metadata.json"
"""Name of :func:`describe`'s text within an exported program that was not compiled."""


class _Maps(nn.Module):
    """A backbone whose only input is the image."""

    def __init__(self, backbone: DiffusionBackbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, image: Tensor) -> list[Tensor]:
        maps: list[Tensor] = self.backbone(image)
        return maps


def export(
    backbone: DiffusionBackbone,
    path: str | Path,
    *,
    size: Sequence[int] | None = None,
    batch: int | None = None,
    dynamic: bool = False,
    compiled: bool = True,
    overwrite: bool = False,
) -> dict[str, str]:
    """Write a backbone to one file that runs without this package.

    Args:
        backbone: With weights, on the device where the file is to run. Its dtype is the file's.
        path: ``.pt2`` for a library compiled by AOTInductor, loaded with ``torch._inductor.aoti_load_package(path)``,
            on this kind of machine and with this version of PyTorch; ``.onnx`` for ONNX.
        size: Height and width in pixels; by default the recipe's, square.
        batch: Images in a call; any number up to 32 by default.
        dynamic: Any height and width that are multiples of the backbone's ``size_divisibility``, from twice that to
            2048.
        compiled: False writes the exported program itself to the ``.pt2``: it is loaded with
            ``torch.export.load(path)``, may be compiled or moved there, and until then runs as fast as the backbone.
        overwrite: Replace an existing file.

    Returns:
        What the file says of itself: name, input, channels, strides, sizes and what is fixed.

    Raises:
        FileExistsError: There is a file, and ``overwrite`` is False.
        FileNotFoundError: AOTInductor without a C++ compiler.
        ImportError: ONNX without its packages.
        OSError: The file cannot be written.
        ValueError: An unknown suffix; sizes that cannot be; a backbone without weights; a network that cannot be
            exported so.
    """
    path = Path(path)
    check_path(path, compiled, overwrite)
    _check(backbone, size, batch, dynamic)
    onnx = path.suffix == ".onnx"
    if compiled and not onnx and backbone.device.type == "cpu":
        compilation.check_compiler("write the program itself, compiled=False or --program")
    path.parent.mkdir(parents=True, exist_ok=True)
    data = describe(backbone, size, batch, dynamic)
    with tempfile.TemporaryDirectory(
        dir=path.parent, prefix=f".{path.name}."
    ) as folder:  # what cannot be written says so now
        part = Path(folder) / path.name
        if onnx:
            _write_onnx(trace(backbone, size, batch, dynamic), part, data)
        elif not compiled:
            torch.export.save(trace(backbone, size, batch, dynamic), part, extra_files={METADATA: json.dumps(data)})
        else:
            fixed = not dynamic and batch is not None  # then weights are packed as the processor reads them fastest
            configs = {"freezing": True} if fixed else compilation.settings(True, backbone.device)
            program = trace(backbone, size, batch, dynamic)
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(part), inductor_configs={**configs, "aot_inductor.metadata": data}
            )
        for file in sorted(
            Path(folder).iterdir(), key=lambda file: file == part
        ):  # the weights of a large ONNX file first
            file.replace(path.with_name(file.name))
    return data


@torch.no_grad()
def trace(
    backbone: DiffusionBackbone, size: Sequence[int] | None = None, batch: int | None = None, dynamic: bool = False
) -> ExportedProgram:
    """A backbone as an exported program, from (B, 3, H, W) to the list of maps; arguments as for :func:`export`.

    Raises:
        ValueError: The network cannot be exported so.
    """
    height, width = _size(backbone, size)
    x = torch.zeros(batch or 2, 3, height, width, device=backbone.device, dtype=backbone.dtype)
    dims: dict[int, Any] = {} if batch else {0: torch.export.Dim("batch", min=1, max=MOST["batch"])}
    if dynamic:
        d = backbone.size_divisibility
        dims |= {
            2 + i: d * torch.export.Dim(f"{name}_{d}", min=2, max=MOST["pixels"] // d)
            for i, name in enumerate(("height", "width"))
        }
    try:
        with torch.compiler.set_stance("force_eager"):
            return torch.export.export(_Maps(backbone), (x,), dynamic_shapes={"image": dims}, strict=False)
    except Exception as error:  # whatever of PyTorch's own tracing fails
        sizes = "any size" if dynamic else f"{height} x {width}"
        advice = "; a fixed batch= or size may be possible" if dynamic or not batch else ""
        raise ValueError(
            f"{backbone.declaration.name} cannot be exported for {sizes}, batch {batch or 'any'}: "
            f"{_first(error)}{advice}"
        ) from error


def describe(
    backbone: DiffusionBackbone, size: Sequence[int] | None = None, batch: int | None = None, dynamic: bool = False
) -> dict[str, str]:
    """What an exported file says of itself, all of it text; arguments as for :func:`export`."""
    import diffusion_backbones

    low, high = backbone.input_format.range()
    d, (height, width), recipe = backbone.size_divisibility, _size(backbone, size), backbone.declaration.recipe
    info = backbone.feature_info
    return {
        "name": backbone.declaration.name,
        "input": f"(B, 3, H, W) {dtype_name(backbone.dtype)}, {'BGR' if backbone.input_format.bgr else 'RGB'} in "
        f"[{low:.4g}, {high:.4g}]",
        "batch": str(batch) if batch else f"1 to {MOST['batch']}",
        "size": f"H and W multiples of {d} from {2 * d} to {MOST['pixels']}" if dynamic else f"{height} x {width}",
        "channels": " ".join(map(str, info.channels())),
        "strides": " ".join(map(str, info.reduction())),
        "device": backbone.device.type,
        "fixed": f"weights, levels, prompt {recipe.prompt!r}, timestep {_several(recipe)}, noise {recipe.noise!r}",
        "made_with": f"diffusion_backbones {diffusion_backbones.__version__}, torch {torch.__version__}",
    }


def _several(recipe: Recipe) -> str:
    return ", ".join(map(str, recipe.all_timesteps))


def check_path(path: Path, compiled: bool = True, overwrite: bool = False) -> None:
    """Check the path before a backbone is built for it; arguments and errors as for :func:`export`."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path.name!r} ends in none of {', '.join(SUFFIXES)}: .pt2 is for PyTorch, .onnx for ONNX")
    if path.suffix == ".onnx" and not compiled:
        raise ValueError(f"{path.name!r} is ONNX, which is never compiled; an exported program is a .pt2")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; choose another name or overwrite it")
    if path.suffix == ".onnx" and (missing := [name for name in ("onnx", "onnxscript") if find_spec(name) is None]):
        raise ImportError(
            f"ONNX needs {' and '.join(missing)}; install them with pip install 'diffusion-backbones[export]'"
        )


def _check(backbone: DiffusionBackbone, size: Sequence[int] | None, batch: int | None, dynamic: bool) -> None:
    name = backbone.declaration.name
    if not isinstance(backbone, DiffusionBackbone):
        raise TypeError(
            f"one backbone is exported to a file, and {name} is another kind; export its members, one by one"
        )
    if not backbone.architecture.compilable:
        raise ValueError(
            f"{name} cannot be exported: its network reads the lengths of texts on the host in every call, so it is "
            "not a single graph"
        )
    if backbone.device.type == "meta":
        raise ValueError(f"{name} is on the meta device and has no weights to export; build it on another")
    if backbone.declaration.recipe.noise == "random":
        raise ValueError(
            f"{name} uses noise='random', which an exported file cannot draw; build it with noise='fixed' or "
            "noise='none'"
        )
    if size is not None and (len(size) != 2 or any(not isinstance(side, int) or side < 1 for side in size)):
        raise ValueError(f"size must be height and width in pixels, such as (512, 512), got {tuple(size)}")
    if size is not None and dynamic:
        raise ValueError(f"size={tuple(size)} fixes what dynamic=True leaves open; give one of them")
    if batch is not None and (not isinstance(batch, int) or batch < 1):
        raise ValueError(f"batch must be an integer from 1 up, or None for any, got {batch!r}")


def _size(backbone: DiffusionBackbone, size: Sequence[int] | None) -> tuple[int, int]:
    side = backbone.declaration.input_size
    return (size[0], size[1]) if size else (side, side)


def _first(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _write_onnx(program: ExportedProgram, path: Path, data: dict[str, str]) -> None:
    names = [f"level{i}" for i in range(len(data["channels"].split()))]
    written = torch.onnx.export(program, dynamo=True, input_names=["image"], output_names=names, verbose=False)
    assert written is not None
    written.model.metadata_props.update(data)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
    written.save(path, external_data=weights > ONE_FILE)
