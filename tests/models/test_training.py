"""Training can be stopped and continued to the same bits; a damaged or foreign resume file is refused."""

from __future__ import annotations

import dataclasses
import os
import signal
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from typer import Typer
from typer.testing import CliRunner

from negengine.models import manifest
from negengine.models import train as command
from negengine.models.dataset import GeneratorTask, LatentDigits
from negengine.models.flux import FluxTask
from negengine.models.sdxl import SdxlTask
from negengine.models.training import Recipe, Task, train

RECIPE = Recipe(steps=6, batch=2, lr=1e-2, warmup=2, save_every=2)


class Line(Task):
    """A linear fit."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(3, 1)

    def loss(self, batch: int, generator: torch.Generator) -> Tensor:
        x = torch.randn(batch, 3, generator=generator)
        return (self.map(x).float() - x.sum(1, keepdim=True)).square().mean()


def line(**_: object) -> Line:
    torch.manual_seed(0)
    return Line()


def generator_task(kind: type[GeneratorTask]) -> GeneratorTask:
    latents = torch.randn(1, 10, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    return kind(LatentDigits(latents, torch.arange(10), [("thin",)] * 10))


def interrupt_at(step: int):
    def on_step(done: int, _: Task) -> None:
        if done == step:
            os.kill(os.getpid(), signal.SIGINT)

    return on_step


def same(a: nn.Module, b: nn.Module) -> bool:
    other = b.state_dict()
    return all(torch.equal(value, other[key]) for key, value in a.state_dict().items())


@pytest.mark.parametrize("kind", [FluxTask, pytest.param(SdxlTask, marks=pytest.mark.exhaustive)])
def test_interrupted_and_continued_gives_the_same_bits(kind: type[GeneratorTask], tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, save_every=100)
    whole = generator_task(kind)
    whole_average = train(whole, recipe, tmp_path / "whole.pt")
    with pytest.raises(KeyboardInterrupt, match="3 of 6"):
        train(generator_task(kind), recipe, tmp_path / "cut.pt", on_step=interrupt_at(3))
    resumed = generator_task(kind)
    before = {key: value.clone() for key, value in resumed.state_dict().items()}
    resumed_average = train(resumed, recipe, tmp_path / "cut.pt")
    assert same(whole, resumed)
    assert same(whole_average, resumed_average)
    assert not same(whole, whole_average)
    assert all(not torch.equal(before[key], value) for key, value in whole.state_dict().items() if key.endswith("q.weight"))


def test_a_crash_costs_the_steps_since_the_last_file_only(tmp_path: Path) -> None:
    def crash(done: int, _: Task) -> None:
        if done == 5:
            raise OSError("power cut")

    with pytest.raises(OSError, match="power cut"):
        train(line(), RECIPE, tmp_path / "cut.pt", on_step=crash)
    steps: list[int] = []
    resumed = train(line(), RECIPE, tmp_path / "cut.pt", on_step=lambda done, _: steps.append(done))
    assert steps == [5, 6]
    assert same(resumed, train(line(), RECIPE, tmp_path / "whole.pt"))


def test_a_finished_training_returns_at_once(tmp_path: Path) -> None:
    first = train(line(), RECIPE, tmp_path / "line.pt")
    steps: list[int] = []
    assert same(first, train(line(), RECIPE, tmp_path / "line.pt", on_step=lambda done, _: steps.append(done)))
    assert steps == []


def test_truncated_resume_file_is_told(tmp_path: Path) -> None:
    file = tmp_path / "line.pt"
    train(line(), RECIPE, file)
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(RuntimeError, match=r"line\.pt is damaged .*delete it"):
        train(line(), RECIPE, file)


def test_another_recipe_is_refused(tmp_path: Path) -> None:
    train(line(), RECIPE, tmp_path / "line.pt")
    with pytest.raises(RuntimeError, match="another recipe"):
        train(line(), dataclasses.replace(RECIPE, seed=1), tmp_path / "line.pt")


def test_another_model_is_refused(tmp_path: Path) -> None:
    train(line(), RECIPE, tmp_path / "line.pt")
    wider = line()
    wider.map = nn.Linear(4, 1)
    with pytest.raises(RuntimeError, match="another model"):
        train(wider, RECIPE, tmp_path / "line.pt")


def test_learning_rate_warms_up_and_falls() -> None:
    recipe = dataclasses.replace(RECIPE, steps=100, warmup=10)
    rates = [recipe.lr_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(recipe.lr / 10)
    assert max(rates) == pytest.approx(recipe.lr)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.02 * recipe.lr


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch):
    """The command on thirty digits and a short lesson of the text encoders, which takes 40 s in full."""
    everything = command.split

    def few(part: str):
        digits = everything(part)
        rows = torch.arange(0, len(digits.labels), len(digits.labels) // 30)
        return type(digits)(digits.images[rows], digits.labels[rows], digits.rows[rows])

    monkeypatch.setattr(command, "split", few)
    for task in (FluxTask, SdxlTask):
        monkeypatch.setattr(task, "prepare", partialmethod(task.prepare, steps=4))
    app = Typer()
    app.command()(command.main)

    def run(output: Path, model: str, *more: str):
        small = ["--steps", "4", "--batch", "2", "--autoencoder-steps", "2", "--variants", "1"]
        return CliRunner().invoke(app, ["--output", str(output), "--model", model, *small, *more])

    return run


@pytest.mark.parametrize("name", ["mnist-flux", pytest.param("mnist-sdxl", marks=pytest.mark.exhaustive)])
def test_command_trains_what_loads(cli, name: str, tmp_path: Path) -> None:
    result = cli(tmp_path, name)
    assert result.exit_code == 0, result.output
    manifest.verify(tmp_path / name)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / name)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("7", height=32, width=32, num_inference_steps=1).images[0].size == (32, 32)


@pytest.mark.exhaustive
@pytest.mark.parametrize("model, task", [("mnist-flux", FluxTask), ("mnist-sdxl", SdxlTask)])
def test_command_continues_after_an_interrupt_to_the_same_file(
    cli, model: str, task: type[GeneratorTask], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli(tmp_path / "whole", model).exit_code == 0
    loss, calls = task.loss, []

    def interrupted_loss(self: GeneratorTask, batch: int, generator: torch.Generator) -> Tensor:
        calls.append(batch)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(self, batch, generator)

    monkeypatch.setattr(task, "loss", interrupted_loss)
    stopped = cli(tmp_path / "cut", model)
    assert stopped.exit_code == 130
    assert "stopped after 2 of 4 steps; the same command continues" in stopped.output
    assert not (tmp_path / "cut" / model).exists()
    assert cli(tmp_path / "cut", model).exit_code == 0
    assert len(calls) == 4
    files = [(tmp_path / run / model / manifest.FILE).read_text() for run in ("whole", "cut")]
    assert files[0] == files[1]


def test_command_trains_the_classifier(cli, tmp_path: Path) -> None:
    assert cli(tmp_path, "mnist-classifier").exit_code == 0
    manifest.verify(tmp_path / "mnist-classifier")


def test_command_tells_a_damaged_resume_file(cli, tmp_path: Path) -> None:
    (tmp_path / "resume").mkdir()
    (tmp_path / "resume" / "autoencoder.pt").write_bytes(b"half")
    result = cli(tmp_path, "mnist-sdxl")
    assert result.exit_code == 1
    assert "autoencoder.pt is damaged" in result.output
