"""Which noise schedules are read, and that their levels are those of the stock schedulers."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler

import diffusion_backbones as db
from diffusion_backbones.ops.noise import RectifiedFlow, VariancePreserving
from diffusion_backbones.spec.configs import CONFIGS, is_flow
from diffusion_backbones.spec.schedule import FLOWS, VARIANCE_PRESERVING, check_schedule, noise_level

pytestmark = pytest.mark.usefixtures("costs_not_measured")

SD = {
    "_class_name": "PNDMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
TIMES = (0, 1, 50, 261, 998)


BUILT = [name for name in VARIANCE_PRESERVING if name != "DPMSolverSDEScheduler"]  # which is not built without torchsde


@pytest.mark.parametrize("name", BUILT)
def test_every_known_class_has_the_marginal_that_is_computed(name):
    config = SD | {"_class_name": name}
    known = inspect.signature(getattr(diffusers, name)).parameters
    stock = getattr(diffusers, name)(**{key: value for key, value in config.items() if key in known}).alphas_cumprod
    process = VariancePreserving.from_config(config)
    for t in TIMES:
        expected = (float(stock[t]) ** 0.5, (1 - float(stock[t])) ** 0.5)
        assert process.levels(t) == pytest.approx(expected, rel=1e-5)
        assert noise_level(config, t) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", FLOWS)
def test_every_known_flow_mixes_along_a_straight_line(name):
    """Where the schedule is not shifted, noise times sigma at each of its timesteps."""
    scheduler = getattr(diffusers, name)(num_train_timesteps=1000, shift=1.0)
    scheduler.set_timesteps(10)
    for t, sigma in zip(scheduler.timesteps.tolist(), scheduler.sigmas.tolist(), strict=False):
        assert RectifiedFlow().levels(t) == pytest.approx((1 - sigma, sigma), abs=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"beta_schedule": "linear"},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "sigmoid"},
        {"beta_schedule": "laplace"},
        {"rescale_betas_zero_snr": True},
        {"trained_betas": [1e-4 * (1 + i / 100) for i in range(1000)]},
        {"num_train_timesteps": 1500},
    ],
)
def test_levels_in_plain_floats_are_those_of_the_stock_scheduler(changes):
    config = SD | {"_class_name": "DDPMScheduler"} | changes
    stock = DDPMScheduler(**{key: value for key, value in config.items() if key != "_class_name"}).alphas_cumprod
    for t in TIMES:
        expected = (float(stock[t]) ** 0.5, (1 - float(stock[t])) ** 0.5)
        assert noise_level(config, t) == pytest.approx(expected, rel=1e-3, abs=1e-6)
        assert VariancePreserving.from_config(config).levels(t) == pytest.approx(expected, rel=1e-6)


def test_flow_sigmas_make_a_flow_of_any_solver():
    assert is_flow(SD | {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True})
    assert not is_flow(SD | {"use_flow_sigmas": False})


NAN = float("nan")
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler"),
    ({"_class_name": "EDMDPMSolverMultistepScheduler"}, "EDMDPMSolverMultistepScheduler"),
    ({"_class_name": "ScoreSdeVeScheduler"}, "ScoreSdeVeScheduler"),
    ({"_class_name": "CogVideoXDDIMScheduler"}, "CogVideoXDDIMScheduler"),
    ({"_class_name": "SCMScheduler"}, "SCMScheduler"),
    ({"_class_name": ...}, "_class_name None"),
    ({"_class_name": ["DDPMScheduler"]}, "_class_name"),
    ({"beta_start": ...}, "has no beta_start"),
    ({"beta_end": ...}, "has no beta_end"),
    ({"beta_schedule": ...}, "has no beta_schedule"),
    ({"num_train_timesteps": ...}, "has no num_train_timesteps"),
    ({"num_train_timesteps": "1000"}, "num_train_timesteps '1000'"),
    ({"num_train_timesteps": 10**12}, "num_train_timesteps"),
    ({"beta_start": 5.0}, "beta_start 5.0"),
    ({"beta_start": -0.1}, "beta_start -0.1"),
    ({"beta_start": 0.5}, "beta_start 0.5.*beta_end"),
    ({"beta_end": NAN}, "beta_end nan"),
    ({"beta_end": True}, "beta_end True"),
    ({"beta_schedule": "exp"}, "beta_schedule 'exp'"),
    ({"beta_schedule": 3}, "beta_schedule 3"),
    ({"trained_betas": [0.1, 0.2]}, "trained_betas.*1000"),
    ({"trained_betas": [2.0] * 1000}, "trained_betas"),
    ({"_class_name": FLOWS[0], "num_train_timesteps": 100}, "num_train_timesteps 100"),
    ({"_class_name": FLOWS[0], "invert_sigmas": True}, "invert_sigmas"),
    ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "timestep_type.*'discrete'"),
]


@pytest.mark.parametrize(("changes", "said"), WRONG)
def test_a_schedule_that_is_not_stated_is_refused_by_key(changes, said):
    config = {key: value for key, value in (SD | changes).items() if value is not ...}
    with pytest.raises(ValueError, match=f"scheduler_config.json has .*{said}|scheduler_config.json {said}"):
        check_schedule(config)


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(CONFIGS / "tinysd", tmp_path / "tinysd"))


def test_an_unknown_schedule_is_refused_at_build_and_not_without_noise(folder):
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"_class_name": "EDMEulerScheduler", "sigma_data": 0.5}))
    with pytest.raises(ValueError, match=f"{folder}.*EDMEulerScheduler.*noise='none'"):
        db.create_model("tinysd_gdf", checkpoint_path=folder)
    backbone = db.create_model("tinysd_gdf", checkpoint_path=folder, noise="none")
    expected = db.create_model("tinysd_gdf", pretrained=True, noise="none")
    x = torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64)
    for a, b in zip(backbone(x), expected(x), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="EDMEulerScheduler"):
        backbone(x, noise="fixed")
    saved = backbone.save_pretrained(folder.parent / "saved")
    assert torch.equal(db.create_model(f"local-dir:{saved}")(x)[0], backbone(x)[0])
