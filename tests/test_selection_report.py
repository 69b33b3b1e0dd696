"""What a selection leaves for people: the report in a real browser, the recipe's card, the paper's tables. And networks
that nobody registered.
"""

from __future__ import annotations

import csv
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner
from PIL import Image

import diffusion_backbones as db
from diffusion_backbones.cli.program import main
from diffusion_backbones.families import architecture
from diffusion_backbones.selection import data, measure, paper, pictures, report, run, tasks
from diffusion_backbones.spec import registry

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def few(size=64):
    known = data.scenes(size)
    return data.Data(known.images[:8], tasks.Keypoints(tasks.warped(known.images[:4])), "eight scenes")


@pytest.fixture(scope="module")
def finetune(tmp_path_factory):
    """A user's own folder: Stable Diffusion's topology, other widths."""
    return tiny.folder("sd15", tmp_path_factory.mktemp("hub") / "my finetune")


@pytest.fixture(scope="module")
def selected(finetune, tmp_path_factory):
    out = tmp_path_factory.mktemp("selection")
    return run.select(f"local-dir:{finetune}", few(), out, members=2, everything=True, device="cpu"), out


@pytest.fixture(scope="module")
def page(selected):
    """The report, opened from another folder than it was written to, with the network cut off."""
    if not BROWSER:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        quiet = [
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
        ]
        browser = driver.chromium.launch(executable_path=BROWSER, args=quiet)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.complaints, page.asked = [], []
        page.on("console", lambda message: page.complaints.append(message.text))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on("request", lambda request: page.asked.append(request.url))
        page.set_content((selected[1] / "report.html").read_text())
        yield page
        browser.close()


def test_the_report_stands_alone_and_is_whole(page, selected):
    selection, _ = selected
    assert page.locator(".cell").count() == len(selection.sites)
    assert page.locator(".cell.chosen").count() == len(selection.steps)
    assert page.locator(".cell.dropped").count() == sum(map(bool, selection.dropped.values()))
    assert page.locator(".gallery img").count() == len(selection.sites)
    assert page.evaluate("[...document.images].filter(i => !(i.complete && i.naturalWidth)).length") == 0
    assert not page.complaints
    assert all(url.startswith(("data:", "about:")) for url in page.asked)


def test_marks_are_coloured_by_what_is_chosen(page):
    def colours():
        return page.evaluate("[...document.querySelectorAll('.cell')].map(c => c.style.background)")

    page.select_option("#property", "granularity")
    by_grain = colours()
    page.select_option("#property", "gflops")
    assert colours() != by_grain
    assert colours()[0] == "rgb(68, 1, 84)"  # the first costs least, and dark is little
    assert page.locator("#low").text_content() != page.locator("#high").text_content()


def test_choosing_a_mark_tells_all_about_it(page, selected):
    selection, _ = selected
    index = next(i for i, site in enumerate(selection.sites) if selection.dropped[site.id])
    site = selection.sites[index]
    page.locator(".cell").nth(index).click()
    told = page.locator(".details").inner_text()
    assert site.id in told
    assert site.path in told
    assert selection.dropped[site.id] in told
    assert f"{selection.prefix_costs[site.id].parameters:,}" in told
    found = selection.measured.properties[site.id]
    assert page.locator(".details svg").count() == 2  # noise by frequency, similarity by distance
    assert page.locator(".details circle").count() == len(found.noise_curve) + len(found.similarity)
    page.locator(".cell.chosen").first.press("Enter")  # by the keyboard too
    assert "In the recipe, as number" in page.locator(".details").inner_text()


def test_the_ranking_falls_and_the_reasons_are_all_there(page, selected):
    selection, _ = selected
    for summary in page.locator("summary").all():
        summary.click()
    shown = [float(text.split("±")[0]) for text in page.locator("tr.ranked td:nth-child(4)").all_inner_texts()]
    assert shown == sorted(shown, reverse=True)
    assert len(shown) == len(selection.scores)
    assert page.locator("details.rule li").count() == sum(map(bool, selection.dropped.values()))
    page.locator("#redundancy").hover(position={"x": 1, "y": 1})
    first = selection.sites[0].id
    assert page.locator("#pair").inner_text() == f"{first} and {first}: 1.00"


def test_the_report_fits_a_telephone(page):
    page.set_viewport_size({"width": 390, "height": 800})
    beyond = (
        "[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > 391 && "
        "!e.closest('.scroll, pre'))"
    )
    assert not page.evaluate(f"{beyond}.map(e => e.outerHTML.slice(0, 80))")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.set_viewport_size({"width": 1280, "height": 900})


def test_the_pyramid_in_the_report_is_the_recipes(selected, finetune):
    selection, out = selected
    backbone = db.create_model(f"local-dir:{finetune}", recipe=out / "recipe.yaml")
    shown = few().images[: pictures.SHOWN]
    with torch.no_grad():
        maps = backbone(torch.stack(shown))
    for level, expected in zip(
        pictures.pyramid(backbone, shown, [level.activations for level in selection.recipe.levels]), maps, strict=True
    ):
        assert np.array_equal(np.asarray(level), np.asarray(pictures.strip(expected)))


def test_the_card_says_how_to_load_the_recipe(selected, finetune, monkeypatch):
    _, out = selected
    text = (out / "card.md").read_text()
    [code] = [block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "create_model" in block]
    monkeypatch.chdir(out)
    exec(compile(code, "card.md", "exec"), {})  # as a reader would
    assert f'"local-dir:{finetune}"' in code


def test_a_picture_of_every_activation_is_painted_once(selected, finetune, tmp_path):
    selection, _ = selected
    ids = [site.id for site in selection.sites]
    backbone = db.create_model(f"local-dir:{finetune}", recipe=ids[-1:])
    pictures.paint(backbone, few().images[:2], ids, tmp_path, {"run": 1})
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.png")}
    assert sorted(path.stem for path in before) == sorted(ids)
    with Image.open(tmp_path / "unet-out.png") as painted:
        assert painted.size == (16, 8)  # two images of 8 x 8 places
    pictures.paint(backbone, few().images[:2], ids, tmp_path, {"run": 1})
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.png")} == before
    pictures.paint(backbone, few().images[:2], ids, tmp_path, {"run": 2})
    assert all(path.stat().st_mtime_ns > before[path] for path in before)


def test_a_transformer_is_drawn_as_blocks(tmp_path):
    place = tiny.folder("dit_xl_256", tmp_path / "dit")
    selection = run.select(f"local-dir:{place}", few(), tmp_path / "out", members=1, everything=True, device="cpu")
    boxes = report.boxes(selection.sites)
    assert [box.title for box in boxes] == [f"block {i}" for i in range(len(boxes))]
    assert sorted(i for box in boxes for line in box.lines for i in line) == list(range(len(selection.sites)))
    assert "u flat" in (tmp_path / "out" / "report.html").read_text()


def test_a_u_net_is_drawn_as_a_u():
    known = registry.get_checkpoint("sd15")
    catalogue = architecture(known).catalogue
    sites = measure.candidates(catalogue[name] for name in catalogue)
    boxes = {box.title: (box.row, box.column) for box in report.boxes(sites)}
    assert boxes["down level 0"] == (2, 1)
    assert boxes["up level 3"] == (2, 2)
    assert boxes["down level 3"] == (5, 1)
    assert boxes["up level 0"] == (5, 2)
    assert boxes["mid"] == (6, 0)


def test_a_killed_measurement_goes_on_and_gives_the_same(tmp_path, monkeypatch):
    images, ids = data.scenes(128).images[:6], ["up-level1-repeat0-res-out", "unet-out"]
    network = db.create_model("tinysd", pretrained=True, recipe=["unet-out"])
    whole = measure.measure(network, images, ids)
    monkeypatch.setattr(measure, "EVERY", -1)

    def killed(items):
        yield from items[:4]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure.measure(network, images, ids, state=tmp_path / "state.pt", key="a", progress=killed)
    left = []
    again = measure.measure(
        network, images, ids, state=tmp_path / "state.pt", key="a", progress=lambda items: left.extend(items) or items
    )
    assert len(left) == 2
    assert again.properties == whole.properties
    assert torch.equal(again.redundancy, whole.redundancy)
    measure.measure(
        network,
        images,
        ids,
        state=tmp_path / "state.pt",
        key="other",
        progress=lambda items: left.extend(items) or items,
    )
    assert len(left) == 2 + 6  # what another run left is not gone on with


def test_a_folder_is_selected_from_by_the_command(finetune, tmp_path):
    command = [
        "select",
        str(finetune),
        "--task",
        "warps",
        "--size",
        "64",
        "--ids",
        "mid-*",
        "--ids",
        "up-level1-*-res-out",
        "-o",
        str(tmp_path / "out"),
    ]
    result = CliRunner().invoke(main, [*command, "--everything", "--members", "1", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    rows = list(csv.DictReader((tmp_path / "out" / "activations.csv").open()))
    assert rows
    assert all(row["id"].startswith(("mid-", "up-level1-")) for row in rows)
    assert db.create_model(f"local-dir:{finetune}", recipe=tmp_path / "out" / "recipe.yaml").feature_info.channels()
    at_path = [
        "select",
        "sd15",
        "--checkpoint-path",
        str(finetune),
        *command[2:-1],
        str(tmp_path / "other"),
        "--everything",
        "--device",
        "cpu",
    ]
    by_path = CliRunner().invoke(main, at_path)
    assert by_path.exit_code == 0, by_path.output  # its own config holds, not the published one
    assert 'checkpoint_path="' in (tmp_path / "other" / "card.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["EMPTY"], "holds no denoiser that is known here"),
        (["nowhere"], "'nowhere' is neither a checkpoint nor a folder"),
        (["tinysd", "--ids", "up-levl1-*", "--size", "64"], r"no activation that can be a level matches 'up-levl1-*'"),
        (["tinysd", "--ids", "*-self-v", "--size", "64"], "the rules drop all 16 activations (increment)"),
    ],
)
def test_what_cannot_be_selected_from_is_said(tmp_path, arguments, error):
    (tmp_path / "empty").mkdir()
    arguments = [str(tmp_path / "empty") if argument == "EMPTY" else argument for argument in arguments]
    result = CliRunner().invoke(main, ["select", *arguments, "-o", str(tmp_path / "out")])
    assert result.exit_code != 0
    assert error in result.output


# The paper.


@pytest.mark.parametrize(
    "table", [table for table in paper.tables() if "rows" in table], ids=lambda table: table["table"].split(",")[0]
)
def test_the_tables_of_the_paper_have_its_rows(table):
    for name in table["checkpoints"]:
        known = registry.get_checkpoint(name)
        catalogue = architecture(known).catalogue
        assert (
            len(measure.matching(measure.candidates(catalogue[name] for name in catalogue), table["ids"]))
            == table["rows"]
        )


def test_the_commands_for_the_paper_are_commands():
    result = CliRunner().invoke(main, ["select", "--paper"])
    assert result.exit_code == 0
    typed = [line.strip() for line in result.output.splitlines() if line.startswith("    ")]
    assert len(typed) == sum(len(list(paper.commands(table))) for table in paper.tables()) > 15
    for line in typed:
        if line.startswith("diffusion-backbones"):
            told = CliRunner().invoke(main, shlex.split(line)[1:])  # all is understood, and the images are missing
            assert re.search(r"Directory '.*' does not exist", told.output), told.output
        else:
            [config] = re.findall(r"fromfile\('(.*?)'\)", line)
            assert (Path(__file__).parents[1] / config).is_file()
