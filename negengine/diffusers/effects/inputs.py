"""What a denoiser is told besides its sample, the timestep and the prompt, by which a recording and a run are compared."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from negengine.bank import BRANCHES, checksum
from negengine.diffusers.families import Conditioning

# Names of inputs that follow from the step, from the size, which is compared already, or from the prompt and its length
_STEP = ("timestep", "t", "return_dict")
_SIZE = ("img_ids", "img_shapes")  # and of images to work from, beside which a bank serves as well
_TEXT = (
    "encoder_hidden_states_mask",
    "encoder_attention_mask",
    "attention_mask",
    "txt_ids",
    "txt_seq_lens",
)
# Parts of the names of inputs under which what was recorded is an approximation -> how the report says so
APPROXIMATIONS = {
    "guidance": "another guidance scale",
    "timestep_cond": "another guidance scale",
    "image_embeds": "other image prompts",
    "ip_hidden_states": "other image prompts",
    "controlnet": "a control net, whose additions are not those of the recording",
    "additional_residual": "a control net, whose additions are not those of the recording",
}
_CONTROL = ("controlnet", "additional_residual")


def approximation(name: str) -> str | None:
    """What the report says where this input is another than when it was recorded; None: the bank is refused."""
    return next((said for part, said in APPROXIMATIONS.items() if part in name), None)


def follows_image(name: str) -> bool:
    """Whether an input is another in every run, so that it counts that it is there."""
    return any(part in name for part in _CONTROL)


def branches(conditioning: Conditioning, rows: int, images: int) -> tuple[str, ...]:
    """Those in a batch of so many rows, in their order. Where branches are calls, the first is the conditional."""
    if conditioning.cfg == "calls" or rows != 2 * images:
        return BRANCHES[1:]
    return BRANCHES[::-1] if conditioning.conditional_first else BRANCHES


def further_inputs(
    inputs: Mapping[str, Any], conditioning: Conditioning, texts: Collection[str], present: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """A checksum for each branch of all that is told, by name.

    Args:
        texts: names of the inputs that prompts become. present: the branches in the batch, in their order.
    """
    lists = conditioning.lists
    known = {*_STEP, *_SIZE, *_TEXT, *texts, conditioning.sample, conditioning.mask, None if lists is None else lists.texts}
    found: dict[str, tuple[str, ...]] = {}
    rows = len(inputs[conditioning.sample])
    for head, value in inputs.items():
        if head in known:
            continue
        for name, leaf in _leaves(value, head):
            if name in texts:
                continue
            if follows_image(head):
                if isinstance(leaf, Tensor):
                    found[head] = ("there",) * len(present)
            elif isinstance(leaf, Tensor) and head in conditioning.batched and leaf.ndim and len(leaf) == rows:
                found[name] = tuple(_of_rows(part) for part in leaf.detach().cpu().split(rows // len(present)))
            else:
                found[name] = (checksum(leaf) if isinstance(leaf, Tensor) else repr(leaf),) * len(present)
    return found


def _of_rows(rows: Tensor) -> str:
    """What all rows are told counts once, however many there are."""
    return checksum(rows[:1] if bool((rows == rows[:1]).all()) else rows)


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The tensors, numbers and words in an input, but the scale of adapters where it is what it is if none is given."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _leaves(part, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for number, part in enumerate(value):
            yield from _leaves(part, f"{name}.{number}")
    elif isinstance(value, (Tensor, int, float, str)) and not (name.endswith(".scale") and value == 1):
        yield name, value
