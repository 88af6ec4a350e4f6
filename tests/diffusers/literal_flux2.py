"""The attention processors of FLUX.2 written out again, with a place to change the image's own tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from literal_joint import turned


class Flux2Processor:
    """Image tokens before the output projection; in single blocks the attention's channels, before the MLP's join them.

    ``change(x, name)`` gets and returns the image tokens ``[rows, tokens, channels]`` of the attention called ``name``. They stand
    between ``change.text`` text tokens, which joint blocks tell, and those of other images, of which there may be none.
    """

    def __init__(self, change, name):
        self.change, self.name = change, name
        self.single = name.startswith("single")

    def __call__(self, attn, hidden_states, *given):
        return self.alone(attn, hidden_states, *given) if self.single else self.joint(attn, hidden_states, *given)

    def joint(self, attn, image, text, attention_mask=None, image_rotary_emb=None):
        q = both(heads(attn.add_q_proj(text), attn, attn.norm_added_q), heads(attn.to_q(image), attn, attn.norm_q))
        k = both(heads(attn.add_k_proj(text), attn, attn.norm_added_k), heads(attn.to_k(image), attn, attn.norm_k))
        v = both(heads(attn.add_v_proj(text), attn), heads(attn.to_v(image), attn))
        self.change.text = text.shape[1]
        text, image = self.changed(product(q, k, v, image_rotary_emb))
        return attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(text)

    def alone(self, attn, x, attention_mask=None, image_rotary_emb=None):
        widths = [attn.inner_dim] * 3 + [2 * attn.mlp_hidden_dim]
        q, k, v, mlp = attn.to_qkv_mlp_proj(x).split(widths, -1)
        q, k, v = heads(q, attn, attn.norm_q), heads(k, attn, attn.norm_k), heads(v, attn)
        gate, up = mlp.chunk(2, -1)
        out = torch.cat(self.changed(product(q, k, v, image_rotary_emb)), 1)
        return attn.to_out(torch.cat([out, F.silu(gate) * up], -1))

    def changed(self, out):
        """Text tokens, then the others."""
        text, image, others = out.tensor_split([self.change.text, self.change.text + self.change.own], 1)
        return text, torch.cat([self.change(image, self.name), others], 1)


def own_tokens(inputs):
    """How many tokens are the image's own: those of other images have later times."""
    times = inputs["img_ids"][..., 0].reshape(-1, inputs["hidden_states"].shape[1])[0]
    return int((times == 0).sum())


def both(text, image):
    return torch.cat([text, image], 1)


def heads(x, attn, norm=None):
    x = x.unflatten(-1, (attn.heads, -1))
    return x if norm is None else norm(x)


def product(q, k, v, rotary):
    cos, sin = rotary  # every value twice
    turn = torch.complex(cos[:, ::2], sin[:, ::2])[None, :, None]
    q, k = turned(q, turn), turned(k, turn)
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2).flatten(2)
