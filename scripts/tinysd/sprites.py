"""Emoji artwork of five openly licensed sets, as pictures with names, classes and styles.

The sets are npm packages in the Iconify format, each pinned to a version and checked against the digest that the
registry gave for it; names and groups are Unicode's, through the package ``emoji.json``. What may be used, and who is
to be named, is in ``diffusion_backbones/evaluation/data/scenes/README.md``.

    python scripts/tinysd/sprites.py build/tinysd
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

SIDE = 128
"""Width and height of a sprite in pixels."""


@dataclass(frozen=True)
class Package:
    """An npm package: name, version and the ``integrity`` that the registry states of its archive (SHA-512, base64)."""

    name: str
    version: str
    sha512: str

    def archive(self, folder: Path) -> tarfile.TarFile:
        """The package's archive, downloaded into ``folder`` unless it is there.

        Raises:
            SystemExit: npm is missing, or the archive cannot be fetched or is not the one that was pinned.
        """
        path = folder / f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"
        if not path.is_file():
            if shutil.which("npm") is None:
                sys.exit(
                    f"{self.name}: fetching it needs npm (Node.js), which is not on PATH; install it, or put "
                    f"{path.name} into {folder}"
                )
            folder.mkdir(parents=True, exist_ok=True)
            run = subprocess.run(
                ["npm", "pack", "--silent", f"{self.name}@{self.version}"], cwd=folder, capture_output=True, text=True
            )
            if run.returncode or not path.is_file():
                told = run.stderr.strip()
                sys.exit(
                    f"{self.name}@{self.version} could not be fetched from the npm registry:\n{told}\nTry again, or "
                    f"put {path.name} into {folder}"
                )
        digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
        if digest != self.sha512:
            sys.exit(
                f"{path} is not {self.name}@{self.version} as pinned (half downloaded, or changed): its SHA-512 is "
                f"{digest}. Delete it and start again."
            )
        return tarfile.open(path)


NAMES = Package(
    "emoji.json", "16.0.0", "OWFSIAA5ZY2D7KTPxnS/oZTk5cs4ZE4+w/bHkpS+t6hj4AUwDH0okBGuffvsli6WMIimfgxb8ofadPC+UR+glw=="
)
STYLES = {
    "noto": Package(
        "@iconify-json/noto",
        "1.2.9",
        "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
    ),
    "noto-v1": Package(
        "@iconify-json/noto-v1",
        "1.2.5",
        "/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
    ),
    "fluent": Package(
        "@iconify-json/fluent-emoji",
        "1.2.7",
        "D8G6bKAyIsyxP1rzZtIWr/gg/fO4Rg1+DyCWlfqKK4h8W+4Em/Y0P6QYgJUQTlUcagzJvSyg+9OBv4hz4Hc/QA==",
    ),
    "fluent-flat": Package(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
    ),
    "twemoji": Package(
        "@iconify-json/twemoji",
        "1.2.5",
        "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
    ),
}
HELD_OUT_STYLE = "twemoji"

# Class -> the subgroups of Unicode that make it up, and the members of these that are something else.
CLASSES = {
    "face": (r"face-.*", r"speaking|screaming.*rain"),
    "mammal": (r"animal-mammal|cat-face|monkey-face", r"pig nose|paw prints"),
    "bird": (r"animal-bird", r"feather|phoenix|wing"),
    "sea animal": (r"animal-marine|food-marine", r"spiral shell|coral"),
    "insect": (r"animal-bug", r"spider web|microbe"),
    "plant": (r"plant-.*", r"nest|white flower|rosette|fallen leaf|leaf fluttering"),
    "fruit": (r"food-fruit", r""),
    "vegetable": (r"food-vegetable", r""),
    "meal": (r"food-prepared|food-asian", r"salt|butter|fortune cookie"),
    "sweet": (r"food-sweet", r""),
    "drink": (r"drink", r"pouring|ice$"),
    "vehicle": (
        r"transport-(ground|air|water)",
        r"station|bus "
        r"stop|motorway|track|drum|pump|wheel$|light$|sign|construction|skate|seat|cable|tramway|suspension|satellite|parachute|anchor|buoy",
    ),
    "building": (r"place-building|place-religious", r"brick|rock|wood$|construction|wedding|kaaba"),
    "clothing": (r"clothing", r"bags|gem|lipstick|ring|prayer beads|fan|comb"),
    "instrument": (r"musical-instrument", r""),
}


@dataclass(frozen=True)
class Identity:
    """One kind of object: its Unicode name (without marks), its class, and whether training never sees it."""

    name: str
    cls: str
    held_out: bool


@dataclass
class Sprites:
    """All pictures: ``images`` (N, SIDE, SIDE, 4) uint8 RGBA, and each one's index of style and identity."""

    images: np.ndarray
    style: np.ndarray
    identity: np.ndarray
    identities: list[Identity]

    def where(self, held_out: bool, style_held_out: bool) -> np.ndarray:
        """Indices of the sprites of (not) held-out identities in the (not) held-out style."""
        ids = np.array([i.held_out for i in self.identities])[self.identity]
        return np.flatnonzero(
            (ids == held_out) & ((self.style == list(STYLES).index(HELD_OUT_STYLE)) == style_held_out)
        )


def _identities(folder: Path) -> dict[str, Identity]:
    with NAMES.archive(folder) as archive:
        entries = json.load(archive.extractfile("package/emoji.json"))  # type: ignore[arg-type]
    found = {}
    for entry in entries:
        name = re.sub(r"[^a-z0-9 -]", "", entry["name"].lower().replace("’", ""))
        slug = name.replace(" ", "-")
        for cls, (groups, but) in CLASSES.items():
            if re.fullmatch(groups, entry["subgroup"]) and not (but and re.search(but, name)):
                held_out = hashlib.sha256(slug.encode()).digest()[0] % 6 == 0  # a sixth, whatever else is in the list
                found[slug] = Identity(name.replace("-", " "), cls, held_out)
    return found


def _rasterise(body: str, width: float, height: float) -> np.ndarray | None:
    import resvg_py

    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 {width} '
        f'{height}">{body}</svg>'
    )
    image = Image.open(
        io.BytesIO(resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE, skip_system_fonts=True))
    ).convert("RGBA")
    box = image.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox()
    if box is None:
        return None
    cut = image.crop(box)
    scale = (SIDE - 4) / max(cut.size)
    cut = cut.resize((max(1, round(cut.width * scale)), max(1, round(cut.height * scale))), Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (SIDE, SIDE))
    square.paste(cut, ((SIDE - cut.width) // 2, (SIDE - cut.height) // 2))
    return np.asarray(square)


def load(folder: Path) -> Sprites:
    """The sprites, rasterised at the first call and read from ``folder`` later.

    Raises:
        SystemExit: A package cannot be fetched, or is damaged.
    """
    pixels, table = folder / "sprites.npy", folder / "sprites.json"
    if not table.is_file():
        wanted = _identities(folder / "packages")
        images, rows = [], []
        for style, package in STYLES.items():
            with package.archive(folder / "packages") as archive:
                icons = json.load(archive.extractfile("package/icons.json"))  # type: ignore[arg-type]
            for slug, identity in tqdm(wanted.items(), desc=style):
                icon = icons["icons"].get(slug) or icons["icons"].get(
                    icons.get("aliases", {}).get(slug, {}).get("parent")
                )
                image = (
                    _rasterise(icon["body"], icon.get("width", icons["width"]), icon.get("height", icons["height"]))
                    if icon
                    else None
                )
                if image is not None:
                    images.append(image)
                    rows.append({"style": style, **asdict(identity)})
        np.save(pixels, np.stack(images))
        table.write_text(json.dumps(rows))  # last: its presence says that the pixels are whole
    rows = json.loads(table.read_text())
    identities = {row["name"]: Identity(row["name"], row["cls"], row["held_out"]) for row in rows}
    order = {name: i for i, name in enumerate(identities)}
    style = np.array([list(STYLES).index(row["style"]) for row in rows])
    return Sprites(np.load(pixels), style, np.array([order[row["name"]] for row in rows]), list(identities.values()))


if __name__ == "__main__":
    sprites = load(Path(sys.argv[1]))
    print(
        f"{len(sprites.images)} sprites of {len(sprites.identities)} identities, "
        f"{sum(i.held_out for i in sprites.identities)} of them held out"
    )
    for cls in CLASSES:
        members = [i for i in sprites.identities if i.cls == cls]
        print(
            f"{cls:12} {len(members):4} identities, {sum(i.held_out for i in members):3} held out: "
            f"{', '.join(i.name for i in members[:6])} ..."
        )
