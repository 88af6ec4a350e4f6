"""The placement of the published processors, written out again as attention processors for tests.

The maths is plain and done on whole matrices: normalise, multiply, max, index, extrapolate, where.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb
from literal_flux2 import Flux2Processor, own_tokens
from literal_joint import QwenProcessor, SD3Processor
from literal_lumina import LuminaProcessor
from literal_z_image import ZImageProcessor
from tiny import attentions, denoiser, kind, of_1000

# Level of each part of the tiny UNet: the grid of the latents is halved (rounding up) as often.
LEVEL = {"down_blocks.1": 1, "mid_block": 1, "up_blocks.0": 1, "up_blocks.1": 0}


def references(mode, k, n):
    """Images of a group of ``n`` that image ``k`` is pushed away from."""
    if mode == "first":
        return [0] if k else []
    if mode == "others":
        return [i for i in range(n) if i != k]
    return list(range(k))


def merged(group, alphas, threshold, matching, mode):
    """NegToMe of the images of one group ``[n, tokens, channels]``, and the margin of its closest decision."""
    unit = F.normalize(group, dim=-1)
    result, margin = [], 1.0
    for k, x in enumerate(group):
        others = references(mode, k, len(group))
        if not others:
            result.append(x)
            continue
        r = torch.cat([group[i] for i in others])
        s = unit[k] @ torch.cat([unit[i] for i in others]).T
        over = 1 if matching == "paper" else 0
        best, index = s.max(dim=over)
        lead = (s.topk(2, dim=over).values.diff(dim=over).abs().flatten())[best > threshold]
        margin = min([margin, (best - threshold).abs().min().item(), *lead.tolist()])
        pushed = (1 + alphas[k]) * x - alphas[k] * r[index]
        result.append(torch.where((best > threshold)[:, None], pushed, x))
    return torch.stack(result), margin


class Literal:
    """Puts the test's processors on a pipeline; they take the timestep from the calls of its denoiser.

    ``margin`` is by how much the closest of all decisions (which token, merged or not) was won: bits can be
    compared only in cases in which it is well above the rounding of a cosine.
    """

    def __init__(
        self,
        pipe,
        n,
        alpha=0.9,
        threshold=0.3,
        window=(0, 1000),
        matching="paper",
        mode="first",
        blocks=None,
        min_grid=1,
        halves=1,
    ):
        self.n, self.alpha, self.threshold, self.window = n, alpha, threshold, window
        self.matching, self.mode, self.blocks, self.min_grid, self.halves = matching, mode, blocks, min_grid, halves
        self.family = kind(pipe)
        self.timestep = self.grid = None
        self.calls, self.margin = 0, 1.0
        model = denoiser(pipe)
        model.register_forward_pre_hook(self._note, with_kwargs=True)
        make = PROCESSORS[self.family]
        for path, attention in attentions(model).items():
            present = attention.processor
            if isinstance(present, IPAdapterAttnProcessor2_0):  # has weights: keep the object
                present.__class__, present.literal, present.name = IPAdapterProcessor, self, path
            else:
                attention.set_processor(make(self, path))

    def _note(self, module, args, kwargs):
        self.timestep = of_1000(module, args[1] if args else kwargs["timestep"])
        if self.family in ("sd", "sdxl"):
            self.grid = args[0].shape[-2:]
        if self.family == "flux2":
            self.own = own_tokens(kwargs)
        if self.family == "z_image":
            self.image = args[0][0].shape[-2] // 2 * (args[0][0].shape[-1] // 2)

    def selects(self, name):
        if self.blocks is not None and not name.startswith(tuple(self.blocks)):
            return False
        if self.family in ("sd", "sdxl"):
            level = next(level for part, level in LEVEL.items() if name.startswith(part))
            return min(-(-side // 2**level) for side in self.grid) >= self.min_grid
        return True

    def __call__(self, x, name):
        """``x [rows, image tokens, channels]`` of the attention called ``name``."""
        low, high = self.window
        if not (low <= self.timestep <= high and self.selects(name)):
            return x
        self.calls += 1
        alphas = self.alpha(self.timestep) if callable(self.alpha) else self.alpha
        alphas = alphas if isinstance(alphas, tuple) else (alphas,) * self.n
        halves = x.chunk(self.halves)  # classifier-free guidance: each half for itself
        groups = [group for half in halves for group in half.split(self.n)]
        results = [merged(group, alphas, self.threshold, self.matching, self.mode) for group in groups]
        self.margin = min([self.margin, *(margin for _, margin in results)])
        return torch.cat([result for result, _ in results])


class FluxProcessor:
    """Joint blocks: image tokens before the output projection. Single blocks: image tokens of the output."""

    def __init__(self, literal, name):
        self.literal, self.name = literal, name

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        def heads(x, norm=None):
            x = x.view(x.shape[0], x.shape[1], attn.heads, -1)
            return x if norm is None else norm(x)

        q = heads(attn.to_q(hidden_states), attn.norm_q)
        k = heads(attn.to_k(hidden_states), attn.norm_k)
        v = heads(attn.to_v(hidden_states))
        joint = encoder_hidden_states is not None
        if joint:
            q = torch.cat([heads(attn.add_q_proj(encoder_hidden_states), attn.norm_added_q), q], 1)
            k = torch.cat([heads(attn.add_k_proj(encoder_hidden_states), attn.norm_added_k), k], 1)
            v = torch.cat([heads(attn.add_v_proj(encoder_hidden_states)), v], 1)
            self.literal.text = encoder_hidden_states.shape[1]
        q, k = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (q, k))
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=attention_mask)
        out = out.transpose(1, 2).flatten(2)
        text, image = out[:, : self.literal.text], out[:, self.literal.text :]
        image = self.literal(image, self.name)
        if not joint:
            return torch.cat([text, image], 1)
        return attn.to_out[1](attn.to_out[0](image.contiguous())), attn.to_add_out(text.contiguous())


class SDXLProcessor(AttnProcessor2_0):
    """All tokens of what the processor returns, after the output projection."""

    def __init__(self, literal, name):
        super().__init__()
        self.literal, self.name = literal, name

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        return self.literal(super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb), self.name)


class IPAdapterProcessor(IPAdapterAttnProcessor2_0):
    """As on SDXL; the IP-Adapter's part is in what the processor returns."""

    def __call__(self, *args, **kwargs):
        return self.literal(super().__call__(*args, **kwargs), self.name)


PROCESSORS = {
    "flux": FluxProcessor,
    "sd": SDXLProcessor,
    "sdxl": SDXLProcessor,
    "sd3": SD3Processor,
    "qwen": QwenProcessor,
    "chroma": FluxProcessor,
    "flux2": Flux2Processor,
    "lumina": LuminaProcessor,
    "z_image": ZImageProcessor,
}
