"""Normalized attention guidance on a denoiser: a second attention to the negative prompt, and the blend of both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from negengine.diffusers.clock import Clock
from negengine.diffusers.effect import Call, Effect
from negengine.diffusers.effects.blocks import select
from negengine.diffusers.families import Conditioning, Family, Site
from negengine.diffusers.report import NagReport
from negengine.diffusers.rows import TEXT, Join, Rows, halves, with_rows
from negengine.methods import NormalizedAttentionGuidance
from negengine.ops import guidance, registry


class NagEffect(Effect[NormalizedAttentionGuidance]):
    """Guides image tokens away from what the negative prompt makes of them, at the attention outputs (arXiv 2505.21179).

    Where text enters through cross-attention, each guided one gets further rows: the conditional ones once more, with the
    negative prompt's text. They are blended before the output projection and go no further. The unconditional half of
    classifier-free guidance, and rows that other effects joined, are left alone.

    Where text and image attend to each other in one product, every image has a second row in the whole denoiser. Its text
    stream is the negative prompt's own, and its image stream that of the first row: the blend is written to both, and in
    blocks that are not guided the second row takes the tokens of the first.

    Deviations from the authors' code:

    * Norms are L1, as in the paper, their ComfyUI node and their code for UNets; their code for FLUX takes L2.
    * In FLUX the pooled projections modulate the image stream. The second rows take the positive prompt's, so that both rows
      stay one image to the last block. In the authors' code they drift apart within the single blocks.
    """

    listens_last = True  # what other methods do to the first rows' tokens must reach the second
    tells_branches = True

    def __init__(
        self, settings: NormalizedAttentionGuidance, family: Family, denoiser: nn.Module, unscheduled: bool = False
    ) -> None:
        settings = family.with_defaults(settings)
        super().__init__(settings, family, denoiser, unscheduled)
        cross = [Site(path, path, "arguments") for path in family.tokens.cross(denoiser)]
        blocks = cross or list(family.tokens.sites(denoiser))
        chosen = blocks if settings.blocks is None else select(blocks, settings.blocks, family)
        self.blocks = len(chosen)
        self.joint = not cross
        self._sites = blocks if self.joint else [site for block in chosen for site in (block, _projection(block))]
        self._chosen = set(chosen)
        self._guides = settings.scale > 1 and settings.alpha > 0  # type: ignore[operator]
        self._text: dict[str, Tensor] = {}  # the negative prompt's [images, L, D], and its mask
        self.images = 0

    @classmethod
    def check(cls, settings: NormalizedAttentionGuidance, family: Family, pipe: Any | None, scheduler: Any | None) -> None:
        if pipe is None:
            raise ValueError("NAG encodes its negative prompt as the pipeline encodes its prompts; apply it to the pipeline")
        if family.conditioning.prompts is Conditioning.prompts:
            raise ValueError(
                f"the family {family.name} does not tell how its pipelines encode prompts, which NAG must know; "
                "describe it with Conditioning(prompts=...)"
            )
        settings = family.with_defaults(settings)
        missing = [name for name in ("scale", "tau", "alpha") if getattr(settings, name) is None]
        if missing:
            raise ValueError(f"the family {family.name} has no defaults for NAG; give {', '.join(missing)}")

    @property
    def joining(self) -> bool:
        return self.joint and self._guides

    def sites(self) -> Iterable[Site]:
        return self._sites if self._guides else ()

    def spot(self, number: int) -> bool:
        """Whether this site is guided."""
        return not self.joint or self._sites[number] in self._chosen

    # --- on the host, between forwards ---------------------------------------------------------------------------

    def begin(self, call: Call) -> None:
        """Raises what encoding the negative prompt raises, and RuntimeError where no backend can blend."""
        if not self._guides:
            return
        registry.choose_guidance(None, call.device, call.dtype)
        self.images = call.images
        encoded = call.encode(self.settings.negative_prompt)
        self._text = {name: value for name, value in encoded.items() if name in (TEXT, self.family.conditioning.mask)}

    def second_prompts(self) -> None:
        """Raises ValueError: guidance in a second call of the denoiser."""
        if self._guides:
            raise ValueError(
                f"NAG and classifier-free guidance in a second call of the denoiser do not go together on {self.family.name}; "
                f"pass {self.family.conditioning.scale}=1 and no negative_prompt, and give "
                "NormalizedAttentionGuidance(negative_prompt=...)"
            )

    def at(self, clock: Clock) -> bool:
        return self._guides and clock.within(self.settings.timesteps)

    def finish(self) -> None:
        self._text = {}

    def report(self, clock: Clock) -> NagReport:
        return NagReport(
            method=self.settings.title,
            family=self.family.name,
            steps=clock.steps,
            active_steps=self.active_steps,
            blocks=self.blocks,
            guides=self._guides,
        )

    # --- in the forward ------------------------------------------------------------------------------------------

    def joins(self, inputs: Mapping[str, Any], rows: Rows) -> Join | None:
        return Join(self._conditional(rows), self._text) if self.joint else None

    def arguments(self, arguments: dict[str, Any], spot: bool, rows: Rows) -> dict[str, Any]:
        """A cross-attention's arguments with the conditional rows appended once more, under the negative text."""
        # an IP-Adapter makes the text the first of a tuple; its own embeddings are those of the conditional rows
        wanted = Join(self._conditional(rows), {TEXT: self._text[TEXT], f"{TEXT}.0": self._text[TEXT]})
        return {name: with_rows(value, rows.total, wanted, name) for name, value in arguments.items()}

    def tokens(self, x: Tensor, spot: bool, rows: Rows) -> Tensor | None:
        settings = self.settings
        positive = x[self._conditional(rows)]
        negative = x[self.start : self.stop] if self.joint else x[rows.total :]
        if not spot:
            negative.copy_(positive)
        else:
            scale, tau, alpha = settings.scale, settings.tau, settings.alpha
            guidance.nag_(positive, negative, scale, tau, alpha, both=self.joint)  # type: ignore[arg-type]
        return None if self.joint else x[: rows.total]

    def _conditional(self, rows: Rows) -> slice:
        """Those of the pipeline's rows that have its prompts: all, or a half with classifier-free guidance."""
        return halves(rows.base, self.images, self.settings.title, self.family.conditioning).conditional


def _projection(block: Site) -> Site:
    return Site(block.name, f"{block.path}.to_out.0", "input")
