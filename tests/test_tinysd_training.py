"""The training of tinysd on photographs: what it packs and refuses, and that it can be killed and gone on with."""

from __future__ import annotations

import csv
import io
import math
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts" / "tinysd"))

import denoiser_stage  # noqa: E402
import loop  # noqa: E402
import model  # noqa: E402
import pack  # noqa: E402
import photographs  # noqa: E402
import speed  # noqa: E402
import state  # noqa: E402
import train  # noqa: E402
import vae_stage  # noqa: E402

CPU = torch.device("cpu")
NUMBER = 24


def picture(i: int) -> Image.Image:
    return Image.fromarray(np.full((192, 192, 3), (10 * i, 255 - 10 * i, 7 * i), np.uint8))


@pytest.fixture
def data(tmp_path):
    """Plain pictures as photographs: two tar files and their index."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = []
    for shard in ("a.tar", "b.tar"):
        with tarfile.open(folder / shard, "w") as archive:
            for _ in range(NUMBER // 2):
                file = io.BytesIO()
                picture(len(rows)).save(file, "webp", lossless=True)
                info = tarfile.TarInfo(f"{len(rows)}.webp")
                info.size = file.tell()
                archive.addfile(info, io.BytesIO(file.getvalue()))
                rows.append([shard, info.name, f"a photo of number {len(rows)}", str(len(rows) % 2), "made"])
    with (folder / "index.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["shard", "file", "caption", "class", "source"], *rows])
    return folder


def packed(data: Path, folder: Path) -> pack.Pack:
    return pack.write(folder, sorted(photographs.photographs(data), key=lambda p: bool(p[1]["held_out"])), 2000)


def test_a_pack_gives_back_its_pictures(data, tmp_path):
    written = packed(data, tmp_path / "pack")
    read = pack.load(tmp_path / "pack")
    assert read.digest == written.digest
    assert read.rows == written.rows
    assert len(read.rows) == NUMBER
    assert not any(row.held_out for row in read.rows[: read.training])
    assert all(row.held_out for row in read.rows[read.training :])
    assert all(path.stat().st_size <= 2000 for path in (tmp_path / "pack").glob("*/pictures.bin"))
    pixels = pack.pixels(read, tmp_path / "cache")
    for row, found in zip(read.rows, pixels, strict=True):
        assert (found == np.asarray(picture(int(row.caption.split()[-1])))).all()


def test_photographs_that_cannot_be_packed(data, tmp_path):
    index = data / "index.csv"
    whole = index.read_text()
    for wrong, told in (
        (whole.replace("a photo of number 3,", ","), r"index.csv, line 5: 3.webp has no caption"),
        (whole.replace("caption", "words"), r"index.csv has no column caption"),
        (whole.replace("7.webp", "77.webp"), r"a.tar is missing or damaged.*77.webp"),
    ):
        index.write_text(wrong)
        with pytest.raises(SystemExit, match=told):
            list(photographs.photographs(data))
    index.write_text(whole)
    shard = (data / "b.tar").read_bytes()
    (data / "b.tar").write_bytes(shard[:700])
    with pytest.raises(SystemExit, match=r"b.tar is missing or damaged"):
        list(photographs.photographs(data))
    (data / "b.tar").unlink()
    with pytest.raises(SystemExit, match=r"b.tar is missing or damaged"):
        list(photographs.photographs(data))
    file = io.BytesIO()
    Image.new("RGB", (64, 32)).save(file, "webp")
    with pytest.raises(SystemExit, match=r"x has 64 x 32 pixels, expected 192 x 192"):
        pack.decode(file.getvalue(), "x")
    with pytest.raises(SystemExit, match=r"holds no index.csv"):
        list(photographs.photographs(tmp_path))


def test_a_damaged_pack_is_refused(data, tmp_path):
    packed(data, tmp_path / "pack")
    shard = tmp_path / "pack" / "0" / "pictures.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(SystemExit, match=r"0/pictures.bin is damaged"):
        pack.load(tmp_path / "pack")
    shard.unlink()
    with pytest.raises(SystemExit, match=r"0/pictures.bin is missing"):
        pack.load(tmp_path / "pack")
    run = subprocess.run(
        [sys.executable, ROOT / "scripts/tinysd/train.py", tmp_path / "no", tmp_path / "run"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert "holds no pack.json; run python scripts/tinysd/photographs.py" in run.stderr


def test_a_state_is_in_small_files_and_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(state, "LIMIT", 4096)
    tensors = {str(i): torch.randn(20, 20) for i in range(9)}
    state.write(tmp_path / "s", tensors, {"step": 3})
    assert all(path.stat().st_size < 4096 + 500 for path in (tmp_path / "s").iterdir())
    found, facts = state.read(tmp_path / "s")
    assert facts["step"] == 3
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], value) for key, value in tensors.items())
    part = tmp_path / "s" / "01.safetensors"
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(SystemExit, match=r"01.safetensors is missing or damaged"):
        state.read(tmp_path / "s")
    with pytest.raises(SystemExit, match=r"a state with widths \[1\], expected \[2\]"):
        state.check(tmp_path / "s", {"widths": [1]}, {"widths": [2]})
    assert state.read(tmp_path / "nothing") is None


class Line:
    """Fits a line in a box whose clock the test moves, a second a step."""

    def __init__(self, folder, monkeypatch, seconds, stop=math.inf, spoil=math.inf, width=2):
        self.now, self.stop, self.spoil = 0.0, stop, spoil
        monkeypatch.setattr(loop.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(loop.speed, "worked", lambda device: self.now)
        setting = loop.Setting(folder, CPU, 5, "data", save_minutes=10 / 60, slow_ok=False, compile=False, peak=1.0)
        torch.manual_seed(0)
        self.loop = loop.Loop(setting, "line", nn.Linear(width, 1), seconds / 60, 1e-2, {"width": width})

    def sample(self, step, generator):
        self.now += 1.0
        if step == self.stop:
            raise KeyboardInterrupt
        x = torch.randn(8, 2, generator=generator)
        return (x * math.nan if step == self.spoil else x,)

    def run(self):
        network = self.loop.model
        return self.loop.run(self.sample, lambda x: {"fit": (network(x) - x.sum(1, keepdim=True)).square().mean()})


def test_a_killed_training_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    whole = Line(tmp_path / "whole", monkeypatch, 230).run()
    with pytest.raises(KeyboardInterrupt):
        Line(tmp_path / "twice", monkeypatch, 230, stop=127).run()
    again = Line(tmp_path / "twice", monkeypatch, 230)
    assert 100 < again.loop.step < 127
    again = again.run()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    facts = state.read(tmp_path / "twice" / "line")[1]
    assert facts["step"] == state.read(tmp_path / "whole" / "line")[1]["step"]
    assert [(seen["data"], seen["seed"]) for seen in facts["history"]] == [("data", 5), ("data", 5)]
    rows = list(csv.reader((tmp_path / "twice" / "line.csv").open()))
    assert [row[0] for row in rows] == ["step", "100", "200", str(facts["step"])]
    finished = Line(tmp_path / "twice", monkeypatch, 230).run()
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), finished.parameters(), strict=True))


def test_a_training_that_must_stop(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"line: a loss is not finite at step 100"):
        Line(tmp_path / "nan", monkeypatch, 200, spoil=50).run()
    Line(tmp_path / "other", monkeypatch, 5).run()
    with pytest.raises(SystemExit, match=r"a state with width 2, expected 3"):
        Line(tmp_path / "other", monkeypatch, 5, width=3)
    with pytest.raises(SystemExit, match=r"has 1.0 GiB free, expected 2.0"):
        train.check_memory(2 * 2**30, 2**30, "a small card")
    with pytest.raises(SystemExit, match=r"59 TFLOP/s, 10 % of a matrix product's 590: expected at least 60"):
        speed.judge(59.0, 590.0, torch.device("cuda"), slow_ok=False)
    assert speed.judge(59.0, 590.0, torch.device("cuda"), slow_ok=True)
    assert speed.judge(0.05, 0.1, CPU, slow_ok=False)


def test_a_compiler_that_fails_is_named_and_left_out(tmp_path, monkeypatch, capsys):
    def broken(function, mode, dynamic):
        raise RuntimeError(f"no compiler for {mode}")

    plain = Line(tmp_path / "plain", monkeypatch, 30).run()
    monkeypatch.setattr(loop.torch, "compile", broken)
    line = Line(tmp_path / "broken", monkeypatch, 30)
    line.loop.setting.compile = True
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), line.run().parameters(), strict=True))
    told = capsys.readouterr().out
    assert "torch.compile, mode default, failed" in told
    assert "no compiler for default" in told
    assert "training goes on without torch.compile" in told


def test_the_operations_of_a_step():
    """A product of (1, 8) and (8, 4) is 2 * 8 * 4 operations; a step's are thrice a forward pass's."""
    assert speed.operations(nn.Linear(8, 4, bias=False), torch.randn(1, 8)) == 3 * 2 * 8 * 4


def test_the_target_and_weights_of_v():
    """Against stock diffusers' noise and velocity, and min-SNR's formula for v."""
    z, noise, t = torch.randn(5, 4, 8, 8), torch.randn(5, 4, 8, 8), torch.tensor([0, 100, 400, 700, 999])
    stock = DDPMScheduler(**model.NOISE)
    ratio = stock.alphas_cumprod / (1 - stock.alphas_cumprod)
    weights = torch.minimum(ratio, torch.tensor(5.0)) / (ratio + 1)
    answer = torch.randn(5, 4, 8, 8)
    heard = []

    def network(noisy, at, ids):
        heard.append(noisy)
        return answer

    found = denoiser_stage.squared_error(network, denoiser_stage.noise_tables(CPU), z, noise, t, t)["v"]
    torch.testing.assert_close(heard[0], stock.add_noise(z, noise, t))
    error = (answer - stock.get_velocity(z, noise, t)).square().mean((1, 2, 3))
    torch.testing.assert_close(found, (weights[t] / weights.mean() * error).mean())


def test_crops_are_parts_of_their_pictures():
    images = torch.from_numpy(np.stack([np.asarray(picture(i)) for i in range(6)]).copy())
    images[..., 0] = torch.arange(192)  # the column
    images[..., 1] = torch.arange(192)[:, None]  # the row
    found = vae_stage.crops(images, torch.arange(6), 64, torch.Generator().manual_seed(1)).int()
    assert found.shape == (6, 64, 64, 3)
    assert (found[..., 2] == 7 * torch.arange(6)[:, None, None]).all()
    steps = found[:, :, 1:, 0] - found[:, :, :-1, 0]
    assert all((s == 1).all() or (s == -1).all() for s in steps)
    assert {int(s[0, 0]) for s in steps} == {1, -1}
    assert (found[:, 1:, :, 1] - found[:, :-1, :, 1] == 1).all()


def test_psnr_is_that_of_the_error():
    class Off(nn.Module):
        """A VAE that is off by 10 of 255."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def encode(self, x):
            mode = type("Posterior", (), {"mode": lambda _: x})()
            return type("Encoded", (), {"latent_dist": mode})()

        def decode(self, z):
            return type("Decoded", (), {"sample": z + 20 / 255})()

    images = torch.full((3, 192, 192, 3), 100, dtype=torch.uint8)
    assert vae_stage.psnr(Off(), images, [0, 2]) == pytest.approx([20 * math.log10(255 / 10)] * 2, abs=1e-3)


@pytest.mark.parametrize(("widths", "largest"), [(model.UNET_WIDTHS, 64e6)])
def test_the_networks_are_those_of_stable_diffusion_and_small_enough(widths, largest):
    with torch.device("meta"):
        vae = model.AutoencoderKL(
            block_out_channels=model.VAE_WIDTHS,
            **{
                "down_block_types": ("DownEncoderBlock2D",) * 4,
                "up_block_types": ("UpDecoderBlock2D",) * 4,
                "layers_per_block": 2,
                "norm_num_groups": 2,
            },
        )
        unet = model.UNet2DConditionModel(block_out_channels=widths, norm_num_groups=8, cross_attention_dim=96)
    assert 2 * sum(p.numel() for network in (vae, unet) for p in network.parameters()) < largest - 1e6
    assert list(unet.config.down_block_types) == ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
