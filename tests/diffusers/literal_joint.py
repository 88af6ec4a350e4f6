"""Attention processors of transformers over images and text, written out again, with a place to change the image tokens.

``change(x, name)`` gets and returns the image tokens ``[rows, tokens, channels]`` of the attention called ``name``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


class SD3Processor:
    """Image tokens before the output projection; the text follows them, and is not there in a block's second attention."""

    def __init__(self, change, name):
        self.change, self.name = change, name

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        def heads(x, norm=None):
            x = x.view(x.shape[0], x.shape[1], attn.heads, -1).transpose(1, 2)
            return x if norm is None else norm(x)

        q = heads(attn.to_q(hidden_states), attn.norm_q)
        k = heads(attn.to_k(hidden_states), attn.norm_k)
        v = heads(attn.to_v(hidden_states))
        text = encoder_hidden_states
        if text is not None:
            q = torch.cat([q, heads(attn.add_q_proj(text), attn.norm_added_q)], 2)
            k = torch.cat([k, heads(attn.add_k_proj(text), attn.norm_added_k)], 2)
            v = torch.cat([v, heads(attn.add_v_proj(text))], 2)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        image = attn.to_out[1](attn.to_out[0](self.change(out[:, : hidden_states.shape[1]], self.name)))
        if text is None:
            return image
        rest = out[:, hidden_states.shape[1] :]
        return image, rest if attn.context_pre_only else attn.to_add_out(rest)


class QwenProcessor:
    """Image tokens before the output projection; the text precedes them, and what it is filled up with is masked."""

    def __init__(self, change, name):
        self.change, self.name = change, name

    def __call__(
        self,
        attn,
        hidden_states,
        encoder_hidden_states,
        encoder_hidden_states_mask=None,
        attention_mask=None,
        image_rotary_emb=None,
    ):
        def heads(x, norm=None, turn=None):
            x = x.unflatten(-1, (attn.heads, -1))
            x = x if norm is None else norm(x)
            return x if turn is None else turned(x, turn[None, :, None])

        text, of_image, of_text = encoder_hidden_states, *image_rotary_emb
        q = [heads(attn.add_q_proj(text), attn.norm_added_q, of_text), heads(attn.to_q(hidden_states), attn.norm_q, of_image)]
        k = [heads(attn.add_k_proj(text), attn.norm_added_k, of_text), heads(attn.to_k(hidden_states), attn.norm_k, of_image)]
        v = [heads(attn.add_v_proj(text)), heads(attn.to_v(hidden_states))]
        mask = attention_mask  # as the model makes it in versions of diffusers before 0.40
        if mask is not None and mask.ndim == 2:
            mask = mask[:, None, None]
        if encoder_hidden_states_mask is not None:
            mask = F.pad(encoder_hidden_states_mask, (0, hidden_states.shape[1]), value=True)[:, None, None]
        out = F.scaled_dot_product_attention(*(torch.cat(x, 1).transpose(1, 2) for x in (q, k, v)), attn_mask=mask)
        out = out.transpose(1, 2).flatten(2)
        image = self.change(out[:, text.shape[1] :].contiguous(), self.name)
        return attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(out[:, : text.shape[1]].contiguous())


def turned(x, turn):
    """Rotary embedding: pairs of channels as complex numbers, times ``turn``."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).type_as(x)
