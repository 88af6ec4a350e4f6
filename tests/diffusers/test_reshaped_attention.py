"""Other libraries change what attention sees: merged tokens (ToMe), windows (HiDiffusion), hooks that read positional inputs."""

import pytest
import torch
from tiny import draw, half_mask, picture, sdxl

import negengine

MERGE = {"timesteps": (0, 1000), "threshold": -1, "min_grid": 1}
SIZE = {"height": 64, "width": 64, "num_inference_steps": 1}


def attentions(pipe):
    return [module for name, module in pipe.unet.named_modules() if name.endswith("attn1")]


def windowed(pipe, windows=4):
    """Self-attention within parts of an image, each a row of the batch; whole images again before the next module."""
    for attention in attentions(pipe):

        def part(module, args):
            x = args[0]
            return (x.reshape(len(x) * windows, x.shape[1] // windows, x.shape[2]), *args[1:])

        def whole(module, args, output):
            return output.reshape(len(output) // windows, output.shape[1] * windows, output.shape[2])

        attention.register_forward_pre_hook(part)
        attention.register_forward_hook(whole)
    return pipe


def test_windows_of_an_image_are_one_image():
    plain = draw(windowed(sdxl()), **SIZE)
    assert not torch.equal(plain, draw(sdxl(), **SIZE))
    pipe = sdxl()
    negengine.apply(pipe, negengine.NegToMe(**MERGE))  # first, so that its hooks see the windows
    got = draw(windowed(pipe), **SIZE)
    torch.testing.assert_close(got[::2], plain[::2])  # the first image of each prompt
    assert (got[1::2] - plain[1::2]).abs().amax(dim=(1, 2, 3)).min() > 1e-3
    report = negengine.status(pipe)[negengine.NegToMe]
    whole = negengine.apply(sdxl(), negengine.NegToMe(**MERGE))
    draw(whole, **SIZE)
    assert report.eligible_tokens == negengine.status(whole)[negengine.NegToMe].eligible_tokens


def test_rows_that_are_no_parts_of_images_are_refused():
    pipe = negengine.apply(sdxl(), negengine.NegToMe(**MERGE))
    for attention in attentions(pipe):
        attention.register_forward_pre_hook(lambda module, args: (torch.cat([args[0], args[0][:1]]), *args[1:]))
        attention.register_forward_hook(lambda module, args, output: output[:-1])
    with pytest.raises(RuntimeError, match=r"an attention block has 9 rows, but the denoiser was called with 8"):
        draw(pipe, **SIZE)


def thinned(pipe, part=2):
    """Self-attention over a part of the tokens of the finest blocks, each standing for several, as with tomesd."""
    for attention in attentions(pipe):
        if "up_blocks.1" in str(attention.negengine_name):
            attention.register_forward_pre_hook(lambda module, args: (args[0][:, ::part], *args[1:]))
            attention.register_forward_hook(lambda module, args, output: output.repeat_interleave(part, 1))
    return pipe


@pytest.fixture
def pipe():
    pipe = sdxl()
    for name, module in pipe.unet.named_modules():
        module.negengine_name = name
    return pipe


@pytest.mark.parametrize("min_grid, merged", [(1, True), (8, True), (9, False)])
def test_blocks_with_merged_tokens_keep_their_grid(pipe, min_grid, merged):
    """Half of 8 x 8 tokens are those of no grid."""
    blocks = [name for name, _ in pipe.unet.named_modules() if name.startswith("up_blocks.1") and name.endswith("attn1")]
    negengine.apply(pipe, negengine.NegToMe(**MERGE | {"min_grid": min_grid, "blocks": tuple(blocks)}))
    draw(thinned(pipe), **SIZE)
    report = negengine.status(pipe)[negengine.NegToMe]
    assert report.active_blocks == (len(blocks) if merged else 0)
    assert report.eligible_tokens == (len(blocks) * 4 * 32 if merged else 0)


def test_a_picture_beside_merged_tokens(pipe):
    negengine.apply(pipe, negengine.NegToMe(**MERGE, reference=negengine.ReferenceImage(picture())))
    draw(thinned(pipe), **SIZE)
    assert negengine.status(pipe)[negengine.NegToMe].merged_tokens


def test_a_mask_beside_merged_tokens_is_refused(pipe):
    negengine.apply(pipe, negengine.NegToMe(**MERGE, reference=negengine.ReferenceImage(picture(), half_mask())))
    thinned(pipe)
    with pytest.raises(RuntimeError, match="a block has 32 tokens of an image, which is no grid of this size"):
        draw(pipe, **SIZE)


def test_positional_inputs_of_the_denoiser_stay_positional():
    pipe, seen = sdxl(), []
    negengine.apply(pipe, negengine.NegToMe(**MERGE, reference=negengine.ReferenceImage(picture())))
    pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    draw(pipe, **SIZE)
    assert [shape[0] for shape in seen] == [12]
