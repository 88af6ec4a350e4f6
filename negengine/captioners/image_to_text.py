"""Any image-to-text model of transformers as a captioner: BLIP, BLIP-2, LLaVA and their like."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self


REQUEST = "Say in one short, plain sentence what this picture shows."


class ImageToText:
    """Captions with a model of transformers, always in the same words for the same picture (no sampling).

    Models for captions (BLIP, BLIP-2) need no prompt; one that is given begins their caption, or asks them a
    question. Models that chat (LLaVA and later) are asked in their chat template, or in ``prompt`` with the place of
    the picture put first if the prompt does not name it.

    Args:
        model: with ``generate``, in evaluation mode.
        processor: of the model.
        prompt: text that is given with the picture; None: none, or for models that chat ``REQUEST``.
        max_new_tokens: of a caption, 1 or more.
        device: to which the model is moved; None leaves it where it is.
        identity: tells this captioner from others in a :class:`~negengine.captioners.CaptionCache`; by default
            where the model was loaded from, with the prompt.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        prompt: str | None = None,
        max_new_tokens: int = 50,
        device: str | torch.device | None = None,
        identity: str | None = None,
    ) -> None:
        if not callable(getattr(model, "generate", None)):
            raise TypeError(f"{type(model).__name__} writes no text: it has no generate")
        if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be 1 or more, got {max_new_tokens!r}")
        self.model = model if device is None else model.to(device)
        self.processor, self.max_new_tokens = processor, max_new_tokens
        self.chats = bool(getattr(processor, "chat_template", None))
        self.prompt = REQUEST if prompt is None and self.chats else prompt
        self.identity = identity or self._identity()

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        prompt: str | None = None,
        max_new_tokens: int = 50,
        device: str | torch.device | None = None,
        dtype: Any = "auto",
        **loading: Any,
    ) -> Self:
        """Load a model and its processor, such as ``"Salesforce/blip-image-captioning-base"``.

        Args:
            name: hub id or folder.
            dtype: of the weights; ``"auto"``: as they are stored.
            loading: further arguments of ``from_pretrained`` for both, such as ``local_files_only``.

        Raises:
            ValueError: transformers knows no such image-to-text model. OSError: it is not there.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor

        model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, **loading).eval()
        return cls(model, AutoProcessor.from_pretrained(name, **loading), prompt, max_new_tokens, device)

    def __call__(self, image: Image.Image) -> str:
        import torch

        inputs = self._inputs(image.convert("RGB")).to(self.model.device, self.model.dtype)
        given = inputs.get("input_ids")
        with torch.no_grad():
            written = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)[0]
        if given is not None and torch.equal(written[: given.shape[1]], given[0]):
            written = written[given.shape[1] :]  # decoders repeat what they were given
        return self.processor.decode(written, skip_special_tokens=True).strip()

    def _inputs(self, image: Image.Image) -> Any:
        if self.chats:
            content = [{"type": "image"}, {"type": "text", "text": self.prompt}]
            text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        elif self.prompt is not None:
            text = self._with_place(self.prompt)
        else:
            return self.processor(images=image, return_tensors="pt")
        return self.processor(images=image, text=text, return_tensors="pt")

    def _with_place(self, prompt: str) -> str:
        """A prompt that says where the picture is, for models that read a place for it in the text."""
        place = str(getattr(self.processor, "image_token", None) or "")
        places_itself = hasattr(self.processor, "num_query_tokens")  # BLIP-2 and its kin
        return prompt if not place or places_itself or place in prompt else f"{place}\n{prompt}"

    def _identity(self) -> str | None:
        name = getattr(self.model, "name_or_path", "")
        return f"{name}, prompt {self.prompt!r}, {self.max_new_tokens} tokens" if name else None
