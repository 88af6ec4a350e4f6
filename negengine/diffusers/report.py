"""What a run did: a setting that changed nothing must be visible."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Status:
    """Counts of the last run of a pipeline (or since :func:`negengine.apply` for a bare denoiser).

    Attributes:
        method: name of the method.
        family: model family.
        blocks: attention blocks that are listened to.
        active_blocks: of those, blocks that had something to merge.
        steps, active_steps: denoising steps, and those within the timestep window.
        eligible_tokens: tokens that had a reference, summed over blocks and steps.
        merged_tokens: of those, tokens whose match exceeded the threshold.
        group_size: images per group; 0 before the first run.
        kernels: verdict on the Triton kernels for this run's device, and its age; None where they do not come into question.
    """

    method: str
    family: str
    blocks: int
    active_blocks: int
    steps: int
    active_steps: int
    eligible_tokens: int
    merged_tokens: int
    group_size: int
    kernels: str | None = None

    @property
    def merged_share(self) -> float:
        """Merged of eligible tokens, 0 … 1."""
        return self.merged_tokens / self.eligible_tokens if self.eligible_tokens else 0.0

    @property
    def idle_reason(self) -> str | None:
        """Why the last run changed nothing; None if it changed something or there was none."""
        if not self.steps or self.merged_tokens:
            return None
        if not self.active_steps:
            return "no timestep of the run lies in the window; widen `timesteps`"
        if not self.eligible_tokens:
            if self.group_size == 1:
                return "every group has one image; raise num_images_per_prompt, or set `group_size` or a ReferenceImage"
            return "no selected block has a token grid of `min_grid`; lower it or select other `blocks`"
        return "no token's cosine exceeded `threshold`; lower it"

    def __str__(self) -> str:
        if not self.steps:
            return f"{self.method} on {self.family}: applied to {self.blocks} blocks, not run yet"
        done = (
            f"{self.method} on {self.family}: active in {self.active_blocks} of {self.blocks} blocks and "
            f"{self.active_steps} of {self.steps} steps, merged {self.merged_share:.1%} of the tokens"
        )
        if self.kernels is not None:
            done += f"; Triton kernels: {self.kernels}"
        return done if self.idle_reason is None else f"{done}; it changed nothing: {self.idle_reason}"
