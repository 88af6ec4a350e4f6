"""The attention processor of Lumina-Image 2.0, written out again, with a place to change each image's own tokens."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from literal_joint import turned


class LuminaProcessor:
    """Tokens before the output projection: image tokens alone (``noise_refiner``), or each row's text, image and filling.

    ``change(x, name)`` is as in literal_joint.py.
    """

    def __init__(self, change, name):
        self.change, self.name = change, name

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
        def heads(x, norm=None):
            x = x.unflatten(-1, (-1, attn.to_q.out_features // attn.heads))
            return x if norm is None else turned(norm(x), image_rotary_emb[:, :, None])

        q, k = heads(attn.to_q(hidden_states), attn.norm_q), heads(attn.to_k(hidden_states), attn.norm_k)
        v = heads(attn.to_v(hidden_states))
        k, v = (x.repeat_interleave(attn.heads // x.shape[2], 2) for x in (k, v))
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None]
        scale = 1 / math.sqrt(q.shape[-1])
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask, scale=scale)
        out = out.transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](self._changed(out, attention_mask)))

    def _changed(self, out, mask):
        part = self.name.partition(".")[0]
        if part == "context_refiner":
            return out
        if part == "noise_refiner":
            self.change.image = out.shape[1]
            return self.change(out, self.name)
        image, result = self.change.image, out.clone()
        ends = [out.shape[1]] * len(out) if mask is None else mask.sum(1).tolist()
        changed = self.change(torch.stack([row[end - image : end] for row, end in zip(out, ends, strict=True)]), self.name)
        for row, end, tokens in zip(result, ends, changed, strict=True):
            row[end - image : end] = tokens
        return result
