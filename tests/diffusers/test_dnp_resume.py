"""A captioner that fails in the middle of a batch: what was drawn and captioned until then is kept, and the chain goes on."""

import dataclasses
import pickle

import pytest
import tiny

import negengine
from negengine.captioners import CaptionCache, CaptionError
from negengine.methods import DiffusionNegativePrompt

PROMPTS, SEEDS = ["a cat", "two dogs", "the sea"], [5, 11, 2]
CALL = {"height": 32, "width": 48, "num_inference_steps": 2, "guidance_scale": 4.0}


class Failing:
    """Raises at the ``at``th picture, and captions the others by their pixels."""

    identity = "failing"

    def __init__(self, at=None):
        self.at, self.seen = at, []

    def __call__(self, image):
        self.seen.append(image)
        if len(self.seen) == self.at:
            raise OSError("the line is down")
        return f"picture {sum(image.tobytes()) % 1000}"


def prompting(pipe, captioner, **arguments):
    call = {"prompts": PROMPTS, "seed": SEEDS, **CALL, **arguments}
    return negengine.diffusion_negative_prompting(pipe, call.pop("prompts"), DiffusionNegativePrompt(captioner=captioner), **call)


def failed(pipe, at, **arguments):
    with pytest.raises(CaptionError, match="the line is down") as caught:
        prompting(pipe, Failing(at), **arguments)
    return caught.value


@pytest.fixture(scope="module")
def pipe():
    return tiny.sd()


@pytest.fixture(scope="module")
def whole(pipe):
    """The chain without a failure."""
    return prompting(pipe, Failing())


def counted(pipe):
    calls = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    return calls, hook


@pytest.mark.parametrize("at", [1, 2, 3])
def test_the_error_has_every_picture_and_the_captions_so_far(pipe, whole, at):
    error = failed(pipe, at)
    assert "negatives=error.negatives" in str(error)
    assert [(image.prompt, image.seed) for image in error.negatives] == list(zip(PROMPTS, SEEDS, strict=True))
    assert [image.image.tobytes() for image in error.negatives] == [record.negative_image.tobytes() for record in whole]
    captions = [record.caption for record in whole]
    assert [image.caption for image in error.negatives] == captions[: at - 1] + [None] * (4 - at)
    assert (error.prompt, error.seed, error.image) == (PROMPTS[at - 1], SEEDS[at - 1], error.negatives[at - 1].image)


@pytest.mark.parametrize("kept", [False, True], ids=["", "cache"])
def test_the_chain_goes_on_where_it_was(pipe, whole, kept, tmp_path):
    cache = CaptionCache(tmp_path, model="tiny") if kept else None
    error = failed(pipe, 2, cache=cache)
    captioner, (calls, hook) = Failing(), counted(pipe)
    records = prompting(pipe, captioner, negatives=error.negatives, cache=cache)
    hook.remove()
    assert [image.tobytes() for image in captioner.seen] == [record.negative_image.tobytes() for record in whole[1:]]
    assert calls == [6, 6]  # the two steps of the final run, with guidance
    assert [(r.caption, r.images[0].tobytes()) for r in records] == [(r.caption, r.images[0].tobytes()) for r in whole]
    if kept:
        assert len(list(tmp_path.glob("*.json"))) == 3


def test_it_may_fail_again_and_a_part_may_go_on(pipe, whole):
    error = failed(pipe, 1)
    error = failed(pipe, 2, negatives=error.negatives)
    assert [image.caption is None for image in error.negatives] == [False, True, True]
    captioner = Failing()
    (record,) = prompting(pipe, captioner, prompts=PROMPTS[2], seed=SEEDS[2], negatives=error.negatives)
    assert (record.caption, len(captioner.seen)) == (whole[2].caption, 1)


def test_a_missing_caption_may_be_given_by_hand(pipe):
    error = failed(pipe, 3)
    filled = [dataclasses.replace(image, caption=image.caption or "a horse") for image in error.negatives]
    captioner = Failing()
    assert prompting(pipe, captioner, negatives=filled)[2].caption == "a horse"
    assert not captioner.seen
    with pytest.raises(ValueError, match="a caption must be a text that says something, got ' '"):
        dataclasses.replace(filled[0], caption=" ")


def test_what_would_be_drawn_otherwise_is_refused(pipe):
    error = failed(pipe, 2)
    calls, hook = counted(pipe)
    with pytest.raises(ValueError, match=r"'a cat', seed 5, was drawn with another guidance and call"):
        prompting(pipe, Failing(), negatives=error.negatives, guidance_scale=5.0, height=64)
    hook.remove()
    assert not calls


def test_the_error_goes_through_pickle(pipe):
    error = failed(pipe, 2)
    twin = pickle.loads(pickle.dumps(error))
    assert (str(twin), twin.reason, twin.prompt, twin.seed) == (str(error), error.reason, error.prompt, error.seed)
    assert [image.caption for image in twin.negatives] == [image.caption for image in error.negatives]
