"""The training loop of every stage: a box of minutes, averaged weights, a state that can be killed at any time.

The draws of a step come from a generator with the seed of that step, so a restart sees what an uninterrupted run would.
The learning rate goes by the share of the box that has passed: warm-up, constant, and down over its last third.
Nothing is read back from the device but every hundred steps.
"""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import speed
import state
import torch
from torch import Tensor, nn

READ_BACK = 100
Losses = dict[str, Tensor]


@dataclass
class Setting:
    """What all stages share; ``seen`` (data digest, seed) and what else names a run go into its history."""

    folder: Path
    device: torch.device
    seed: int
    data: str
    save_minutes: float
    slow_ok: bool
    compile: bool
    deadline: float = math.inf
    peak: float = 0.0
    seen: dict[str, Any] = field(default_factory=dict)


class Loop:
    """A network on its way through its box.

    Args:
        setting: Device, seed, folder.
        name: Of the stage; its state and its table of losses carry it.
        model: What is trained.
        minutes: The box.
        lr: Largest learning rate.
        shape: Facts that a state must share to be gone on from, such as widths.
        may_be_slow: Whether it goes on at any speed. The VAE does: its narrow convolutions move bytes.
    """

    def __init__(
        self,
        setting: Setting,
        name: str,
        model: nn.Module,
        minutes: float,
        lr: float,
        shape: dict[str, Any],
        may_be_slow: bool = False,
    ):
        self.may_be_slow = may_be_slow or setting.slow_ok
        self.setting, self.name, self.shape, self.lr, self.seconds = setting, name, shape, lr, 60 * minutes
        fast = torch.channels_last if setting.device.type == "cuda" else torch.contiguous_format
        self.model = model.to(setting.device, memory_format=fast).train()
        self.names = [key for key, _ in model.named_parameters()]
        self.parameters = [p for _, p in model.named_parameters()]
        self.average = [p.detach().clone() for p in self.parameters]
        rate = torch.tensor(lr, device=setting.device)
        self.optimizer = torch.optim.AdamW(self.parameters, rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.step, self.elapsed, self.history = 0, 0.0, list[dict[str, Any]]()
        setting.folder.mkdir(parents=True, exist_ok=True)
        self._restore()

    @property
    def path(self) -> Path:
        return self.setting.folder / self.name

    def _restore(self) -> None:
        found = state.read(self.path)
        if found is None:
            return
        tensors, facts = found
        state.check(self.path, facts, self.shape)
        self.step, self.elapsed, self.history = facts["step"], facts["elapsed"], facts["history"]
        with torch.no_grad():
            for name, p, average in zip(self.names, self.parameters, self.average, strict=True):
                p.copy_(tensors[f"weights/{name}"])
                average.copy_(tensors[f"average/{name}"])
                if f"exp_avg/{name}" not in tensors:
                    continue
                self.optimizer.state[p] = {
                    "step": torch.tensor(float(self.step), device=p.device),
                    **{key: tensors[f"{key}/{name}"].to(p.device) for key in ("exp_avg", "exp_avg_sq")},
                }

    def start_from(self, tensors: dict[str, Tensor]) -> None:
        """Take averaged weights of an earlier run, unless this run has a state of its own."""
        if self.step:
            return
        with torch.no_grad():
            for name, p, average in zip(self.names, self.parameters, self.average, strict=True):
                if name not in tensors or tensors[name].shape != p.shape:
                    raise SystemExit(f"The weights to start from have no {name} of shape {tuple(p.shape)}.")
                p.copy_(tensors[name])
                average.copy_(p)

    def save(self) -> None:
        """Write weights, averages, the optimizer and what was seen."""
        tensors: dict[str, Tensor] = {}
        for name, p, average in zip(self.names, self.parameters, self.average, strict=True):
            tensors |= {f"weights/{name}": p, f"average/{name}": average}
            if p in self.optimizer.state:
                tensors |= {f"{key}/{name}": self.optimizer.state[p][key] for key in ("exp_avg", "exp_avg_sq")}
        facts = {**self.shape, "step": self.step, "elapsed": self.elapsed, "history": self.history}
        state.write(self.path, tensors, facts)

    def averaged(self) -> nn.Module:
        """The network with its averaged weights."""
        with torch.no_grad():
            for p, average in zip(self.parameters, self.average, strict=True):
                p.copy_(average)
        return self.model.eval().requires_grad_(False)

    def run(
        self, sample: Callable[[int, torch.Generator], tuple[Tensor, ...]], loss_of: Callable[..., Losses]
    ) -> nn.Module:
        """Go on until the box or the deadline ends.

        Args:
            sample: Step and its generator -> what the step sees, on the device.
            loss_of: That -> named losses; their sum is minimised.

        Raises:
            SystemExit: A loss is not finite, or the device is too slow.
        """
        left = min(self.seconds - self.elapsed, self.setting.deadline - time.monotonic())
        if left <= 0:
            if not self.path.exists():  # weights to start from are the result
                self.save()
            return self.averaged()
        self.seconds = self.elapsed + left  # a deadline shortens the box, and the learning rate knows it
        device, generator = self.setting.device, torch.Generator(self.setting.device)
        self.history.append(
            {**self.setting.seen, "data": self.setting.data, "seed": self.setting.seed, "from": self.step}
        )
        clock = Clock(self, loss_of)
        shapes = [sample(step, generator.manual_seed(0)) for step in (0, 1)]  # the last stage has two
        loss_of = compiled(loss_of, shapes, self.optimizer, self.setting)
        clock.start()
        sums: Losses = {}
        while self.elapsed < self.seconds:
            batch = sample(self.step, generator.manual_seed(self.setting.seed * 1_000_003 + self.step))
            losses = self._update(loss_of, batch)
            for key, value in losses.items():
                sums[key] = sums.get(key, torch.zeros((), device=device)) + value.detach()
            clock.tick(batch)
            if self.step % READ_BACK == 0 or self.elapsed >= self.seconds:
                self._log({key: value.item() for key, value in sums.items()}, clock.counted)
                clock.counted, sums = 0, {}
        self.save()
        return self.averaged()

    def _update(self, loss_of: Callable[..., Losses], batch: tuple[Tensor, ...]) -> Losses:
        share = self.elapsed / self.seconds
        warm = min(1.0, (self.step + 1) / 100)
        self.optimizer.param_groups[0]["lr"].fill_(self.lr * warm * min(1.0, max(0.02, (1 - share) / 0.35)))
        if self.setting.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        losses = loss_of(*batch)
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1 - min(0.9995, (1 + self.step) / (10 + self.step)))
        self.step += 1
        return losses

    def _log(self, sums: dict[str, float], steps: int) -> None:
        means = {key: value / max(1, steps) for key, value in sums.items()}
        if not all(math.isfinite(value) for value in means.values()):
            raise SystemExit(
                f"{self.name}: a loss is not finite at step {self.step}: {means}. {self.path} holds the last state."
            )
        table = self.setting.folder / f"{self.name}.csv"
        rows = list(csv.reader(table.open()))[1:] if table.is_file() else []
        rows = [row for row in rows if int(row[0]) < self.step]  # what a restart does again
        rows.append([str(self.step), f"{self.elapsed:.1f}", *(f"{v:.6g}" for v in means.values())])
        with table.open("w", newline="") as file:
            csv.writer(file).writerows([["step", "seconds", *means], *rows])
        told = "  ".join(f"{key} {value:.4f}" for key, value in means.items())
        print(f"{self.name} step {self.step}, {self.elapsed:.0f} of {self.seconds:.0f} s: {told}", flush=True)


class Clock:
    """Keeps a loop's time, saves it every few minutes, and says once how fast it is."""

    def __init__(self, loop: Loop, loss_of: Callable[..., Losses]):
        self.loop, self.loss_of, self.told = loop, loss_of, False
        self.counted, self.steps, self.items, self.operations = 0, 0, 0, 0.0
        self.known: dict[Any, float] = {}

    def start(self) -> None:
        self.since = self.saved = time.monotonic()
        self.last = speed.worked(self.loop.setting.device)

    def tick(self, batch: tuple[Tensor, ...]) -> None:
        """After a step."""
        loop, now, worked = self.loop, time.monotonic(), speed.worked(self.loop.setting.device)
        self.counted, self.steps, self.items = self.counted + 1, self.steps + 1, self.items + len(batch[0])
        self.operations += self._operations(batch)
        loop.elapsed, self.last = loop.elapsed + worked - self.last, worked
        if not self.told and now - self.since >= speed.WARM_UP:
            self._tell()
        if now - self.saved > 60 * loop.setting.save_minutes:
            loop.save()
            self.saved = time.monotonic()

    def _tell(self) -> None:
        setting = self.loop.setting
        speed.synchronize(setting.device)
        spent = time.monotonic() - self.since
        told = speed.judge(self.operations / spent / 1e12, setting.peak, setting.device, self.loop.may_be_slow)
        rates = f"{self.steps / spent:.3g} steps/s, {self.items / spent:.4g} pictures/s"
        print(f"{self.loop.name}: {rates}, {told}", flush=True)
        self.told = True

    def _operations(self, batch: tuple[Tensor, ...]) -> float:
        """Operations of a step on such a batch, counted once for every shape."""
        shape = batch[0].shape
        if shape not in self.known:
            self.known[shape] = len(batch[0]) * speed.operations(self.loss_of, *(t[:1] for t in batch))
        return self.known[shape]


MODES = ("reduce-overhead", "default")
"""Of ``torch.compile``; the first replays CUDA graphs."""


def compiled(
    loss_of: Callable[..., Losses], shapes: list[tuple[Tensor, ...]], optimizer: torch.optim.Optimizer, setting: Setting
) -> Callable[..., Losses]:
    """``loss_of`` compiled in the first mode that works here, which is named; as it is where ``compile`` is off."""
    if not setting.compile:
        return loss_of
    for mode in MODES if setting.device.type == "cuda" else MODES[1:]:
        since = time.monotonic()
        try:
            fast = torch.compile(loss_of, mode=mode, dynamic=False)
            for batch in [batch for batch in shapes for _ in range(3)]:  # the second and third call record and replay
                if setting.device.type == "cuda":
                    torch.compiler.cudagraph_mark_step_begin()
                torch.stack(list(fast(*batch).values())).sum().backward()
                optimizer.zero_grad()
        except Exception as error:  # whatever a compiler raises, training goes on without it
            told = f"{error!r:.300}"
            print(f"torch.compile, mode {mode}, failed after {time.monotonic() - since:.0f} s: {told}", flush=True)
            torch._dynamo.reset()
            optimizer.zero_grad()
        else:
            print(f"torch.compile, mode {mode}: {time.monotonic() - since:.0f} s", flush=True)
            return fast
    print("training goes on without torch.compile", flush=True)
    return loss_of
