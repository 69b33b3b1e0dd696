"""What the command line takes, prints and answers, for :mod:`golden`."""

from __future__ import annotations

import hashlib
import tempfile
from typing import Any

import conftest
from click import Command
from click.testing import CliRunner, Result

import diffusion_backbones as db
from diffusion_backbones.cli import main

CARDS = ("sd15_gdf", "sd3_medium_seg4diff", "flux_dev_ditf", "tinysd_gdf", "sd35_large", "ddpm_celebahq_256")
ACTIVATIONS = ("sd15", "sdxl up-*-cross-q --size 1024", "flux_dev --all")
WRONG = """

--no-such-option
no-such-verb
list --no-such-option
info
info sd15_gfd
info sd15_gdf.tag
activations
activations no_such
activations sd15 --size 0
card no_such
extract tinysd_gdf
extract tinysd_gdf no-such-folder -o out
extract sd15 {photo} -o out
extract local-dir:no-such-folder {photo} -o out
extract tinysd_gdf {photo} -o out --levels 0,0
extract tinysd_gdf {photo} -o out --levels 7
extract tinysd_gdf {photo} -o out --random-weights --prompt cat
extract tinysd_gdf {photo} -o out --device nowhere
visualize
visualize {photo} -o out.txt
bench sd15
bench tinysd_gdf --size 1
compare tinysd_gdf
compare dit_xl_256_ddae --encoder small
export no_such -o out.pt2
export tinysd_gdf -o out.txt
export tinysd_gdf -o out.pt2 --size 64 64 --dynamic
select no_such -o out
select tinysd
select tinysd -o out --masks {folder}
""".splitlines()[1:]
"""Command lines that must fail; what stands in braces is filled in."""


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def stdout(*args: object) -> str:
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result.stdout


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def commands() -> dict[str, Any]:
    """Verb -> its arguments and options."""
    verbs: dict[str, Command] = {"diffusion-backbones": main, **main.commands}
    return {name: {p.name: parameter(p.to_info_dict()) for p in verb.params} for name, verb in verbs.items()}


def parameter(info: dict[str, Any]) -> dict[str, Any]:
    """How a parameter of a verb is written, and what it takes, in words that every release of click has."""
    option, value = info["param_type_name"] == "option", info.get("flag_value")
    return {
        "written": [*info["opts"], *info["secondary_opts"]] if option else info["param_type_name"],
        "choices": list(info["type"].get("choices") or []),
        "default": repr(info["default"] if info["default"] is not False else None),
        "without a value": value if isinstance(value, str) else "flag" if info.get("is_flag") else "must have one",
        **{key: repr(info[key]) for key in ("required", "nargs", "multiple")},
    }


def printed() -> dict[str, str]:
    """Command line -> digest of what it prints."""
    models, checkpoints = db.list_models(), db.list_checkpoints()
    lines = [f"list [{name[0]}]{name[1:]}" for name in models]  # a pattern that is for one name alone
    lines += [f"list --checkpoints [{name[0]}]{name[1:]}" for name in checkpoints]
    lines += [f"{line} --json" for line in lines]
    lines += [f"info {name}" for name in (*models, *checkpoints)]
    lines += [f"card {name}" for name in CARDS]
    lines += [f"activations {rest}" for rest in ACTIVATIONS]
    return {line: sha256(stdout(*line.split())) for line in lines}


def printed_of_all() -> dict[str, str]:
    """The same of what is longer when something is registered."""
    lines = ("list", "list --json", "list --checkpoints", "list --checkpoints --json")
    return {line: sha256(stdout(*line.split())) for line in lines}


def wrong() -> dict[str, str]:
    """Command line that is wrong -> its exit status, and whether it prints to stdout."""
    found = {}
    with tempfile.TemporaryDirectory() as folder, CliRunner().isolated_filesystem(folder):
        for line in WRONG:
            result = run(*line.format(photo=conftest.PHOTO, folder=folder).split())
            found[line] = f"{result.exit_code}, {'text' if result.stdout else 'nothing'} on stdout"
    return found
