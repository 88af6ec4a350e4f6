"""Z-Image's attention processor, written out again, and guidance written out around its denoiser."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from literal_joint import turned
from transcription import levels, update


class ZImageProcessor:
    """Before the output projection: the first ``change.image`` tokens of every layer; none of the refiners, where text is alone."""

    def __init__(self, change, name):
        self.change, self.name = change, name

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, freqs_cis=None):
        def heads(x, norm=None):
            x = x.unflatten(-1, (attn.heads, -1))
            return x.transpose(1, 2) if norm is None else turned(norm(x), freqs_cis[:, :, None]).transpose(1, 2)

        q, k = heads(attn.to_q(hidden_states), attn.norm_q), heads(attn.to_k(hidden_states), attn.norm_k)
        mask = None if attention_mask is None else attention_mask[:, None, None]
        out = F.scaled_dot_product_attention(q, k, heads(attn.to_v(hidden_states)), attn_mask=mask).transpose(1, 2).flatten(2)
        if self.name.startswith("layers."):
            image, others = out[:, : self.change.image], out[:, self.change.image :]
            out = torch.cat([self.change(image.contiguous(), self.name), others], 1)
        return attn.to_out[0](out)


class Around:
    """Puts a transcription around a pipeline's denoiser: every branch is a call of its own, in the pipeline's own order of rows."""

    def __init__(self, pipe, texts, n):
        """``texts`` to avoid, one for each prompt, of ``n`` images each."""
        encoded = pipe.encode_prompt([*texts], do_classifier_free_guidance=False)[0]
        self.pipe, self.negative = pipe, [text for text in encoded for _ in range(n)]
        self.images = len(self.negative)
        self.original = pipe.transformer.forward
        pipe.transformer.forward = self.forward

    def call(self, x, t, texts):
        return torch.stack(self.original(x, t, texts, return_dict=False)[0])


class Pushed(Around):
    """``e - strength (e_neg - e)``, where ``e`` is guided with ``scale`` if the batch has two halves.

    The strength is ``method.scale``, or what the posterior of dynamic negative guidance makes of it; ``history`` holds that.
    """

    def __init__(self, pipe, texts, n, method, scale=0.0, dynamic=False):
        super().__init__(pipe, texts, n)
        self.method, self.scale, self.dynamic, self.taken = method, scale, dynamic, 0
        self.history = [torch.full((self.images,), getattr(method, "prior", 0.0), dtype=torch.float64)]
        if dynamic:
            self.step, pipe.scheduler.step = pipe.scheduler.step, self.stepped

    def forward(self, x, t, texts, **options):
        n = self.images
        given = self.call(x, t, texts)
        self.away = self.call(x[:n], t[:n], self.negative)
        self.base = given if len(given) == n else given[:n] + self.scale * (given[:n] - given[n:])
        p, strength = self.history[-1], self.method.scale
        if self.dynamic:
            strength = (strength * p / (1 - p)).view(-1, 1, 1, 1, 1)
        pushed = self.base - strength * (self.away - self.base)
        return ([*pushed] * (len(given) // n),)

    def stepped(self, prediction, t, x, **options):
        following = self.step(prediction, t, x, **options)
        (a, b), (a_next, b_next) = levels(self.pipe.scheduler)[self.taken : self.taken + 2]
        self.taken += 1
        p = self.history[-1]
        if b_next > 0:
            now, then = (a, b, b / a if a else math.inf), (a_next, b_next / a_next)
            base, away = (-predicted.squeeze(2) for predicted in (self.base, self.away))
            p = update(p, x.double(), following[0].double(), base, away, now, then, "flow", self.method, None)
        self.history.append(p)
        return following


class Guided(Around):
    """Normalized attention guidance: every conditional row once more under the negative text, both with the blend of both."""

    def __init__(self, pipe, texts, n, scale, tau, alpha):
        super().__init__(pipe, texts, n)
        self.scale, self.tau, self.alpha = scale, tau, alpha
        self.clamped = self.tokens = 0
        for name, module in pipe.transformer.named_modules():
            if hasattr(module, "set_processor"):
                module.set_processor(ZImageProcessor(self, name))

    def forward(self, x, t, texts, **options):
        n, self.image = self.images, x[0].shape[-2] // 2 * (x[0].shape[-1] // 2)
        given = self.call([*x, *x[:n]], torch.cat([t, t[:n]]), [*texts, *self.negative])
        return ([*given[: len(x)]],)

    def __call__(self, x, name):
        n = self.images
        positive, negative = x[:n], x[-n:]
        pushed = self.scale * positive - (self.scale - 1) * negative
        ratio = pushed.abs().sum(-1, keepdim=True) / positive.abs().sum(-1, keepdim=True)
        self.clamped, self.tokens = self.clamped + int((ratio > self.tau).sum()), self.tokens + ratio.numel()
        blend = self.alpha * pushed / ratio * ratio.clamp(max=self.tau) + (1 - self.alpha) * positive
        return torch.cat([blend, x[n:-n], blend])
