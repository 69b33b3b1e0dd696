"""What is saved may be published: no path of this machine is in it, and no markup of others."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt

import diffusion_backbones as db

pytestmark = pytest.mark.usefixtures("costs_not_measured")


class Page(HTMLParser):
    """The elements of a page, and what its links and pictures point to."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("href", "src")]


def texts(folder):
    return {path.name: path.read_text() for path in folder.iterdir() if path.suffix in (".md", ".json")}


def test_no_path_is_saved(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder("sd15"), tmp_path / "secret_project")
    config = json.loads((folder / "unet/config.json").read_text()) | {"_name_or_path": str(folder)}
    (folder / "unet/config.json").write_text(json.dumps(config))
    backbone = db.create_model(f"local-dir:{folder}", recipe=["mid-vit-out"])
    assert backbone.provenance == {"path": str(folder)}
    first = backbone.save_pretrained(tmp_path / "first")
    second = db.create_model(f"local-dir:{first}").save_pretrained(tmp_path / "second")
    for saved in (first, second):
        assert texts(saved).keys() == {"README.md", "config.json"}
        assert not [name for name, text in texts(saved).items() if "secret_project" in text or str(tmp_path) in text]


def test_names_of_hub_repositories_stay(tmp_path):
    backbone = db.create_model("tinysd_gdf", pretrained=True, out_indices=[2])
    backbone.configs["vae"]["_name_or_path"] = "stabilityai/sdxl-vae"
    saved = json.loads(texts(backbone.save_pretrained(tmp_path))["config.json"])
    assert saved["configs"]["vae"]["_name_or_path"] == "stabilityai/sdxl-vae"


@pytest.fixture(scope="module")
def evil(tmp_path_factory):
    """A saved backbone whose config was written by somebody who means harm."""
    folder, script = tmp_path_factory.mktemp("evil"), "<script>alert(1)</script>"
    db.create_model("tinysd_gdf", pretrained=True, out_indices=[2]).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["name"] = f"tinysd`{script}"
    config["checkpoint"] |= {
        "title": f"{script}\n\n# x",
        "license": {
            "id": "other",
            "name": f"x](javascript:a){script}",
            "link": "javascript:alert(1)",
            "verified": True,
        },
        "unverified": ["[a](javascript:alert(3))", "[b]: javascript:alert(4)", "[b]", "<img src=x onerror=alert(5)>"],
        "status": f"a | {script}",
        "hub_id": "a/b) <script>",
        "paper": {
            "key": "k",
            "title": f"```\n{script}",
            "authors": "A, B",
            "venue": "",
            "year": 2020,
            "url": "javascript:a",
        },
    }
    config["recipe"] |= {
        "notes": [
            *(script, "[c](https://example.org) is a link", "<javascript:alert(6)>"),
            *("![d](https://example.org/d.png)", r"\![e](https://example.org/e.png)", r"[f\](/f)", r"[g\\](/g)"),
        ],
        "source": script,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_markup_of_others_is_text(evil, tmp_path):
    card = texts(db.create_model(f"local-dir:{evil}").save_pretrained(tmp_path))["README.md"]
    front, body = card.split("---", 2)[1:]
    page = Page(MarkdownIt("commonmark", {"html": True}).enable("table").render(body))
    assert not page.tags & {"script", "img"}
    assert page.addresses
    assert not [address for address in page.addresses if not address.startswith(("https://", "../"))]
    assert "https://example.org" in page.addresses
    assert "javascript:" not in front
