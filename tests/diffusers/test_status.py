"""What a run did is counted exactly, and a run that did nothing says why."""

import copy
import functools
import logging
import pickle

import pytest
import torch
from compare import hooked
from tiny import BUILDERS, draw, picture

import negengine

ALL = {"timesteps": (0, 1000), "threshold": -1}
# Tokens of one image in all selected blocks: 4 x 35 of FLUX; 8 x 20 and 4 x 63 in the up blocks of SDXL, twice (guidance).
TOKENS = {"flux": 4 * 35, "sdxl": 2 * (8 * 20 + 4 * 63)}
BLOCKS = {"flux": 4, "sdxl": 12}


@pytest.mark.parametrize("reference,images", [("first", 2), ("others", 3), ("previous", 2)])
def test_everything_is_merged_below_every_cosine(family, reference, images):
    """``images`` of each group of 3 have a reference."""
    call = functools.partial(draw, prompts=2, n=3)
    _, status = hooked(BUILDERS[family](), call, **ALL, reference=reference)
    assert (status.blocks, status.active_blocks) == (BLOCKS[family], BLOCKS[family])
    assert (status.steps, status.active_steps, status.group_size) == (3, 3, 3)
    assert status.eligible_tokens == status.merged_tokens == 3 * 2 * images * TOKENS[family]
    assert status.merged_share == 1
    assert status.idle_reason is None


def test_a_second_run_counts_anew(family):
    pipe = BUILDERS[family]()
    _, first = hooked(pipe, draw, **ALL)
    draw(pipe)
    assert negengine.status(pipe)[negengine.NegToMe] == first


def test_true_guidance_counts_both_calls():
    call = functools.partial(draw, true_cfg_scale=2.0, negative_prompt=["dull"] * 2)
    _, status = hooked(BUILDERS["flux"](), call, **ALL)
    assert status.eligible_tokens == 2 * 3 * 2 * TOKENS["flux"]
    assert (status.steps, status.active_steps) == (3, 3)


def test_pictures_push_every_image(family):
    reference = negengine.ReferenceImage(picture())
    _, status = hooked(BUILDERS[family](), draw, **ALL, reference=reference)
    assert status.eligible_tokens == status.merged_tokens == 3 * 4 * TOKENS[family]


def test_dropout_leaves_tokens_out(family):
    _, status = hooked(BUILDERS[family](), functools.partial(draw, n=3), **ALL, dropout=0.25)
    assert abs(status.merged_share - 0.75) < 0.03


def test_partial_window(family):
    _, status = hooked(BUILDERS[family](), draw, threshold=-1, timesteps=(900, 1000))
    assert (status.steps, status.active_steps) == (3, 1)
    assert status.merged_tokens == 2 * TOKENS[family]


def test_one_block(family):
    block = {"flux": "transformer_blocks.1", "sdxl": "up_blocks.1"}[family]
    _, status = hooked(BUILDERS[family](), draw, **ALL, blocks=(block,))
    assert status.blocks == status.active_blocks == {"flux": 1, "sdxl": 4}[family]


IDLE = [
    ({**ALL, "threshold": 1}, {}, "no token's cosine exceeded `threshold`; lower it"),
    ({"threshold": -1, "timesteps": (997, 997.5)}, {}, "no timestep of the run lies in the window; widen `timesteps`"),
    (ALL, {"n": 1}, "every group has one image; raise num_images_per_prompt"),
    ({**ALL, "min_grid": 10}, {}, "no selected block has a token grid of `min_grid`; lower it"),
]


@pytest.mark.parametrize("settings,call,reason", IDLE, ids=["threshold", "window", "group of one", "min_grid"])
def test_a_run_that_did_nothing_warns_with_the_cause(family, settings, call, reason, caplog):
    pipe = BUILDERS[family]()
    call = functools.partial(draw, **call)
    plain = call(pipe)
    with caplog.at_level(logging.INFO, logger="negengine"):
        got, status = hooked(pipe, call, **settings)
    assert torch.equal(got, plain)
    assert status.merged_tokens == 0
    assert reason in status.idle_reason
    (record,) = [r for r in caplog.records if r.name == "negengine"]
    assert record.levelno == logging.WARNING
    assert f"changed nothing: {reason}" in record.getMessage()


def test_a_run_is_logged_at_info(family, caplog):
    pipe = BUILDERS[family]()
    with caplog.at_level(logging.INFO, logger="negengine"):
        _, status = hooked(pipe, draw, **ALL)
    (record,) = [r for r in caplog.records if r.name == "negengine"]
    blocks = BLOCKS[family]
    assert record.levelno == logging.INFO
    assert f"active in {blocks} of {blocks} blocks and 3 of 3 steps, merged 100.0% of the tokens" in record.getMessage()
    assert record.getMessage() == str(status)


def test_before_the_first_run(family):
    pipe = negengine.apply(BUILDERS[family](), negengine.NegToMe())
    assert negengine.status(pipe)[negengine.NegToMe].steps == 0
    assert "not run yet" in str(negengine.status(pipe))
    with pytest.raises(ValueError, match="no method is applied"):
        negengine.status(negengine.remove(pipe))


def test_one_method_alone_answers_for_the_status():
    pipe = negengine.apply(BUILDERS["flux"](), negengine.NegToMe(**ALL))
    status = negengine.status(pipe)
    assert status.blocks == status[negengine.NegToMe].blocks == BLOCKS["flux"]
    assert copy.copy(status) == pickle.loads(pickle.dumps(status)) == status
    with pytest.raises(AttributeError, match="no attribute 'merged'"):
        status.merged  # noqa: B018
    negengine.apply(pipe, negengine.CADS())
    with pytest.raises(
        AttributeError, match=r"reports of NegToMe and CADS: ask one of them, such as status\[negengine\.NegToMe\]\.blocks"
    ):
        negengine.status(pipe).blocks  # noqa: B018
