"""Where a run stands on its scheduler's timesteps, and how much noise there is; known on the host, without a wait."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Level:
    """A noisy sample is ``signal * clean + noise * n``, with ``n`` standard normal."""

    signal: float
    noise: float

    @property
    def sigma(self) -> float:
        """Noise per signal, as in variance-exploding samplers."""
        return self.noise / self.signal if self.signal else float("inf")


SCALED_LINEAR = (0.00085**0.5, 0.012**0.5)  # roots of the first and last beta of Stable Diffusion's training


def timesteps_of(scheduler: Any) -> list[float]:
    """A scheduler's timesteps, of 1000.

    Models that were trained on noise levels (EDM: Playground v2.5; CosXL) have timesteps of another kind, a function of sigma.
    They count as those at which Stable Diffusion sees as much noise; beyond its noisiest, as 999.
    """
    config, given = scheduler.config, scheduler.timesteps.tolist()
    continuous = config.get("timestep_type") == "continuous" and config.get("prediction_type") == "v_prediction"
    if not continuous and not hasattr(scheduler, "precondition_noise"):
        return [t * 1000 / config.num_train_timesteps for t in given]
    alphas = torch.cumprod(1 - torch.linspace(*SCALED_LINEAR, 1000, dtype=torch.float64) ** 2, 0)
    trained = ((1 - alphas) / alphas).log() / 2
    sought = scheduler.sigmas[: len(given)].cpu().double().log()
    above = torch.searchsorted(trained, sought).clamp(1, 999)
    part = (sought - trained[above - 1]) / (trained[above] - trained[above - 1])
    return (above - 1 + part).clamp(0, 999).tolist()


class Clock:
    """The timesteps of a run and the position on them.

    Attributes:
        unscheduled: no scheduler tells the timestep (a bare denoiser).
        timesteps: of 1000, one per call of the denoiser with its own.
        position: of the next call.
        steps: that the scheduler has made.
    """

    def __init__(self, unscheduled: bool = False) -> None:
        self.unscheduled = unscheduled
        self.timesteps: list[float] = []
        self.position = self.steps = 0
        self.scheduler: Any = None
        self._probe: _Probe | None = None

    def rewind(self) -> None:
        """A run begins; its timesteps are not known yet."""
        self.timesteps, self.position, self.steps = [], 0, 0

    def schedule(self, scheduler: Any) -> None:
        """The scheduler has laid out its timesteps. The only read from the device, before the loop begins."""
        self.timesteps = timesteps_of(scheduler)
        self.scheduler, self._probe = scheduler, None

    def within(self, window: tuple[float, float]) -> bool:
        """Whether the next call's timestep lies in ``(low, high)``, of 1000, both included."""
        return self.position < len(self.timesteps) and window[0] <= self.timesteps[self.position] <= window[1]

    def locate(self, timestep: Any) -> int | None:
        """Where on the scheduler's timesteps one that was taken from them lies, told by its address: no read from the device."""
        table = self.scheduler.timesteps
        if not isinstance(timestep, Tensor) or timestep.ndim:
            return None
        if timestep.untyped_storage().data_ptr() != table.untyped_storage().data_ptr():
            return None
        return (timestep.storage_offset() - table.storage_offset()) // table.stride(0)

    def level(self, position: int) -> Level:
        """Of the sample as the pipeline holds it before the step at ``position``; past the last, what the scheduler ends at."""
        return self._asked().level(position)

    def seen(self, position: int) -> tuple[float, float, float]:
        """``(signal, noise, scale of a clean sample)`` as the denoiser is given it at ``position``."""
        return self._asked().seen(position)

    def _asked(self) -> _Probe:
        if self._probe is None:
            self._probe = _Probe(self.scheduler)
        return self._probe


class _Probe:
    """What a scheduler makes of signal and noise, found by asking it.

    Every sampler is linear in both, so two numbers and the scale of a clean sample say all. Asked on a copy on the CPU:
    the scheduler's own counters stay as they are, and nothing waits for the device.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = copy.deepcopy(scheduler)
        for name, value in vars(self.scheduler).items():
            if isinstance(value, Tensor):
                setattr(self.scheduler, name, value.cpu())

    def seen(self, position: int) -> tuple[float, float, float]:
        t = self.scheduler.timesteps[position]
        signal, noise = self._scaled(self._noised(t), t).flatten().tolist()
        return signal, noise, self._scaled(torch.ones(1, 1), t).item()

    def level(self, position: int) -> Level:
        scheduler = self.scheduler
        if position >= len(scheduler.timesteps):
            return self._last()
        t = scheduler.timesteps[position]
        signal, noise = self._noised(t).flatten().tolist()
        cumulative = getattr(scheduler, "alphas_cumprod", None)
        if cumulative is not None and not t.is_floating_point():
            exact = float(cumulative[int(t)])  # the scheduler takes roots of it in float32; where they agree, this has more digits
            if abs(exact - signal**2) < 1e-6 and abs(1 - exact - noise**2) < 1e-6:
                return Level(exact**0.5, (1 - exact) ** 0.5)
        return Level(signal, noise)

    def _last(self) -> Level:
        scheduler = self.scheduler
        if getattr(scheduler, "sigmas", None) is not None:
            sigma = float(scheduler.sigmas[-1])
            signal, noise = self._noised(scheduler.timesteps[-1]).flatten().tolist()
            flow = abs(signal + noise - 1) < 1e-6
            return Level(1 - sigma, sigma) if flow else Level(1.0, sigma)
        end = float(getattr(scheduler, "final_alpha_cumprod", 1.0))
        return Level(end**0.5, (1 - end) ** 0.5)

    def _noised(self, t: Tensor) -> Tensor:
        self._rewind()
        signal, noise = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        if hasattr(self.scheduler, "scale_noise"):
            return self.scheduler.scale_noise(signal, t.view(1), noise)
        return self.scheduler.add_noise(signal, noise, t.view(1))

    def _scaled(self, sample: Tensor, t: Tensor) -> Tensor:
        if not hasattr(self.scheduler, "scale_model_input"):
            return sample
        self._rewind()
        return self.scheduler.scale_model_input(sample, t)

    def _rewind(self) -> None:
        for name in ("_step_index", "_begin_index"):
            if hasattr(self.scheduler, name):
                setattr(self.scheduler, name, None)
