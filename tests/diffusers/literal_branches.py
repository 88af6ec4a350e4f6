"""Guidance away from a prompt, written out around the denoiser of a pipeline: every branch is a call of its own."""

from __future__ import annotations

import math

import torch
from literal import PROCESSORS
from literal_flux2 import own_tokens
from tiny import attentions, kind, of_1000
from tiny_flux2 import TEXT
from transcription import levels, update


def text_inputs(pipe, texts, n):
    """The denoiser's inputs that ``texts`` become, one row per image; a list of texts of one length needs no mask."""
    with torch.no_grad():
        if kind(pipe) == "sd3":
            options = {"num_images_per_prompt": n, "do_classifier_free_guidance": False, "max_sequence_length": 11}
            embeds, _, pooled, _ = pipe.encode_prompt(texts, None, None, **options)
            return {"encoder_hidden_states": embeds, "pooled_projections": pooled}
        if kind(pipe) == "chroma":
            options = {"num_images_per_prompt": n, "do_classifier_free_guidance": False, "max_sequence_length": 17}
            embeds, _, mask, *_ = pipe.encode_prompt(texts, **options)
            return {"encoder_hidden_states": embeds, "attention_mask": torch.nn.functional.pad(mask, (0, 35), value=1)}
        if kind(pipe) == "flux2":
            return {"encoder_hidden_states": pipe.encode_prompt(texts, num_images_per_prompt=n, **TEXT)[0]}
        if kind(pipe) == "lumina":  # as negative prompts, which have no system prompt before them
            mine = [text for text in texts for _ in range(n)]  # the pipeline gives images the masks of other prompts
            options = {"negative_prompt": mine, "max_sequence_length": 40}
            embeds, mask = pipe.encode_prompt(mine, **options)[2:]
            return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}
        embeds, mask = pipe.encode_prompt(texts, num_images_per_prompt=n)
        return {"encoder_hidden_states": embeds, "encoder_hidden_states_mask": mask}


class Pushed:
    """Puts ``e - strength (e_neg - e)`` on a pipeline, where ``e`` is guided with ``scale`` if its batch has two halves.

    The strength is ``method.scale``, or what the posterior of dynamic negative guidance makes of it; ``history`` holds that.
    """

    def __init__(self, pipe, negative, method, scale=1.0, dynamic=False):
        self.negative, self.method, self.scale, self.dynamic = negative, method, scale, dynamic
        self.images = len(negative["encoder_hidden_states"])
        self.original, self.scheduler = pipe.transformer.forward, pipe.scheduler
        self.step, self.taken, self.kind = pipe.scheduler.step, 0, kind(pipe)
        pipe.transformer.forward = self.forward
        p = getattr(method, "prior", 0.0)
        self.history = [torch.full((self.images,), p, dtype=torch.float64)]
        if dynamic:
            pipe.scheduler.step = self.stepped

    def forward(self, **inputs):
        n = self.images
        given = self.original(**inputs)[0]
        rows = {name: inputs[name][-n:] for name in ("hidden_states", "timestep")}
        self.away = self.original(**{**inputs, **rows, **self.negative})[0]
        if "img_ids" in inputs:
            given, self.away = (x[:, : own_tokens(inputs)] for x in (given, self.away))
        self.base = given[-n:] if len(given) == n else given[:n] + self.scale * (given[n:] - given[:n])
        strength = self.method.scale
        if self.dynamic:
            p = self.history[-1]
            strength = (strength * p / (1 - p)).view(-1, *[1] * (given.ndim - 1))
        pushed = self.base - strength * (self.away - self.base)
        return (torch.cat([pushed] * (len(given) // n)),)

    def stepped(self, prediction, t, x, **options):
        following = self.step(prediction, t, x, **options)
        (a, b), (a_next, b_next) = levels(self.scheduler)[self.taken : self.taken + 2]
        s, s_next = b / a if a else math.inf, b_next / a_next
        self.taken += 1
        p, base, away = self.history[-1], self.base, self.away
        if self.kind == "lumina":  # whose pipeline gives the scheduler what it predicts with the opposite sign
            base, away = -base, -away
        if s_next > 0:
            p = update(p, x, following[0], base, away, (a, b, s), (a_next, s_next), "flow", self.method, None)
        self.history.append(p)
        return following


class Guided:
    """Puts normalized attention guidance on a pipeline: every conditional row once more under the negative text.

    In every attention, both rows get the blend of both, as the paper's equations have it.
    """

    def __init__(self, pipe, negative, scale, tau, alpha, window=(0, 1000)):
        self.negative, self.scale, self.tau, self.alpha, self.window = negative, scale, tau, alpha, window
        self.images = len(negative["encoder_hidden_states"])
        self.model, self.original = pipe.transformer, pipe.transformer.forward
        self.clamped = self.tokens = 0
        self.active = False
        pipe.transformer.forward = self.forward
        make = PROCESSORS[kind(pipe)]
        for name, attention in attentions(pipe.transformer).items():
            attention.set_processor(make(self, name))

    def forward(self, **inputs):
        low, high = self.window
        self.active = low <= of_1000(self.model, inputs["timestep"]) <= high
        if "img_ids" in inputs:
            self.own = own_tokens(inputs)
        if not self.active:
            return self.original(**inputs)
        rows, n = len(inputs["hidden_states"]), self.images
        names = ("hidden_states", "timestep", "pooled_projections")
        more = {name: torch.cat([inputs[name], inputs[name][-n:]]) for name in names if name in inputs}
        if "attention_mask" in inputs:
            more["attention_mask"] = torch.cat([inputs["attention_mask"], self.negative["attention_mask"]])
        for name in ("encoder_hidden_states", "encoder_hidden_states_mask", "encoder_attention_mask"):
            if inputs.get(name) is not None or self.negative.get(name) is not None:
                more[name] = joined(inputs, self.negative, name)
        return (self.original(**{**inputs, **more})[0][:rows],)

    def __call__(self, x, name):
        if not self.active:
            return x
        n = self.images
        positive, negative = x[-2 * n : -n], x[-n:]
        pushed = self.scale * positive - (self.scale - 1) * negative
        ratio = pushed.abs().sum(-1, keepdim=True) / positive.abs().sum(-1, keepdim=True)
        self.clamped, self.tokens = self.clamped + int((ratio > self.tau).sum()), self.tokens + ratio.numel()
        blend = self.alpha * pushed / ratio * ratio.clamp(max=self.tau) + (1 - self.alpha) * positive
        return torch.cat([x[: -2 * n], blend, blend])


def joined(inputs, negative, name):
    """Both texts, or both masks, filled up with zeros to the longer of them."""
    longest = max(part["encoder_hidden_states"].shape[1] for part in (inputs, negative))
    values = []
    for part in (inputs, negative):
        value = part.get(name)
        if value is None:
            value = torch.ones(part["encoder_hidden_states"].shape[:2], dtype=torch.bool)
        filled = value.new_zeros(len(value), longest, *value.shape[2:])
        filled[:, : value.shape[1]] = value
        values.append(filled.bool() if filled.ndim == 2 else filled)
    return torch.cat(values)
