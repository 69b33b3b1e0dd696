"""Generated inputs that cannot be right: none is accepted, and nearly all are refused by name.

CI draws a few hundred, always the same; ``make fuzz`` draws several thousand.
"""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from bad_inputs import (
    JUNK,
    Survey,
    is_bool,
    is_count,
    is_int,
    is_list_of,
    is_one_of,
    is_real,
    is_text,
    plain,
    survey,
)
from click.testing import CliRunner
from hypothesis import strategies as st
from PIL import Image

import diffusion_backbones as db
from diffusion_backbones.cli.program import main

pytestmark = pytest.mark.usefixtures("one_thread")
junk = st.sampled_from(JUNK)
IMAGE = torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64)
LEVELS = ["up-level1-repeat2-res-out"]


@pytest.fixture(scope="module")
def backbone():
    return db.create_model("tinysd_gdf", pretrained=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved backbone and its features of :data:`IMAGE`."""
    backbone = db.create_model("tinysd_gdf", pretrained=True, out_indices=[2])
    return backbone.save_pretrained(tmp_path_factory.mktemp("saved")), backbone(IMAGE)


# Recipes, as objects and as files.

is_channels = is_list_of(lambda v: is_int(v, 0) and not hasattr(v, "dtype"))
RECIPE = {
    "name": is_text,
    "timestep": lambda v: is_real(v, -1, 999.999) and plain(v) >= 0,  # below 0 only without noise
    "noise": is_one_of("fixed", "random", "none"),
    "ensemble": is_count,
    "seed": lambda v: is_int(v, -(2**63), 2**63 - 1),
    "prompt": is_text,
    "prompt_padding": is_one_of("max_length", "longest"),
    "scaled": is_bool,
    "without": is_list_of(is_text),
    "discard": lambda v: v in ("auto", {}) if isinstance(v, (str, dict)) else is_channels(v),
    "normalize": is_one_of("none", "layer", "adaptive", "l2"),
    "input_size": lambda v: v is None or is_count(v),
    "nominal_timestep": lambda v: v is None or is_int(v),
    "source": is_text,
    "notes": is_list_of(is_text),
    "unverified": is_list_of(is_text),
    "levels": lambda v: False,
    "paper": lambda v: v is None,
    "timesteps": lambda v: is_several(v),
    "combine": is_one_of("mean", "concatenate"),
    "inversion_steps": lambda v: is_int(v) and v == 50,  # others only with inversion
    "debias": lambda v: is_int(v, 0, 2**31 - 1),
    "components": lambda v: v is None or is_count(v),
}


def test_recipes():
    def one(found: Survey, drawn: tuple[str, Any]) -> None:
        key, value = drawn
        settings = {"name": "x", "levels": LEVELS, key: value}
        found.refuses(drawn, lambda: db.Recipe(**settings), not RECIPE[key](value))

    survey("recipes", st.tuples(st.sampled_from(sorted(RECIPE)), junk), 150, one)


def test_recipe_files(tmp_path):
    text = yaml.safe_dump(db.get_declaration("sd15_gdf").recipe.to_dict(), sort_keys=False)
    lines, path = text.splitlines(), tmp_path / "recipe.yaml"
    heads = [i for i, line in enumerate(lines) if line[0].isalpha()]

    def twice(i: int) -> str:
        return "\n".join([*lines, lines[i] if ":" in lines[i] and lines[i].split(":")[1].strip() else f"{lines[i]} []"])

    bad = st.one_of(
        st.sampled_from(heads).map(twice),
        st.sampled_from(["timestep: 010", "seed: 0_1", "ensemble: 1:30", "seed: +07", "input_size: 1_024"]).map(
            lambda line: "levels: [mid-vit-out]\n" + line
        ),
        st.tuples(st.sampled_from(heads), st.integers(0, 4)).map(
            lambda at: "\n".join(
                [*lines[: at[0]], lines[at[0]][: at[1]] + "_" + lines[at[0]][at[1] :], *lines[at[0] + 1 :]]
            )
        ),
        st.sampled_from(
            ["", "null", "[]", "3", "\t- a", "levels: &a [*a]", "levels: " + "[" * 2000, "!!python/none x", "{"]
        ),
    )
    cut = st.integers(0, len(text) - 1).map(lambda n: text[:n])

    def one(found: Survey, drawn: tuple[bool, str]) -> None:
        must, content = drawn
        path.write_text(content)
        found.refuses(content[-120:], lambda: db.Recipe.from_file(path), must)

    survey("recipe files", st.one_of(st.tuples(st.just(True), bad), st.tuples(st.just(False), cut)), 80, one)


# Calls.


def tensors(*shape: int) -> st.SearchStrategy[Any]:
    """Tensors of that shape or near it, most with something wrong."""
    shapes = [shape, shape[1:], (2, *shape), (*shape[:-1], shape[-1] + 1), (*shape[:-2], 0, shape[-1]), (0, *shape[1:])]
    values = [0.0, 0.5, float("nan"), float("inf"), -float("inf"), 1e38]
    dtypes = [
        torch.float32,
        torch.float64,
        torch.float16,
        torch.int64,
        torch.bool,
        torch.complex64,
        torch.float8_e4m3fn,
    ]

    def make(drawn: tuple[Any, float, torch.dtype, bool]) -> torch.Tensor:
        shape, value, dtype, on_meta = drawn
        x = torch.zeros(shape)
        x.view(-1)[-1:] = value
        x = x.to(dtype) if dtype.is_floating_point or math.isfinite(value) else torch.zeros(shape, dtype=dtype)
        return x.to("meta") if on_meta else x

    drawn = st.tuples(st.sampled_from(shapes), st.sampled_from(values), st.sampled_from(dtypes), st.just(False))
    return st.one_of(drawn.map(make), drawn.map(lambda d: make((*d[:3], True))), junk)


def can_be(*shapes: tuple[int, ...]) -> Any:
    """Whether a tensor is dense, finite, of floating point, of one of the shapes, and on the CPU."""

    def check(x: Any) -> bool:
        kinds = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
        return (
            isinstance(x, torch.Tensor)
            and x.dtype in kinds
            and tuple(x.shape) in shapes
            and x.device.type == "cpu"
            and bool((x.float().abs() <= 1e12).all())
        )

    return check


CALL = {
    "timestep": (junk, lambda v: is_real(v, 0, 999.999) or _is_one_timestep(v)),
    "timesteps": (junk, lambda v: is_several(v.tolist() if hasattr(v, "tolist") else v) and len(v) > 0),
    "noise": (
        tensors(4, 8, 8),
        lambda v: is_one_of("fixed", "random", "none")(v) or can_be((4, 8, 8), (1, 4, 8, 8))(v),
    ),
    "ensemble": (junk.filter(lambda v: not is_int(v, 100)), is_count),
    "chunk": (junk, is_count),
    "generator": (junk, lambda v: False),
    "prompt_embeds": (tensors(1, 77, 96), can_be((1, 77, 96), (77, 96), (1, 76, 96))),
    "prompt": (junk.filter(lambda v: not isinstance(v, str)), lambda v: is_list_of(is_text)(v) and len(v) == 1),
    "indices": (junk, lambda v: is_int(v, 1, 3) or _are_positions(v)),
    "latents": (tensors(1, 4, 8, 8), lambda v: False),  # beside an image
    "timestp": (junk, lambda v: False),
}


def is_several(v: Any) -> bool:
    """Whether a value is different timesteps, or none, which is the default."""
    some = [plain(t) for t in v] if isinstance(v, (list, tuple, range)) else None
    return some is not None and all(is_real(t, 0, 999.999) for t in some) and len({*some}) == len(some)


def _is_one_timestep(v: Any) -> bool:
    some = v.tolist() if hasattr(v, "tolist") else v
    one = isinstance(some, (list, tuple)) and len(some) == 1 and is_real(some[0], 0, 999.999)
    return one or (isinstance(v, torch.Tensor) and v.ndim == 0)


def _are_positions(v: Any) -> bool:
    some = v.tolist() if hasattr(v, "tolist") else v
    if isinstance(some, (dict, str, bytes)):
        some = None
    good = isinstance(some, (list, tuple, range, set)) and len(list(some)) > 0
    return bool(good and all(is_int(i, -3, 2) for i in some) and len({i % 3 for i in some}) == len(list(some)))


def test_calls(backbone):
    drawn = st.sampled_from(sorted(CALL)).flatmap(lambda key: st.tuples(st.just(key), CALL[key][0]))

    def one(found: Survey, drawn: tuple[str, Any]) -> None:
        key, value = drawn
        finite = lambda maps: all(bool(torch.isfinite(m).all()) for m in maps)  # noqa: E731
        found.refuses(drawn, lambda: backbone(IMAGE, **{key: value}), not CALL[key][1](value), finite)

    survey("calls", drawn, 120, one)


def test_images_and_latents(backbone):
    forward = {
        "images": (backbone, tensors(1, 3, 64, 64), can_be((1, 3, 64, 64), (1, 3, 64, 65))),
        "latents": (backbone.forward_latents, tensors(1, 4, 8, 8), can_be((1, 4, 8, 8))),
    }
    drawn = st.sampled_from(sorted(forward)).flatmap(lambda key: st.tuples(st.just(key), forward[key][1]))

    def one(found: Survey, drawn: tuple[str, Any]) -> None:
        call, _, good = forward[drawn[0]]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            finite = lambda maps: all(bool(torch.isfinite(m).all()) for m in maps)  # noqa: E731
            found.refuses(drawn, lambda: call(drawn[1]), not good(drawn[1]), finite)

    survey("images and latents", drawn, 50, one)


# Building.

BUILD = {
    "name": lambda v: False,
    "pretrained": is_bool,
    "checkpoint_path": lambda v: isinstance(v, str) and v == "",
    "cache_dir": lambda v: isinstance(v, (str, Path)),
    "out_indices": lambda v: is_int(v, 1, 3) or _are_positions(v),
    "out_strides": lambda v: _are_strides(v),
    "dtype": lambda v: isinstance(v, torch.dtype) and v == torch.float32,
    "device": lambda v: (
        (isinstance(v, torch.device) and v == torch.device("cpu"))
        or (type(v) is int and v == 0 and torch.cuda.is_available())
    ),
    "weight_dtype": lambda v: False,
    "trainable": lambda v: v is True or v is False,
    "lora_rank": lambda v: False,
    "prompt_tokens": lambda v: False,
    "input_format": lambda v: False,
    "encoder_levels": lambda v: plain(v) is False,
    "chunk": is_count,
    "fold": is_bool,
    "encoder": lambda v: False,
    "compile": lambda v: v is True or v is False,
    "truncate": is_bool,
    "features_only": lambda v: v is True,
    "pretrained_cfg": lambda v: isinstance(v, dict),
    "pretrained_cfg_overlay": lambda v: isinstance(v, dict) and v == {},
    "img_size": lambda v: is_count(v) or is_int(v, 1) or (isinstance(v, tuple) and v in ((1, 2), (4, 2))),
    "num_classes": lambda v: plain(v) == 0,
    "recipe": lambda v: False,
    **{key: RECIPE[key] for key in ("timestep", "noise", "ensemble", "seed", "scaled", "prompt_padding")},
    "tiemstep": lambda v: False,
}


def _are_strides(v: Any) -> bool:
    some = v.tolist() if hasattr(v, "tolist") else v
    good = isinstance(some, (list, tuple, range, set)) and len(list(some)) > 0 and all(map(is_count, some))
    return bool(good and list(some) == sorted(set(some)))


def test_building():
    def one(found: Survey, drawn: tuple[str, Any]) -> None:
        key, value = drawn
        where = {} if key == "device" else {"device": "meta"}
        keywords = {"name": "tinysd_gdf", **where, key: value}
        if key == "recipe":
            keywords["name"] = "tinysd"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.refuses(drawn, lambda: db.create_model(**keywords), not BUILD[key](value))

    survey("building", st.tuples(st.sampled_from(sorted(BUILD)), junk), 150, one)


# Saved folders.


def paths(data: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where every value of plain data is."""
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return (
        [at, *(path for key, value in inner for path in paths(value, (*at, key)))]
        if at
        else [path for key, value in inner for path in paths(value, (key,))]
    )


COSMETIC = (
    "name",
    "title",
    "source",
    "notes",
    "unverified",
    "versions",
    "provenance",
    "architecture",
    "pretrained_cfg",
    "paper",
)


def test_configs_of_saved_folders(saved):
    folder, reference = saved
    config = folder / "config.json"
    whole = json.loads(config.read_text())
    where = [path for path in paths(whole) if not set(path) & {"configs", "pretrained_cfg"}]
    values = st.sampled_from([..., None, "x", "1", -7, 2**80, float("nan"), True, [], [None], {}, {"a": 1}, 0.5])

    def one(found: Survey, drawn: tuple[tuple[Any, ...], Any]) -> None:
        path, value = drawn
        data = json.loads(json.dumps(whole))
        holder = data
        for key in path[:-1]:
            holder = holder[key]
        if value is ...:
            del holder[path[-1]]
        else:
            holder[path[-1]] = value
        config.write_text(json.dumps(data))

        def same(maps: list[torch.Tensor]) -> bool:
            valid = (
                path[:1] == ("recipe",)
                and len(path) == 2
                and value is not ...
                and RECIPE.get({"normalise": "normalize"}.get(path[1], path[1]), is_text)(value)
            )  # another recipe, and one that can be
            return valid or all(torch.equal(a, b) for a, b in zip(maps, reference, strict=True))

        found.refuses(drawn, lambda: db.create_model(f"local-dir:{folder}")(IMAGE), False, same)

    try:
        survey("configs of saved folders", st.tuples(st.sampled_from(where), values), 60, one)
    finally:
        config.write_text(json.dumps(whole))


def test_files_of_saved_folders_that_are_cut_short(saved):
    folder, _ = saved
    contents = {path: path.read_bytes() for path in (folder / "config.json", folder / "model.safetensors")}
    drawn = st.sampled_from(sorted(contents)).flatmap(
        lambda path: st.tuples(st.just(path), st.one_of(st.integers(0, 200), st.integers(0, len(contents[path]) - 3)))
    )

    def one(found: Survey, drawn: tuple[Path, int]) -> None:
        path, length = drawn
        path.write_bytes(contents[path][:length])
        try:
            found.refuses((path.name, length), lambda: db.create_model(f"local-dir:{folder}"), True)
        finally:
            path.write_bytes(contents[path])

    survey("files cut short", drawn, 30, one)


# The command line.

VERBS = {
    "list": ([], {"--filter": 0}),
    "info": (["sd15_gdf"], {"--size": 0, "--json": 1}),
    "activations": (["sd15"], {"--size": "x", "--all": 1}),
    "card": (["sd15_gdf"], {"--out": 0}),
    "extract": (["tinysd_gdf", "{photo}", "-o", "{out}"], {}),
    "visualize": (["tinysd_gdf", "{photo}", "-o", "{out}/a.png"], {}),
    "bench": (["tinysd_gdf"], {}),
    "compare": (["tinysd_gdf", "{photo}"], {}),
    "export": (["tinysd_gdf", "-o", "{out}/a.pt2"], {}),
}
OPTIONS = [
    "--size",
    "--device",
    "--timestep",
    "--levels",
    "--batch-size",
    "--workers",
    "--no-such-option",
    "--dtype",
    "--checkpoint-path",
]
WORDS = [
    "",
    "x",
    "-1",
    "nan",
    "1.5.2",
    "0x10",
    "inf",
    "--",
    "None",
    "[]",
    "a,b",
    "0,0",
    "99999999999999999999",
    "\udcff",
    "nowhere/at/all",
]


def test_the_command_line(tmp_path):
    photo = tmp_path / "photo.png"
    Image.new("RGB", (64, 64)).save(photo)

    def one(found: Survey, drawn: tuple[str, str, str]) -> None:
        verb, option, word = drawn
        args = [part.format(photo=photo, out=tmp_path / "out") for part in VERBS[verb][0]]

        def run() -> None:
            result = CliRunner().invoke(main, [verb, *args, option, word])
            if result.exception is not None:
                raise result.exception
            assert result.exit_code == 0

        found.refuses(drawn, run, True)

    drawn = st.tuples(st.sampled_from(sorted(VERBS)), st.sampled_from(OPTIONS), st.sampled_from(WORDS))
    survey("the command line", drawn, 40, one)
