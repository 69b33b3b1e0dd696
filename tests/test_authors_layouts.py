"""Transformers in the names of their authors: read through diffusers' converters, which see no weights, or refused in
one sentence. The right weights are those of the stock network that was written in those names.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import original
import pytest
import tiny
import torch
from safetensors.torch import save_file

import diffusion_backbones as db
from diffusion_backbones.families import architecture
from diffusion_backbones.loading.single_file import SingleFile
from diffusion_backbones.ops import safetensors_io
from diffusion_backbones.ops.conversion import ConvertedFiles
from diffusion_backbones.spec.configs import package_configs

PREFIX = "model.diffusion_model."
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("prefix", ["", PREFIX])
@pytest.mark.parametrize("name", ["sd3_medium", "sd35_medium", "z_image_turbo"])
def test_a_transformer_in_its_authors_names_is_the_stock_network(name, prefix, tiny_folder, tmp_path):
    stock = tiny.build(name, seed=1)["transformer"]
    written = {"sd3": original.sd3, "z_image": original.z_image}[db.get_checkpoint(name).family](stock.state_dict())
    file = tmp_path / "authors.safetensors"
    save_file({prefix + key: tensor.contiguous().clone() for key, tensor in written.items()}, file)
    place = f"local-dir:{tiny_folder(name)}"
    backbone = db.create_model(place, recipe=["vit-block1-out"], checkpoint_path=file, truncate=False)
    read, expected = backbone.denoiser.state_dict(), stock.state_dict()
    assert len(read) > 50
    for key, tensor in read.items():
        assert torch.equal(tensor, expected[key]), key
    assert backbone.provenance == {"path": str(tiny_folder(name)), "transformer_path": str(file)}


def header_alone(shapes: dict[str, tuple[int, ...]], path: Path) -> Path:
    """A file of the right size without data: it is sparse, and nobody reads its weights."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + end)
    return path


def test_the_full_size_of_stable_diffusion_3_is_converted_without_a_weight_read(tmp_path):
    network = architecture(db.get_checkpoint("sd3_medium"))
    with safetensors_io.unfilled():
        stock = network.build_denoiser()
    written = {f"{PREFIX}{name}": tuple(t.shape) for name, t in original.sd3(stock.state_dict()).items()}
    file = SingleFile(
        header_alone(written, tmp_path / "sd3.safetensors"), package_configs(db.get_checkpoint("sd3_medium"))
    )
    file.check(network, "sd3_medium")
    file.check_sizes(network, "sd3_medium")
    assert file.tensors("transformer", half=True).shapes == safetensors_io.shapes(stock)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("pixart_alpha_512", "the names of the authors of PixArt, for which diffusers has no converter; give a folder"),
        ("hunyuan_dit_12", "the names of the authors of Hunyuan, for which diffusers has no converter; give a folder"),
        ("dit_xl_256", "the names of the authors of DiT, for which diffusers has no converter; give a folder"),
    ],
)
def test_names_that_nobody_converts_are_refused_in_one_sentence(name, said, tmp_path):
    marks = {
        "pixart_alpha_512": ["blocks.0.attn.qkv.weight", "blocks.0.cross_attn.q_linear.weight"],
        "hunyuan_dit_12": ["blocks.0.attn1.Wqkv.weight"],
        "dit_xl_256": ["blocks.0.attn.qkv.weight", "x_embedder.proj.weight"],
    }
    for prefix in ("", PREFIX):
        save_file({prefix + mark: torch.zeros(2) for mark in marks[name]}, tmp_path / "a.safetensors")
        with pytest.raises(ValueError, match=said):
            db.create_model(name, recipe=["vit-block1-out"], checkpoint_path=tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", ["ddpm_cat_256", "deepfloyd_if_xl", "dit_xl_256", "sd3_medium", "flux_dev"])
def test_a_unet_in_the_original_names_is_no_network_of_another_family(name, tiny_folder, tmp_path):
    file = original.write("sd15", tiny_folder("sd15"), tmp_path / "sd15.safetensors")
    with pytest.raises(ValueError, match=rf"holds no \w+ of the kind of {name}.*sd13, sd14, sd15"):
        db.create_model(name, recipe=["mid-vit-out"], checkpoint_path=file)


def test_a_file_that_lacks_what_the_converter_reads_says_so(tmp_path):
    save_file({f"{PREFIX}double_blocks.0.img_attn.qkv.weight": torch.zeros(6, 2)}, tmp_path / "flux.safetensors")
    flux = db.get_checkpoint("flux_dev")
    file = SingleFile(tmp_path / "flux.safetensors", package_configs(flux))
    file.check(architecture(flux), "flux_dev")
    with pytest.raises(ValueError, match="diffusers' converter for Flux does not read it"):
        file.check_sizes(architecture(flux), "flux_dev")


def test_converted_tensors_are_cut_and_joined_as_the_converter_does_it(tmp_path):
    torch.manual_seed(0)
    state = {"pad": torch.rand(5), "qkv": torch.rand(6, 4), "mod": torch.rand(8), "conv": torch.rand(3, 3, 1, 1)}
    save_file(state, tmp_path / "a.safetensors")

    def converter(s):
        q, k, v = torch.chunk(s["qkv"], 3, dim=0)
        shift, scale = s["mod"].chunk(2)
        return {
            "q": torch.cat([q]),
            "kv": torch.cat([k, v]),
            "v": v,
            "mod": torch.cat([scale, shift], dim=0),
            "linear": s["conv"][:, :, 0, 0],
            "half": torch.cat([k, v]).chunk(2)[1],
            "none": None,
        }

    files = safetensors_io.TensorFiles([tmp_path / "a.safetensors"])
    converted = ConvertedFiles(files, {name: name for name in files.shapes}, converter)
    expected = {name: tensor for name, tensor in converter(state).items() if tensor is not None}
    assert converted.shapes == {name: tuple(tensor.shape) for name, tensor in expected.items()}
    for name, tensor in converted.read(list(expected), torch.float32, torch.device("cpu")):
        assert torch.equal(tensor, expected[name]), name
    with pytest.raises(ValueError, match="the converter computes twice, and only renaming, cutting and joining"):
        ConvertedFiles(files, {"mod": "mod"}, lambda s: {"twice": s["mod"] * 2})
