"""Timesteps of samplers that do not count them."""

import diffusers
import pytest
import torch
from tiny import BETAS, draw, sdxl

import negengine
from negengine.diffusers.clock import timesteps_of

LEVELS = {"sigma_min": 0.002, "sigma_max": 80.0}
COSXL = {"timestep_type": "continuous", "prediction_type": "v_prediction", "sigma_min": 0.002, "sigma_max": 120.0}
CONTINUOUS = {
    "EDM Euler": lambda: diffusers.EDMEulerScheduler(**LEVELS),
    "EDM DPM-Solver": lambda: diffusers.EDMDPMSolverMultistepScheduler(**LEVELS),
    "CosXL": lambda: diffusers.EulerDiscreteScheduler(**BETAS, **COSXL, use_karras_sigmas=True),
}


@pytest.mark.parametrize("name", CONTINUOUS)
def test_as_much_noise_counts_as_the_timestep_of_stable_diffusion(name):
    scheduler = CONTINUOUS[name]()
    scheduler.set_timesteps(12)
    found = timesteps_of(scheduler)
    alphas = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod.double()
    trained = ((1 - alphas) / alphas).sqrt()
    assert len(found) == len(scheduler.timesteps)
    for t, sigma in zip(found, scheduler.sigmas.tolist(), strict=False):
        if sigma > trained[-1]:
            assert t == 999
        elif sigma < trained[0]:
            assert t == 0
        else:
            assert trained[int(t)] <= sigma * (1 + 1e-6)
            assert sigma <= trained[min(int(t) + 1, 999)] * (1 + 1e-6)
    assert found == sorted(found, reverse=True)
    assert found[0] == 999


def test_a_sampler_that_counts_them_is_believed():
    scheduler = diffusers.EulerDiscreteScheduler(**BETAS)
    scheduler.set_timesteps(7)
    assert timesteps_of(scheduler) == scheduler.timesteps.tolist()


@pytest.mark.parametrize("name, active", [("EDM Euler", 3), ("CosXL", 4)])
def test_the_early_steps_merge(name, active):
    pipe = sdxl()
    pipe.scheduler = CONTINUOUS[name]()
    plain = draw(pipe, num_inference_steps=8)
    negengine.apply(pipe, negengine.NegToMe(threshold=-1, min_grid=1, timesteps=(800, 1000)))
    assert not torch.equal(draw(pipe, num_inference_steps=8), plain)
    status = negengine.status(pipe)[negengine.NegToMe]
    assert (status.steps, status.active_steps) == (8, active)
