"""Normalized attention guidance written out for tests: other code, another structure, float64.

The pipeline's denoiser is replaced by a copy in float64. UNets attend a second time in an attention processor. FLUX's
forward is written out with one image stream and two text streams, where the plug-in has two rows in the denoiser.
"""

from __future__ import annotations

import copy
import inspect

import torch
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb
from literal import merged
from tiny import denoiser, kind


def encoded(pipe, texts, n, length=11):
    """Text embeddings of ``texts`` with ``n`` rows each, as the pipeline makes them."""
    if kind(pipe) == "flux":
        return pipe.encode_prompt(texts, None, num_images_per_prompt=n, max_sequence_length=length)[0]
    return pipe.encode_prompt(texts, device="cpu", num_images_per_prompt=n, do_classifier_free_guidance=False)[0]


def heads(x, number):
    return x.unflatten(-1, (number, -1)).transpose(1, 2)


def product(q, k, v):
    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


class LiteralNag:
    """Puts the test's guidance on a pipeline, and before or after it NegToMe of groups of ``n`` if ``negtome`` has settings.

    ``clamped`` and ``tokens`` count, ``margin`` is that of NegToMe's closest decision.
    """

    def __init__(self, pipe, negative, n, scale, tau, alpha, window=(0, 1000), blocks=None, negtome=None):
        self.negative, self.n, self.scale, self.tau, self.alpha = negative.double(), n, scale, tau, alpha
        self.window, self.blocks, self.negtome = window, blocks, negtome
        self.reset()
        model = denoiser(pipe)
        self.names = tuple(inspect.signature(type(model).forward).parameters)[1:]
        self.model = copy.deepcopy(model).double()
        if kind(pipe) != "flux":
            for name, module in self.model.named_modules():
                if name.endswith(("attn1", "attn2")):
                    module.set_processor(UNetProcessor(self, name, module.processor))
        model.forward = self.flux if kind(pipe) == "flux" else self.unet

    def reset(self):
        self.clamped = self.tokens = 0
        self.margin = 1.0

    def selects(self, name):
        return self.blocks is None or name.startswith(tuple(self.blocks))

    def blend(self, positive, negative):
        pushed = self.scale * positive - (self.scale - 1) * negative
        ratio = pushed.abs().sum(-1, keepdim=True) / positive.abs().sum(-1, keepdim=True)
        self.clamped, self.tokens = self.clamped + int((ratio > self.tau).sum()), self.tokens + ratio.numel()
        shortened = pushed / ratio * ratio.clamp(max=self.tau)
        return self.alpha * shortened + (1 - self.alpha) * positive

    def push(self, x, name):
        """NegToMe of ``x [rows, tokens, channels]``."""
        if self.negtome is None or not name.startswith(self.negtome["blocks"]):
            return x
        results = [merged(group, (self.negtome["alpha"],) * self.n, -1, "paper", "first") for group in x.split(self.n)]
        self.margin = min([self.margin, *(margin for _, margin in results)])
        return torch.cat([result for result, _ in results])

    def unet(self, *args, **kwargs):
        inputs = dict(zip(self.names, args, strict=False)) | kwargs
        self.active = self.window[0] <= float(inputs["timestep"]) <= self.window[1]
        dtype = inputs["sample"].dtype
        inputs = {name: doubled(value) if name != "timestep" else value for name, value in inputs.items()}
        return (self.model(**{**inputs, "return_dict": False})[0].to(dtype),)

    def flux(self, **inputs):
        m, x = self.model, inputs["hidden_states"]
        time = inputs["timestep"] * 1000
        active = self.window[0] <= float(time[0]) <= self.window[1]
        conditions = [time, inputs["pooled_projections"].double()]
        if inputs["guidance"] is not None:
            conditions.insert(1, inputs["guidance"] * 1000)
        emb = m.time_text_embed(*conditions)
        rotary = [r.double() for r in m.pos_embed(torch.cat([inputs["txt_ids"], inputs["img_ids"]]))]
        image = m.x_embedder(x.double())
        texts = [inputs["encoder_hidden_states"].double()] + ([self.negative] if active else [])
        texts = [m.context_embedder(text) for text in texts]
        for i, block in enumerate(m.transformer_blocks):
            image, texts = self.joint(block, f"transformer_blocks.{i}", image, texts, emb, rotary)
        for i, block in enumerate(m.single_transformer_blocks):
            image, texts = self.single(block, f"single_transformer_blocks.{i}", image, texts, emb, rotary)
        return (m.proj_out(m.norm_out(image, emb)).to(x.dtype),)

    def image_tokens(self, outputs, name):
        """One image stream of the outputs with either text."""
        first = self.push(outputs[0], name)
        return self.blend(first, outputs[1]) if len(outputs) == 2 and self.selects(name) else first

    def joint(self, block, name, image, texts, emb, rotary):
        attn, L = block.attn, texts[0].shape[1]
        normed, gate, shift, scale, gate_mlp = block.norm1(image, emb=emb)
        contexts = [block.norm1_context(text, emb=emb) for text in texts]

        def both(text, own, added, norm, norm_added):
            own = heads(own(normed), attn.heads) if norm is None else norm(heads(own(normed), attn.heads))
            added = heads(added(text), attn.heads) if norm is None else norm_added(heads(added(text), attn.heads))
            return torch.cat([added, own], 2)

        outs = []
        for context in contexts:
            q = apply_rotary_emb(both(context[0], attn.to_q, attn.add_q_proj, attn.norm_q, attn.norm_added_q), rotary)
            k = apply_rotary_emb(both(context[0], attn.to_k, attn.add_k_proj, attn.norm_k, attn.norm_added_k), rotary)
            outs.append(product(q, k, both(context[0], attn.to_v, attn.add_v_proj, None, None)))
        image = image + gate[:, None] * attn.to_out[0](self.image_tokens([out[:, L:] for out in outs], name))
        image = image + gate_mlp[:, None] * block.ff(block.norm2(image) * (1 + scale[:, None]) + shift[:, None])
        after = []
        for text, (_, c_gate, c_shift, c_scale, c_gate_mlp), out in zip(texts, contexts, outs, strict=True):
            text = text + c_gate[:, None] * attn.to_add_out(out[:, :L])
            inner = block.norm2_context(text) * (1 + c_scale[:, None]) + c_shift[:, None]
            after.append(text + c_gate_mlp[:, None] * block.ff_context(inner))
        return image, after

    def single(self, block, name, image, texts, emb, rotary):
        attn, L = block.attn, texts[0].shape[1]
        normed, gate, outs = [], None, []
        for text in texts:
            x, gate = block.norm(torch.cat([text, image], 1), emb=emb)
            q, k = (
                apply_rotary_emb(n(heads(p(x), attn.heads)), rotary)
                for p, n in ((attn.to_q, attn.norm_q), (attn.to_k, attn.norm_k))
            )
            outs.append(product(q, k, heads(attn.to_v(x), attn.heads)))
            normed.append(x)

        def after(old, attended, x):
            return old + gate[:, None] * block.proj_out(torch.cat([attended, block.act_mlp(block.proj_mlp(x))], 2))

        new = [after(text, out[:, :L], x[:, :L]) for text, out, x in zip(texts, outs, normed, strict=True)]
        return after(image, self.image_tokens([out[:, L:] for out in outs], name), normed[0][:, L:]), new


class UNetProcessor:
    """Attention of a UNet; in cross-attention, that of the conditional rows to the negative text as well."""

    def __init__(self, literal, name, present):
        self.literal, self.name = literal, name
        self.adapter = present if isinstance(present, IPAdapterAttnProcessor2_0) else None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        literal, text, pictures = self.literal, encoder_hidden_states, None
        if isinstance(text, tuple):
            text, (pictures,) = text
        q = heads(attn.to_q(hidden_states), attn.heads)
        out = self.attend(attn, q, hidden_states if text is None else text, pictures)
        if text is not None and literal.active and literal.selects(self.name):
            B = len(literal.negative)
            rows = slice(len(out) - B, None)  # of two halves, the conditional one is the last
            second = self.attend(attn, q[rows], literal.negative, None if pictures is None else pictures[rows])
            out = torch.cat([out[: len(out) - B], literal.blend(out[rows], second)])
        return literal.push(attn.to_out[0](out), self.name)

    def attend(self, attn, q, text, pictures):
        out = product(q, heads(attn.to_k(text), attn.heads), heads(attn.to_v(text), attn.heads))
        if pictures is None:
            return out
        pictures = pictures.flatten(1, -2)
        k, v = self.adapter.to_k_ip[0](pictures), self.adapter.to_v_ip[0](pictures)
        return out + self.adapter.scale[0] * product(q, heads(k, attn.heads), heads(v, attn.heads))


def doubled(value):
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: doubled(v) for name, v in value.items()}
    return type(value)(map(doubled, value)) if isinstance(value, (list, tuple)) else value
