"""What stands on a fusion: registered names, timm, decoders, extraction, cards, the command line, torch.hub."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from huggingface_hub import ModelCard
from mmseg.registry import MODELS
from mmseg.utils import register_all_modules
from PIL import Image
from safetensors.torch import load_file
from snippets import blocks, printed, promised

import diffusion_backbones as db
from diffusion_backbones import extraction
from diffusion_backbones.cli.program import main
from diffusion_backbones.integrations.openmmlab import OpenMMLabBackbone
from diffusion_backbones.integrations.smp import register
from diffusion_backbones.reports import fusion_card
from diffusion_backbones.spec.fusion import Fusion, TimmModel

pytestmark = pytest.mark.usefixtures("one_thread")
register_all_modules(init_default_scope=True)
ROOT = Path(__file__).parent.parent
X = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def both():
    torch.manual_seed(0)
    return db.fuse("tinysd_gdf", "test_vit", pretrained=False)


@pytest.fixture(scope="module", params=db.list_fusions())
def registered(request):
    return db.create_model(request.param, device="meta")


def _timm(fusion: Fusion) -> list[bool]:
    return [isinstance(member.backbone, TimmModel) for member in fusion.members]


# Registered.


def test_a_registered_fusion_builds_on_meta_and_gives_what_it_says(registered):
    maps = registered(torch.empty(1, 3, 200, 330, device="meta"))
    info = registered.feature_info
    assert [tuple(m.shape) for m in maps] == [
        (1, c, -(-200 // s), -(-330 // s)) for c, s in zip(info.channels(), info.reduction(), strict=True)
    ]
    assert registered.declaration == db.get_fusion(registered.declaration.name).override(
        members=registered.declaration.members
    )


def test_its_card_is_whole_and_current(registered):
    fusion = registered.declaration
    card = fusion_card.card(fusion, registered.levels)
    data = ModelCard(card).data
    assert data.license in {found.id for found in fusion.licenses.values()} | {"other"}
    for name, found in fusion.licenses.items():
        assert f"* `{name}`: " in card
        assert found.link in card
    for sentence in (*fusion.notes, *fusion.unverified):
        assert f"\n* {sentence}\n" in card
    assert all(paper.bibtex in card for paper in fusion.papers)
    assert (ROOT / f"model_cards/{fusion.name}.md").read_text().endswith(card.removeprefix("---\n"))


def test_it_is_in_timm_by_name(registered):
    name = registered.declaration.name
    assert timm.is_model(name)
    with torch.device("meta"):
        made = timm.create_model(name, features_only=True)
    assert made.feature_info.channels() == registered.feature_info.channels()
    assert timm.data.resolve_model_data_config(made)["input_size"] == (3, *[registered.declaration.input_size] * 2)


def test_gdf_for_segmentation_is_in_the_order_of_its_code():
    """segmentation/configs/ade_full.py: c_per_level, and feature_layers of SDXL, then of Playground v2."""
    backbone = db.create_model("xlt_gdf_seg", device="meta")
    assert backbone.feature_info.channels() == [640 + 640, 1280 + 640, 2560 + 1280]
    assert backbone.feature_info.reduction() == [8, 16, 32]
    assert [[name.partition(": ")[2] for name in level] for level in backbone.activations] == [
        ["up-level1-upsampler-out", "up-level1-upsampler-out"],
        [
            "up-level1-repeat0-vit-block0-cross-q",
            "up-level1-repeat0-vit-block0-out",
            "up-level1-repeat0-vit-block0-cross-q",
        ],
        [
            "up-level0-repeat0-vit-block7-out",
            "up-level0-repeat0-vit-block5-out",
            "up-level0-repeat0-vit-block5-out",
        ],
    ]


def test_gdf_for_correspondence_is_in_the_order_of_its_code():
    """correspondence/README.md: SDXL, Stable Diffusion 1.5, Playground v2; of each the order in which it runs, and the
    attention last.
    """
    backbone = db.create_model("xlt_gdf", device="meta")
    assert [backbone.feature_info.channels(), backbone.feature_info.reduction()] == [[8154], [8]]
    assert [name.partition(": ")[2] for name in backbone.activations[0]] == [
        "up-level0-repeat0-vit-block5-out",
        "up-level0-repeat0-vit-block7-out",
        "up-level1-repeat0-vit-block0-cross-q",
        "up-level1-repeat0-vit-block0-out",
        "up-level1-repeat1-vit-block0-cross-q",
        "up-level2-repeat1-vit-block0-cross-q",
        "up-level2-upsampler-out",
        "up-level3-repeat0-vit-block0-self-k",
        "attn[up_cross]",
        "up-level0-repeat0-vit-block3-out",
    ]


def test_sd_dino_has_three_times_256_components_and_dinov2s_last_block():
    backbone = db.create_model("sd_dino", device="meta")
    assert [backbone.feature_info.channels(), backbone.feature_info.reduction()] == [[3 * 256 + 768], [16]]
    assert [source.position for source in backbone.levels[0].sources] == [0, 1, 2, 0]
    assert backbone.activations[0][-1] == "vit_base_patch14_dinov2.lvd142m: blocks.11"
    [m] = backbone(torch.empty(1, 3, 960, 960, device="meta"))
    assert m.shape == (1, 1536, 60, 60)


@pytest.mark.parametrize("name", [n for n in db.list_fusions() if not any(_timm(db.get_fusion(n)))])
def test_at_tiny_width_its_maps_are_those_of_its_members_and_decoders_run(name, tiny_folder):
    fusion = db.get_fusion(name)
    paths = {m.backbone.checkpoint.name: tiny_folder(m.backbone.checkpoint.name) for m in fusion.members}
    backbone = OpenMMLabBackbone(name, checkpoint_path=paths)
    parts: dict[int, list[torch.Tensor]] = {stride: [] for stride in fusion.strides}
    for member, factor, read in zip(backbone.net.members, fusion.factors, fusion.members, strict=True):
        side = [int(s * factor) for s in X.shape[-2:]]
        x = (
            X
            if factor == 1
            else F.interpolate(X, side, mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)
        )
        maps, strides = member(x), [int(s / factor) for s in member.feature_info.reduction()]
        for i in read.maps or range(len(maps)):
            stride = min(fusion.strides, key=lambda s: abs(math.log2(s / strides[i])))
            size = [-(-s // stride) for s in X.shape[-2:]]
            parts[stride].append(F.interpolate(maps[i], size, mode="bilinear", align_corners=False))
    got = backbone(X)
    for m, some in zip(got, parts.values(), strict=True):
        torch.testing.assert_close(m, torch.cat(some, 1), rtol=1e-5, atol=1e-5)
    channels = backbone.net.feature_info.channels()
    head = MODELS.build(
        {
            "type": "UPerHead",
            "in_channels": channels,
            "in_index": list(range(len(channels))),
            "pool_scales": (1, 2, 3),
            "channels": 8,
            "num_classes": 5,
            "norm_cfg": {"type": "BN"},
        }
    ).eval()
    assert head(got).shape == (1, 5, *got[0].shape[-2:])
    model = smp.FPN(register(backbone.net, f"fusion-{name}"), encoder_weights=None, classes=5)
    model(X).square().mean().backward()
    assert all(p.grad is None for p in backbone.parameters())
    assert any(p.grad is not None for p in model.decoder.parameters())


def test_weights_of_members_are_given_by_checkpoint(tiny_folder):
    paths = {name: tiny_folder(name) for name in ("sdxl", "pgv2")}
    backbone = db.create_model("xlt_gdf_seg", checkpoint_path=paths, dtype="bfloat16")
    assert backbone.feature_info.reduction() == [8, 16, 32]
    assert all(m.dtype == torch.bfloat16 and m.isfinite().all() for m in backbone(X))
    with pytest.raises(KeyError, match="has no member on 'sd15'"):
        db.create_model("xlt_gdf_seg", checkpoint_path={"sd15": "x"})


# Adapters and extraction.


def test_torchvision_takes_it(both):
    from diffusion_backbones.integrations.torchvision import NamedLevels, PyramidFPN

    maps = NamedLevels(both, out=-1, aux=0)(X)
    channels = both.feature_info.channels()
    assert {name: m.shape[1] for name, m in maps.items()} == {"out": channels[-1], "aux": channels[0]}
    fpn = PyramidFPN(both, out_channels=8)
    assert [m.shape[1] for m in fpn(X).values()] == [8] * 4
    assert fpn.transform["size_divisible"] % 32 == 0


def test_transformers_builds_saves_and_loads_it(both, tmp_path):
    from transformers import UperNetConfig, UperNetForSemanticSegmentation

    from diffusion_backbones.integrations.transformers import DiffusionBackboneConfig

    config = UperNetConfig(
        backbone_config=DiffusionBackboneConfig.from_backbone(both),
        num_labels=3,
        hidden_size=8,
        use_auxiliary_head=False,
    )
    model = UperNetForSemanticSegmentation(config).eval()
    model.save_pretrained(tmp_path)
    again = UperNetForSemanticSegmentation.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected, got = (m(pixel_values=X).logits for m in (model, again))
    torch.testing.assert_close(got, expected)
    assert again.backbone.diffusion_backbone.declaration == both.declaration


def test_strides_of_a_decoder(both):
    assert [m.shape[-1] for m in db.fuse(*both.members, out_strides=(4, 8, 16, 32))(X)] == [24, 12, 6, 3]


def test_timms_methods(both):
    last, maps = both.forward_intermediates(X, output_fmt="NLC")
    assert torch.equal(last, both(X)[-1])
    assert maps[0].shape == (1, 8 * 12, both.feature_info.channels()[0])
    assert both.num_features == last.shape[1]
    matcher = both.group_matcher()
    assert {matcher(name) for name, _ in both.named_parameters()} > {0}
    both.set_grad_checkpointing()
    both.set_grad_checkpointing(False)


def test_extraction_writes_it_once(both, tmp_path):
    Image.new("RGB", (96, 64), (10, 200, 90)).save(tmp_path / "a.png")
    files = extraction.images.find([tmp_path / "a.png"])
    first = extraction.extract(both, files, tmp_path / "out", dtype=torch.float32)
    again = extraction.extract(both, files, tmp_path / "out", dtype=torch.float32)
    assert [first.done, again.done, again.skipped] == [1, 0, 1]
    kept = load_file(tmp_path / "out" / "a.png.safetensors")
    x = extraction.images.transform(both.pretrained_cfg, None)(Image.open(tmp_path / "a.png"))
    assert all(torch.equal(kept[f"level{i}"], m[0]) for i, m in enumerate(both(x[None])))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["activations"][2][-1].startswith("test_vit: ")
    other = db.fuse(*both.members, weights=(1, 2))
    with pytest.raises(ValueError, match="other settings"):
        extraction.extract(other, files, tmp_path / "out", dtype=torch.float32)


def test_a_declaration_is_read_back_from_json(both):
    for fusion in (both.declaration, *map(db.get_fusion, db.list_fusions())):
        again = Fusion.from_dict(json.loads(json.dumps(fusion.described())))
        assert again == fusion
        assert again.digest == fusion.digest


# The command line.


def run(*arguments: str):
    return CliRunner().invoke(main, [*arguments])


def test_the_command_line_knows_fusions(tmp_path):
    listed = run("list", "--fusions")
    assert listed.exit_code == 0
    assert [line.split()[0] for line in listed.stdout.splitlines()] == db.list_fusions()
    about = run("info", "tinysd_gdf+test_vit")
    assert about.exit_code == 0, about.output
    assert "48 @ 8" in about.stdout
    levels = json.loads(run("info", "tinysd_gdf+test_vit", "--json").stdout)["levels"]
    assert [level["stride"] for level in levels] == [8, 16, 32]
    assert run("card", "tinysd_gdf+test_vit").stdout.startswith("---\n")
    photo, out = tmp_path / "a.png", tmp_path / "out.png"
    Image.new("RGB", (96, 64), (10, 200, 90)).save(photo)
    drawn = run("visualize", "tinysd_gdf+test_vit", str(photo), "-o", str(out), "--random-weights", "--device", "cpu")
    assert drawn.exit_code == 0, drawn.output
    assert drawn.stdout.splitlines()[-1] == str(out)
    done = run(
        *(
            "extract",
            "tinysd_gdf+test_vit",
            str(photo),
            "-o",
            str(tmp_path / "f"),
            "--random-weights",
            "--device",
            "cpu",
        )
    )
    assert done.exit_code == 0, done.output
    unknown = run("info", "tinysd_gdf+test_vitt")
    assert unknown.exit_code == 2
    assert "neither a backbone nor a model of timm" in unknown.output


def test_torch_hub_has_them():
    import importlib.util

    spec = importlib.util.spec_from_file_location("hubconf", ROOT / "hubconf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in db.list_fusions():
        assert getattr(module, name).__doc__.startswith(db.get_fusion(name).title)


def test_the_page_prints_what_it_says():
    names: dict[str, object] = {}
    for block in blocks((ROOT / "docs/fusion.md").read_text()):
        assert printed(block, names) == promised(block)
