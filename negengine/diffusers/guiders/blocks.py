"""Blocks around a modular pipeline's own: they encode the prompt to avoid and hear the scheduler; no stock block is rewritten."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from diffusers import ClassifierFreeGuidance, ModularPipeline
from diffusers.configuration_utils import FrozenDict
from diffusers.modular_pipelines import LoopSequentialPipelineBlocks, ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline import PipelineState
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam, OutputParam
from torch import Tensor

from negengine.diffusers.effects.transition import check_scheduler
from negengine.diffusers.guiders.guider import NegativeGuider, Settings
from negengine.diffusers.listen import MethodListener
from negengine.diffusers.observers import tell
from negengine.diffusers.prompts import a_row_per_image
from negengine.diffusers.report import Status
from negengine.methods import DynamicNegativeGuidance
from negengine.methods.prompts import Embeddings, Prompt

logger = logging.getLogger("negengine")
Target = TypeVar("Target", bound="ModularPipelineBlocks | ModularPipeline")

AVOIDED, UNCONDITIONAL = "avoided_", "unguided_"
BASE = ("guidance_scale", "guidance_rescale", "use_original_formulation", "start", "stop")
ENCODED = ("prompt_embeds", "pooled_prompt_embeds")


@dataclass(frozen=True)
class ModularFamily:
    """What the blocks of a family call things.

    Attributes:
        title: the family's name.
        conditioning: outputs of its text encoder -> what its denoiser calls them.
        guided: whether its denoiser asks a guider which branches to compute.
    """

    title: str
    conditioning: Mapping[str, str]
    guided: bool


FAMILIES = {
    "stable-diffusion-xl": ModularFamily("SDXL", dict(zip(ENCODED, ("prompt_embeds", "text_embeds"), strict=True)), True),
    "flux": ModularFamily("FLUX.1", dict(zip(ENCODED, ENCODED, strict=True)), False),
}


def with_negative_guidance(target: Target, settings: Settings, **guidance: Any) -> Target:
    """Modular blocks, or a modular pipeline, with dynamic negative guidance or negative prompting. ``target`` stays as it is.

    Args:
        target: blocks of SDXL or FLUX.1 (``StableDiffusionXLAutoBlocks()``, a workflow of them, a denoising loop), or a pipeline of
            such blocks. What was put on it before by this function is replaced.
        settings: :class:`DynamicNegativeGuidance` or :class:`NegativePrompting`.
        guidance: of the base: the further arguments of :class:`NegativeGuider`. A pipeline's own ``ClassifierFreeGuidance`` is
            taken over where they are left out. FLUX.1 takes ``cfg`` in ``settings`` instead.

    Returns:
        A copy of the blocks, whose pipelines make a :class:`NegativeGuider` for themselves; or a pipeline that shares the models
        and scheduler of ``target``. After a run, its ``guider.report`` tells what was done.

    Raises:
        TypeError: no modular blocks or pipeline, or settings of another method.
        ValueError: blocks of no known family; a scheduler without a transition density (see ``surrogate``); settings that cannot
            work with these blocks; a pipeline with another guider, whose base guidance would be lost.
    """
    if isinstance(target, ModularPipeline):
        return _pipeline(target, settings, guidance)
    if not isinstance(target, ModularPipelineBlocks):
        raise TypeError(
            f"modular blocks or a modular pipeline are needed, got {type(target).__name__}; other pipelines take negengine.apply"
        )
    blocks = copy.deepcopy(target)
    found = _families(blocks)
    guider = _guider(settings, guidance, found)
    return _around(blocks, _GuiderSpec(guider))


def _pipeline(pipe: Any, settings: Settings, guidance: Mapping[str, Any]) -> Any:
    blocks = pipe.blocks  # a copy
    families = _families(blocks)
    if all(family.guided for family in families):
        guidance = _base_of(pipe.guider, guidance)
    guider = _guider(settings, guidance, families)
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is not None and isinstance(settings, DynamicNegativeGuidance):
        check_scheduler(scheduler, settings.surrogate, settings.variance)
    spec = _GuiderSpec(guider)
    made = copy.copy(pipe)
    made._blocks = _around(blocks, spec)
    made._component_specs = {**pipe._component_specs, "guider": spec}
    made._config_specs = copy.deepcopy(pipe._config_specs)
    made.update_components(guider=guider)
    return made


def _base_of(guider: Any, guidance: Mapping[str, Any]) -> Mapping[str, Any]:
    """The base guidance of a pipeline, with changes."""
    if type(guider) in (ClassifierFreeGuidance, NegativeGuider):
        return {name: guider.config[name] for name in BASE} | dict(guidance)
    if not guidance and guider is not None:
        raise ValueError(
            f"the pipeline guides with {type(guider).__name__}, but the base of NegativeGuider is classifier-free guidance; say "
            "which: with_negative_guidance(pipe, settings, guidance_scale=...)"
        )
    return guidance


def _guider(settings: Settings, guidance: Mapping[str, Any], families: list[ModularFamily]) -> NegativeGuider:
    for family in families:
        cfg = getattr(settings, "cfg", None)
        if family.guided and cfg is not None:
            raise ValueError(f"{family.title} guides by itself; leave `cfg` out and pass guidance_scale to with_negative_guidance")
        if not family.guided:
            if guidance:
                raise ValueError(f"{family.title} has no {', '.join(guidance)}; {type(settings).__name__}(cfg=...) guides its base")
            guidance = {"guidance_scale": 1.0 if cfg is None else cfg}
    return NegativeGuider(settings, **guidance)


# --- finding and replacing -------------------------------------------------------------------------------------------


def _families(blocks: ModularPipelineBlocks) -> list[ModularFamily]:
    """Of the blocks that there is something to do at. Raises ValueError where there are none."""
    names = {block.model_name for block in _within(blocks) if _is_loop(block) or _is_encoder(block)}
    if not names or names - set(FAMILIES):
        what = (
            f"model_name {', '.join(sorted(map(repr, names - set(FAMILIES))))}"
            if names
            else "no text encoder and no denoising loop"
        )
        raise ValueError(
            f"{type(blocks).__name__} has {what}; negative guidance knows modular blocks of {', '.join(map(repr, FAMILIES))}. "
            "negengine.apply puts it on other pipelines than modular ones"
        )
    return [FAMILIES[name] for name in names]


def _within(block: ModularPipelineBlocks) -> list[ModularPipelineBlocks]:
    """A block and all blocks in it."""
    return [block] + [found for part in block.sub_blocks.values() for found in _within(part)]


def _is_loop(block: ModularPipelineBlocks) -> bool:
    return isinstance(block, LoopSequentialPipelineBlocks) and "denoiser" in block.sub_blocks


def _is_encoder(block: ModularPipelineBlocks) -> bool:
    return not block.sub_blocks and "prompt" in block.input_names and "prompt_embeds" in block.intermediate_output_names


def _around(block: Any, spec: ComponentSpec) -> Any:
    """The block, or another in its place; the blocks in it are replaced where they are."""
    block = _stock(block)
    if _is_loop(block):
        return GuidedLoop(block, spec)
    if _is_encoder(block):
        return AvoidingEncoder(block, spec)
    for name, part in block.sub_blocks.items():
        block.sub_blocks[name] = _around(part, spec)
    return block


def _stock(block: Any) -> Any:
    """What a block stands for: that which is replaced when guidance is put on anew."""
    return block.block if isinstance(block, Around) else block


class _GuiderSpec(ComponentSpec):
    """Of the guider that a pipeline makes for itself.

    Of specs that are equal, the first in a pipeline wins, and of others the last. Blocks that are not replaced may ask for a stock
    guider, but none after the last loop: so this one equals no other.
    """

    def __init__(self, guider: NegativeGuider) -> None:
        super().__init__("guider", type(guider), config=FrozenDict(guider.config), default_creation_method="from_config")

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = ComponentSpec.__hash__


# --- the blocks ------------------------------------------------------------------------------------------------------


class Around(ModularPipelineBlocks):
    """A block that stands for another, which it calls."""

    def __init__(self, block: Any, spec: ComponentSpec) -> None:
        super().__init__()
        self.block, self._spec = block, spec

    @property
    def model_name(self) -> Any:
        return self.block.model_name

    @property
    def family(self) -> ModularFamily:
        return FAMILIES[self.model_name]

    @property
    def description(self) -> str:
        return f"{self.block.description}\nWith negative guidance."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [*(spec for spec in self.block.expected_components if spec.name != "guider"), copy.copy(self._spec)]

    @property
    def expected_configs(self) -> list[Any]:
        return self.block.expected_configs

    @property
    def inputs(self) -> list[InputParam]:
        return self.block.inputs

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return self.block.intermediate_outputs

    def guider(self, components: Any) -> NegativeGuider:
        guider = getattr(components, "guider", None)
        if not isinstance(guider, NegativeGuider):
            raise TypeError(
                f"these blocks need a NegativeGuider, but the pipeline's guider is {type(guider).__name__}; "
                "pipe.update_components(guider=NegativeGuider(settings)), or make the pipeline from the blocks without it"
            )
        return guider


class AvoidingEncoder(Around):
    """A text encoder that encodes the prompt to avoid too, and the unconditional one of a family without a guider."""

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [*self.block.intermediate_outputs, *(_parameter(OutputParam, name) for name in _names())]

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        guider = self.guider(components)
        components, state = self.block(components, state)
        for prefix, prompt in _prompts(guider.settings).items():
            found: Mapping[str, Any] = {}
            if prompt is not None and not isinstance(prompt, Embeddings):
                found = self._encode(components, state, prompt)
            for name in ENCODED:
                state.set(prefix + name, found.get(name), "denoiser_input_fields")
        return components, state

    def _encode(self, components: Any, state: PipelineState, prompt: str | tuple[str, ...]) -> dict[str, Any]:
        """Another prompt as the call's own: with the same settings of the encoder."""
        prompts = len(state.get("prompt_embeds"))
        texts = [prompt] * prompts if isinstance(prompt, str) else list(prompt)
        if len(texts) != prompts:
            raise ValueError(f"{len(texts)} prompts to avoid, but this call has {prompts}; give one, or one for each")
        other = PipelineState()
        for name in self.block.input_names:
            if "prompt" not in name:
                other.set(name, state.get(name))
        other.set("prompt", texts)
        other = self.block(components, other)[1]
        return {name: other.get(name) for name in ENCODED}


class GuidedLoop(Around, LoopSequentialPipelineBlocks):
    """A denoising loop during which the guider is told of the prompt to avoid and of the scheduler's steps."""

    def __init__(self, block: Any, spec: ComponentSpec) -> None:
        super().__init__(block, spec)
        if not FAMILIES[block.model_name].guided:
            block.sub_blocks["denoiser"] = BranchingDenoiser(_stock(block.sub_blocks["denoiser"]), spec)
        self.sub_blocks = block.sub_blocks  # the same: what a user changes here is changed there

    @property
    def inputs(self) -> list[InputParam]:
        return [*self.block.inputs, *(_parameter(InputParam, name) for name in _names())]

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        guider, scheduler = self.guider(components), components.scheduler
        latents = state.get("latents")
        prompts = _prompts(guider.settings)
        avoided = self._conditioning(state, AVOIDED, prompts[AVOIDED], latents)
        unguided = {} if self.family.guided else self._conditioning(state, UNCONDITIONAL, prompts[UNCONDITIONAL], latents)
        guider.begin(f"{self.family.title} (modular)", scheduler, latents, avoided, unguided)
        listener = MethodListener(scheduler, "step", guider.heard_step)
        try:
            components, state = self.block(components, state)
        except BaseException:
            self._over(guider, failed=True)
            raise
        finally:
            listener.remove()
        self._over(guider, failed=False)
        return components, state

    def _over(self, guider: NegativeGuider, failed: bool) -> None:
        guider.end(failed)
        report = guider.report
        logger.log(logging.WARNING if report.idle_reason else logging.INFO, "%s", report)
        tell(Status({type(guider.settings): report}))

    def _conditioning(self, state: PipelineState, prefix: str, prompt: Prompt | None, latents: Tensor) -> dict[str, Tensor]:
        """The denoiser's inputs for a further prompt, a row per image."""
        if prompt is None:
            return {}
        given: tuple[Any, ...] = tuple(state.get(prefix + name) for name in ENCODED)
        if isinstance(prompt, Embeddings):
            given = prompt.prompt, prompt.pooled
        if any(value is None for value in given):
            missing = ", ".join(prefix + name for name, value in zip(ENCODED, given, strict=True) if value is None)
            raise ValueError(
                f"the call lacks {missing}: the text encoder was run without negative guidance, or the embeddings to avoid are not "
                "pooled; pass what the text encoder of with_negative_guidance gives, or Embeddings(prompt, pooled)"
            )
        own = state.get("prompt_embeds")
        inputs = zip(self.family.conditioning.values(), given, strict=True)
        return {name: a_row_per_image(value.to(own), len(latents)) for name, value in inputs}

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        self.block.set_progress_bar_config(**kwargs)


class BranchingDenoiser(Around):
    """The denoiser of a loop without a guider, called once for each branch that the guider wants."""

    @torch.no_grad()
    def __call__(self, components: Any, block_state: Any, i: int, t: Any) -> tuple[Any, Any]:
        guider = self.guider(components)
        guider.set_state(step=i, num_inference_steps=block_state.num_inference_steps, timestep=t)
        own = {name: getattr(block_state, name) for name in self.family.conditioning.values()}
        batches = guider.prepare_inputs({name: (value, guider.unconditional.get(name)) for name, value in own.items()})
        for batch in batches:
            for name in own:
                setattr(block_state, name, getattr(batch, name))
            self.block(components, block_state, i=i, t=t)
            batch.noise_pred = block_state.noise_pred
        for name, value in own.items():
            setattr(block_state, name, value)
        block_state.noise_pred = guider(batches).pred
        return components, block_state


def _prompts(settings: Settings) -> dict[str, Prompt | None]:
    """By prefix, the prompts to encode beside those of the call."""
    return {AVOIDED: settings.prompt, UNCONDITIONAL: None if settings.cfg is None else settings.cfg_prompt}


def _names() -> list[str]:
    return [prefix + name for prefix in (AVOIDED, UNCONDITIONAL) for name in ENCODED]


def _parameter(kind: Any, name: str) -> Any:
    return kind(name, type_hint=Tensor, kwargs_type="denoiser_input_fields", description="of a prompt of negative guidance")
