"""Loading: folders, single files, variants, and everything that can be wrong with them."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import original
import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from stock_pipeline import LEVELS, pipeline, stock_pyramid
from torch import Tensor

import diffusion_backbones as db
from diffusion_backbones.ops import safetensors_io
from diffusion_backbones.spec import registry

pytestmark = pytest.mark.usefixtures("costs_not_measured")

WEIGHTS = "diffusion_pytorch_model.safetensors"
UNET, VAE, TEXT = f"unet/{WEIGHTS}", f"vae/{WEIGHTS}", "text_encoder/model.safetensors"
X = torch.linspace(-1, 1, 3 * 64 * 128).view(1, 3, 64, 128).sin()


@pytest.fixture(autouse=True)
def prompts(monkeypatch, tmp_path):
    """No prompt is known."""
    monkeypatch.setenv("DIFFUSION_BACKBONES_CACHE", str(tmp_path / "prompts"))


@pytest.fixture
def copy(tiny_folder, tmp_path):
    """``copy("sd15")`` -> a folder of its own, to be damaged."""
    return lambda name="sd15": Path(shutil.copytree(tiny_folder(name), tmp_path / "copy"))


@pytest.fixture
def declared_tiny(monkeypatch, tiny_folder, tmp_path):
    """``declared_tiny("sd15_gdf")``: from here on that backbone's declared architecture is the tiny one's."""

    def declare(name: str) -> None:
        declaration = db.get_declaration(name)
        configs = tmp_path / "configs"
        for config in tiny_folder(declaration.checkpoint.name).glob("*/*config.json"):
            kind = config.parent.name
            (configs / kind).mkdir(parents=True)
            data = config.read_text()
            if kind.startswith("tokenizer"):
                tokenizer = transformers.AutoTokenizer.from_pretrained(config.parent)
                data = json.dumps(
                    {
                        k: getattr(tokenizer, k)
                        for k in ("bos_token_id", "eos_token_id", "pad_token_id", "model_max_length")
                    }
                )
            (configs / kind / ("config.json" if kind.startswith("tokenizer") else config.name)).write_text(data)
        changed = replace(declaration, checkpoint=replace(declaration.checkpoint, configs=str(configs)))
        monkeypatch.setattr(registry, "_declarations", {**registry._declarations, name: changed})

    return declare


def edit(path: Path, change: Any) -> None:
    state = load_file(path)
    change(state)
    save_file(state, path)


def assert_same(a: db.DiffusionBackbone, b: db.DiffusionBackbone) -> None:
    for (name, p), (_, q) in zip(a.conditioning.items(), b.conditioning.items(), strict=True):
        assert torch.equal(p, q), name
    for p, q in zip(a(X), b(X), strict=True):
        assert torch.equal(p, q)


# Against diffusers' own pipelines.


@pytest.mark.parametrize("prompt", ["", "a photo of a cat"])
@pytest.mark.parametrize("name", LEVELS)
def test_a_folder_gives_what_diffusers_pipeline_computes(name, prompt, tiny_folder):
    folder = tiny_folder(name.split("_")[0])
    torch.manual_seed(3)
    noise = torch.randn(1, 4, 8, 16)
    backbone = db.create_model(name, checkpoint_path=folder, prompt=prompt)
    expected = stock_pyramid(
        pipeline(name.split("_")[0], folder), LEVELS[name], X, noise, int(backbone.declaration.recipe.timestep), prompt
    )
    for ours, stock in zip(backbone(X, noise=noise), expected, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)


# Formats.


def test_an_old_vae_names_its_attention_otherwise(copy, tiny_folder):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(state: dict[str, Tensor]) -> None:
        for name in [name for name in state if ".attentions." in name]:
            for now, then in old.items():
                if f".{now}." in name:
                    state[name.replace(f".{now}.", f".{then}.")] = state.pop(name)

    folder = copy()
    edit(folder / VAE, rename)
    assert any("proj_attn" in name for name in load_file(folder / VAE))
    assert_same(
        db.create_model("sd15_gdf", checkpoint_path=folder),
        db.create_model("sd15_gdf", checkpoint_path=tiny_folder("sd15")),
    )


@pytest.mark.parametrize("prefix", ["text_model.", ""])
def test_a_text_encoder_is_read_under_old_and_new_names(prefix, copy, tiny_folder):
    def rename(state: dict[str, Tensor]) -> None:
        for name in list(state):
            state[prefix + name.removeprefix("text_model.")] = state.pop(name)
        state[f"{prefix}embeddings.position_ids"] = torch.arange(77)[None]
        state["text_projection.weight"] = torch.ones(3)

    folder = copy()
    edit(folder / TEXT, rename)
    assert_same(
        db.create_model("sd15_gdf", checkpoint_path=folder),
        db.create_model("sd15_gdf", checkpoint_path=tiny_folder("sd15")),
    )


@pytest.mark.parametrize("name", ["sd15_gdf", "sd21_dift", "sdxl_gdf"])
def test_a_single_file_in_the_original_layout_is_the_folder(name, declared_tiny, tiny_folder, tmp_path):
    checkpoint = name.split("_")[0]
    declared_tiny(name)
    file = original.write(checkpoint, tiny_folder(checkpoint), tmp_path / "model.safetensors")
    backbone = db.create_model(name, checkpoint_path=file)
    assert backbone.provenance == {"path": str(file)}
    assert_same(backbone, db.create_model(name, checkpoint_path=tiny_folder(checkpoint)))


def test_a_single_file_encodes_only_the_empty_prompt(declared_tiny, tiny_folder, tmp_path):
    declared_tiny("sd15_gdf")
    backbone = db.create_model(
        "sd15_gdf", checkpoint_path=original.write("sd15", tiny_folder("sd15"), tmp_path / "model.safetensors")
    )
    backbone(X, prompt="")
    with pytest.raises(
        FileNotFoundError, match=r"the prompt 'a cat' needs a tokenizer.*single-file.*Give prompt_embeds="
    ):
        backbone(X, prompt="a cat")


def test_averaged_weights_in_a_single_file_are_told_of(declared_tiny, tiny_folder, tmp_path, caplog):
    declared_tiny("sd15_gdf")
    file = original.write("sd15", tiny_folder("sd15"), tmp_path / "model.safetensors")
    averaged = {
        "model_ema." + n.removeprefix("model.").replace(".", ""): t * 2
        for n, t in load_file(file).items()
        if "diffusion_model" in n
    }
    edit(file, lambda state: state.update(averaged))
    assert_same(
        db.create_model("sd15_gdf", checkpoint_path=file),
        db.create_model("sd15_gdf", checkpoint_path=tiny_folder("sd15")),
    )
    assert f"{file} holds averaged (EMA) weights too" in caplog.text


@pytest.mark.parametrize(("without", "lacks"), [("first_stage_model.", "vae"), ("cond_stage_model.", "text_encoder")])
def test_a_single_file_without_a_part_is_refused(without, lacks, declared_tiny, tiny_folder, tmp_path):
    declared_tiny("sd15_gdf")
    file = original.write("sd15", tiny_folder("sd15"), tmp_path / "model.safetensors")
    edit(file, lambda state: [state.pop(name) for name in list(state) if name.startswith(without)])
    with pytest.raises(FileNotFoundError, match=rf"{file} lacks {lacks}\. What a file or a folder lacks comes from"):
        db.create_model("sd15_gdf", checkpoint_path=file)


@pytest.mark.parametrize(
    ("dtype", "stored", "warned"), [("float32", 16, True), ("float16", 16, False), ("float32", 32, False)]
)
def test_a_single_file_of_16_bits_warns_where_more_are_used(
    dtype, stored, warned, declared_tiny, tiny_folder, tmp_path, caplog
):
    declared_tiny("sd15_gdf")
    file = original.write("sd15", tiny_folder("sd15"), tmp_path / "model.safetensors")
    if stored == 16:
        edit(file, lambda state: state.update({name: tensor.half() for name, tensor in state.items()}))
    db.create_model("sd15_gdf", checkpoint_path=file, dtype=dtype)
    assert (f"{file} has the weights of unet in 16 bits only" in caplog.text) == warned


def test_a_denoiser_file_needs_a_base(tiny_folder, tmp_path):
    tuned = tiny.build("sd15", seed=1)["unet"]
    tuned.save_pretrained(tmp_path)
    with pytest.raises(
        FileNotFoundError,
        match=rf"{WEIGHTS} lacks vae, text_encoder.*pretrained=True to take them from stable-diffusion.*or give check",
    ):
        db.create_model("sd15_gdf", checkpoint_path=tmp_path / WEIGHTS)
    ids = list(db.get_declaration("sd15_gdf").recipe.ids)
    place = f"local-dir:{tiny_folder('sd15')}"
    backbone = db.create_model(place, recipe=ids, checkpoint_path=tmp_path / WEIGHTS)
    assert torch.equal(backbone.denoiser.conv_in.weight, tuned.conv_in.weight)
    assert torch.equal(
        backbone.conditioning.prompt_embeds, db.create_model(place, recipe=ids).conditioning.prompt_embeds
    )
    assert backbone.provenance == {"path": str(tiny_folder("sd15")), "unet_path": str(tmp_path / WEIGHTS)}


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_sharded_folders_of_either_variant(variant, tiny_folder, tmp_path):
    folder = tiny.folder("sdxl", tmp_path / "sharded", variant=variant, max_shard_size="60KB")
    assert len(list(folder.glob("text_encoder_2/*.safetensors"))) > 1
    assert_same(
        db.create_model("sdxl_gdf", checkpoint_path=folder),
        db.create_model("sdxl_gdf", checkpoint_path=tiny_folder("sdxl")),
    )


# How much is read, and into what.


def spans(path: Path) -> tuple[int, dict[str, tuple[int, int]]]:
    """Where the data of a safetensors file begins, and each tensor's bytes relative to that."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    return 8 + size, {name: tuple(entry["data_offsets"]) for name, entry in header.items() if name != "__metadata__"}


def test_the_bytes_of_what_is_cut_off_are_never_read(copy, tiny_folder):
    folder = copy()
    kept = {UNET: "denoiser.", VAE: "encoder."}
    clean = db.create_model("sd15_gdf", checkpoint_path=tiny_folder("sd15"))
    spoiled = 0
    for file, prefix in kept.items():
        names = {name.removeprefix(prefix) for name in clean.state_dict() if name.startswith(prefix)}
        start, where = spans(folder / file)
        assert names < set(where)
        with (folder / file).open("r+b") as out:
            for name in set(where) - names:
                out.seek(start + where[name][0])
                out.write(b"\xff" * (where[name][1] - where[name][0]))  # NaN
                spoiled += where[name][1] - where[name][0]
    assert spoiled > 100_000
    assert_same(db.create_model("sd15_gdf", checkpoint_path=folder), clean)


def test_only_kept_tensors_are_read_and_one_at_a_time(tiny_folder, monkeypatch):
    db.create_model("sd15_gdf", checkpoint_path=tiny_folder("sd15"))  # so that the prompt is known
    read: list[str] = []
    alive: list[weakref.ref[Any]] = []

    class Watched:
        def __init__(self, file: Any):
            self.file = file

        def __enter__(self) -> Watched:
            return self

        def __exit__(self, *args: object) -> None:
            self.file.__exit__(*args)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def get_tensor(self, name: str) -> Tensor:
            assert not any(ref() is not None for ref in alive), "another tensor of the file is still held"
            array = self.file.get_tensor(name).numpy().copy()  # it lives as long as any tensor that looks into it
            read.append(name)
            alive.append(weakref.ref(array))
            return torch.from_numpy(array)

    opened = safetensors_io._open
    monkeypatch.setattr(safetensors_io, "_open", lambda path: Watched(opened(path)))
    backbone = db.create_model("sd15_gdf", checkpoint_path=tiny_folder("sd15"), dtype=torch.float16)
    assert sorted(read) == sorted([*backbone.denoiser.state_dict(), *backbone.encoder.state_dict()])


def test_features_do_not_depend_on_where_a_file_holds_a_tensor(copy, tiny_folder):
    """A view of a memory-mapped file has the file's alignment, and with it other last digits."""
    folder = copy()
    for file in (UNET, VAE):
        save_file(load_file(folder / file), folder / file, metadata={"shift": "x" * 20})
    a, b = (db.create_model("sd15_gdf", checkpoint_path=place) for place in (folder, tiny_folder("sd15")))
    assert_same(a, b)
    assert {p.data_ptr() % 64 for p in [*a.parameters(), *b.parameters()]} == {0}


def test_large_files_stay_mapped(monkeypatch, tiny_folder):
    """Their weights are the same, and so are the features but for rounding; a cast or another device still copies."""
    expected = db.create_model("sd15_gdf", checkpoint_path=tiny_folder("sd15"))
    monkeypatch.setattr(safetensors_io, "MAP_FROM", 0)
    mapped = db.create_model("sd15_gdf", checkpoint_path=tiny_folder("sd15"))
    assert all(
        torch.equal(p, q) for p, q in zip(mapped.state_dict().values(), expected.state_dict().values(), strict=True)
    )
    for p, q in zip(mapped(X), expected(X), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)
    half = db.create_model("sd15_gdf", checkpoint_path=tiny_folder("sd15"), dtype=torch.float16)
    assert [in_file(b.denoiser.conv_in.weight, tiny_folder("sd15") / UNET) for b in (expected, mapped, half)] == [
        False,
        True,
        False,
    ]


def in_file(tensor: torch.Tensor, path: Path) -> bool:
    """Whether a tensor lies where a file is mapped into this process."""
    ranges = [
        line.split()[0].split("-")
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(path))
    ]
    return any(int(start, 16) <= tensor.data_ptr() < int(end, 16) for start, end in ranges)


def test_a_file_may_be_overwritten_once_it_is_loaded(copy, tiny_folder):
    folder = copy()
    backbone = db.create_model("sd15_gdf", checkpoint_path=folder)
    for file in (UNET, VAE):
        with (folder / file).open("r+b") as out:
            out.truncate(0)
    assert_same(backbone, db.create_model("sd15_gdf", checkpoint_path=tiny_folder("sd15")))


@pytest.mark.parametrize("dtype", [torch.float16, "bfloat16"], ids=str)
@pytest.mark.parametrize("name", ["sd15_gdf", "sdxl_gdf"])
def test_weights_are_cast_to_the_dtype(name, dtype, tiny_folder):
    folder = tiny_folder(name.split("_")[0])
    backbone, full = (
        db.create_model(name, checkpoint_path=folder, dtype=dtype),
        db.create_model(name, checkpoint_path=folder).state_dict(),
    )
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    for key, tensor in backbone.state_dict().items():
        kept = key == "canvas" or (key.startswith("encoder.") and (name, dtype) == ("sdxl_gdf", torch.float16))
        expected = torch.float32 if kept else dtype
        assert tensor.dtype == expected, key
        assert torch.equal(tensor, full[key].to(expected)), key
    assert all(torch.isfinite(level).all() and level.dtype == dtype for level in backbone(X))


def test_a_folder_that_nobody_declared_says_itself_whether_its_encoder_overflows(copy):
    folder = copy()
    config = json.loads((folder / "vae" / "config.json").read_text())
    for force_upcast, expected in ((True, torch.float32), (False, torch.float16)):
        (folder / "vae" / "config.json").write_text(json.dumps(config | {"force_upcast": force_upcast}))
        backbone = db.create_model(f"local-dir:{folder}", recipe=["up-level1-repeat2-res-out"], dtype=torch.float16)
        assert next(backbone.encoder.parameters()).dtype == expected


def test_on_meta_nothing_is_read(tiny_folder, monkeypatch):
    monkeypatch.setattr(safetensors_io, "_open", lambda path: pytest.fail(f"{path} was opened"))
    backbone = db.create_model("sd15_gdf", checkpoint_path=tiny_folder("sd15"), device="meta")
    assert {t.device.type for t in backbone.state_dict().values()} == {"meta"}


def test_loading_prints_nothing(tiny_folder, capfd):
    db.create_model("sdxl_gdf", checkpoint_path=tiny_folder("sdxl"))
    assert capfd.readouterr() == ("", "")


# What is refused.


def drop(names: Iterable[str]) -> Any:
    return lambda state: [state.pop(name) for name in names]


def test_missing_tensors_are_named(copy):
    folder = copy()
    names = [
        f"down_blocks.0.resnets.0.{layer}.{part}"
        for layer in ("norm1", "conv1", "norm2")
        for part in ("weight", "bias")
    ] + ["conv_in.weight"]
    edit(folder / UNET, drop(names))
    with pytest.raises(
        ValueError,
        match=rf"sd15 unet: missing from .*{UNET}: conv_in.weight, .* and 2 more\. Is it a checkpoint of another",
    ) as error:
        db.create_model("sd15_gdf", checkpoint_path=folder)
    assert sum(name in str(error.value) for name in names) == 5


def test_what_is_cut_off_may_be_missing(copy, tiny_folder):
    folder = copy()
    edit(folder / UNET, drop(["conv_out.weight", "conv_norm_out.bias"]))
    edit(folder / VAE, lambda state: [state.pop(name) for name in list(state) if name.startswith("decoder.")])
    assert_same(
        db.create_model("sd15_gdf", checkpoint_path=folder),
        db.create_model("sd15_gdf", checkpoint_path=tiny_folder("sd15")),
    )


@pytest.mark.parametrize(("file", "what"), [(UNET, "sd15 unet"), (VAE, "sd15 vae"), (TEXT, "CLIPTextModel")])
def test_tensors_of_another_network_are_named(file, what, copy):
    folder = copy()
    edit(folder / file, lambda state: state.update({"foreign.weight": torch.zeros(2)}))
    with pytest.raises(
        ValueError,
        match=rf"{what}: not part of this network, in .*{file}: (text_model\.)?foreign\.weight\. Does its "
        r"config\.json belong",
    ):
        db.create_model("sd15_gdf", checkpoint_path=folder)


@pytest.mark.parametrize(
    ("file", "name"),
    [(UNET, "conv_in.bias"), (UNET, "conv_out.bias"), (VAE, "quant_conv.bias"), (TEXT, "final_layer_norm.bias")],
)
def test_tensors_of_another_shape_are_named(file, name, copy):
    folder = copy()
    edit(folder / file, lambda state: state.update({next(n for n in state if n.endswith(name)): torch.zeros(5)}))
    with pytest.raises(
        ValueError, match=rf"of another shape in .*{file}: .*{name} \(5,\), expected \(\d+,\)\. Does its config"
    ):
        db.create_model("sd15_gdf", checkpoint_path=folder)


def test_a_text_encoder_with_missing_tensors_is_not_filled_up_with_random_ones(copy):
    folder = copy()
    edit(
        folder / TEXT,
        lambda state: state.pop(next(name for name in state if name.endswith("layers.0.layer_norm1.weight"))),
    )
    with pytest.raises(
        ValueError,
        match=r"CLIPTextModel: missing from .*text_encoder/model\.safetensors: .*layers\.0\.layer_norm1\.weight",
    ):
        db.create_model("sd15_gdf", checkpoint_path=folder)


def test_a_text_encoder_of_another_kind_is_refused(copy):
    folder = copy()
    (folder / "text_encoder" / "config.json").write_text('{"architectures": ["T5EncoderModel"]}')
    with pytest.raises(
        ValueError,
        match=r"T5EncoderModel: missing from .*text_encoder/model\.safetensors: shared\.weight.*Is it a checkpoint of "
        r"another",
    ):
        db.create_model("sd15_gdf", checkpoint_path=folder)


BROKEN = {
    "empty": (lambda _: b"", r"is empty; download or write it again"),
    "header cut short": (lambda data: data[:100], r"\(100 bytes\) is cut short, of at least \d+ bytes; delete it"),
    "data cut short": (lambda data: data[:-1], r"\(\d+ bytes\) is cut short, of \d+ bytes; delete it"),
    "a web page": (lambda _: b"<html>" * 50, r"is a web page and not the file"),
    "a git-lfs pointer": (
        lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
        r"is a git-lfs pointer.*run `git lfs pull`",
    ),
}


@pytest.mark.parametrize("file", [UNET, VAE, TEXT])
@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_file_is_named_with_what_to_do(how, file, copy):
    folder = copy()
    spoil, said = BROKEN[how]
    (folder / file).write_bytes(spoil((folder / file).read_bytes()))
    with pytest.raises(ValueError, match=rf"{file} {said}"):
        db.create_model("sd15_gdf", checkpoint_path=folder)


@pytest.mark.parametrize("suffix", safetensors_io.PICKLES)
def test_a_pickle_is_refused_with_why_and_what_to_do(suffix, tmp_path):
    torch.save({"conv_in.weight": torch.zeros(1)}, tmp_path / f"model{suffix}")
    with pytest.raises(
        ValueError,
        match=rf"model{suffix} is a pickle.*runs whatever code it holds\. Only \.safetensors is read\. Convert it once",
    ):
        db.create_model("sd15_gdf", checkpoint_path=tmp_path / f"model{suffix}")


@pytest.mark.parametrize(("file", "component"), [(UNET, "unet"), (VAE, "vae"), (TEXT, "text_encoder")])
def test_a_folder_of_pickles_is_refused(file, component, copy):
    folder = copy()
    (folder / file).rename(folder / component / "pytorch_model.bin")
    with pytest.raises(
        FileNotFoundError, match=rf"{folder}: {component}/pytorch_model\.bin is a pickle.*Convert it once"
    ):
        db.create_model("sd15_gdf", checkpoint_path=folder)


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        (
            "unet/config.json",
            r"has no unet/config\.json; it holds model_index\.json, scheduler, text_encoder, tokenizer, unet, vae\. A "
            r"checkpoint is in the diff",
        ),
        ("vae/config.json", r"has no vae/config\.json; it holds"),
        ("scheduler/scheduler_config.json", r"lacks scheduler; it holds"),
        (UNET, rf"no {UNET} \(nor its fp16 variant, nor an index of shards\); unet/ holds: unet/config\.json"),
        ("text_encoder/config.json", r"has no text_encoder/config\.json"),
        ("text_encoder", r"lacks text_encoder; it holds .*What a file or a folder lacks comes from a whole checkpoint"),
        ("tokenizer", r"lacks tokenizer; it holds .*unet, vae\. What a file"),
    ],
)
def test_a_folder_that_lacks_something_says_what(gone, said, copy):
    folder = copy()
    shutil.rmtree(folder / gone) if (folder / gone).is_dir() else (folder / gone).unlink()
    with pytest.raises(FileNotFoundError, match=said) as error:
        db.create_model("sd15_gdf", checkpoint_path=folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    "file", ["unet/config.json", "vae/config.json", "scheduler/scheduler_config.json", "text_encoder/config.json"]
)
@pytest.mark.parametrize(
    ("content", "said"),
    [(b"{", "is not JSON"), (b"\xff\xfe", "is not JSON"), (b"[1]", "must hold a JSON object, got list")],
)
def test_a_config_that_is_not_json_is_named(content, said, file, copy):
    folder = copy()
    (folder / file).write_bytes(content)
    with pytest.raises(ValueError, match=f"{folder}: {file} {said}"):
        db.create_model("sd15_gdf", checkpoint_path=folder)


def test_a_missing_shard_is_named(tmp_path):
    folder = tiny.folder("sd15", tmp_path / "sharded", max_shard_size="300KB")
    [shard] = folder.glob("unet/*-00002-of-*.safetensors")
    shard.unlink()
    with pytest.raises(
        FileNotFoundError, match=rf"index\.json needs unet/{shard.name}, which is not there; download or save it again"
    ):
        db.create_model("sd15_gdf", checkpoint_path=folder)


@pytest.mark.parametrize(
    "content",
    ["{}", '{"weight_map": []}', '{"weight_map": {"a": ["b"]}}', '{"weight_map": {"a": "../../b.safetensors"}}'],
)
def test_an_index_that_is_none_is_named(content, tmp_path):
    folder = tiny.folder("sd15", tmp_path / "sharded", max_shard_size="300KB")
    (folder / f"{UNET}.index.json").write_text(content)
    with pytest.raises(
        ValueError,
        match=rf"{UNET}\.index\.json is not an index of shards: it needs a 'weight_map' from tensors to files",
    ):
        db.create_model("sd15_gdf", checkpoint_path=folder)


def test_two_shards_with_the_same_tensor_are_refused(tmp_path):
    folder = tiny.folder("sd15", tmp_path / "sharded", max_shard_size="300KB")
    first, second, *_ = sorted(folder.glob("unet/*.safetensors"))
    edit(second, lambda state: state.update(dict([load_file(first).popitem()])))
    with pytest.raises(ValueError, match=rf"{second.name} and .*{first.name} both hold '.*'; give one of them"):
        db.create_model("sd15_gdf", checkpoint_path=folder)


@pytest.mark.parametrize(
    ("path", "said"), [("nowhere", "nowhere does not exist"), ("nowhere.safetensors", "does not exist")]
)
def test_a_path_that_is_not_there_is_named(path, said, tmp_path):
    with pytest.raises(FileNotFoundError, match=said):
        db.create_model("sd15_gdf", checkpoint_path=tmp_path / path)


def test_a_place_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        db.create_model(f"local-dir:{tmp_path}/nowhere", recipe=["mid-vit-out"])


def test_the_weights_of_another_architecture_do_not_load(tiny_folder, copy):
    folder = copy()
    shutil.copy(tiny_folder("sd21") / UNET, folder / UNET)
    with pytest.raises(
        ValueError,
        match=r"sd15 unet: of another shape in .*proj_in\.weight \(\d+, \d+\), expected \(\d+, \d+, 1, 1\).*Does its "
        r"config",
    ):
        db.create_model("sd15_gdf", checkpoint_path=folder)
