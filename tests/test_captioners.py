"""Captioners on the real classes of transformers, tiny and random; a person; and the captions on the disk."""

import io
import json
import sys

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    OPTConfig,
    PreTrainedTokenizerFast,
)

from negengine import captioners
from negengine.captioners import CaptionCache, CaptionError, ImageToText, Person
from negengine.captioners.image_to_text import REQUEST

SPECIAL = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "<image>"]
WORDS = [*SPECIAL, "a", "photo", "of", "red", "blue", "cat", "dog", "tree", "sea", "sky", "big", "user", "assistant", "say", "what"]
SIZE, STEPS = 16, 6
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": SIZE,
    "patch_size": 8,
}
TEXT = {"vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CHAT = (
    "{% for m in messages %}{{ m.role }} {% for c in m.content %}{% if c.type == 'image' %}<image>{% else %} {{ c.text }}"
    "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %} assistant{% endif %}"
)


def tokenizer(around="$A"):
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single=around, special_tokens=[("[BOS]", 1), ("[EOS]", 2)])
    special = {"pad_token": "[PAD]", "bos_token": "[BOS]", "eos_token": "[EOS]", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=words, additional_special_tokens=["<image>"], **special)


def sharp(model, head):
    """Random weights that do not say the same word whatever they see, nor end at once."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.6)
    bias = torch.zeros(len(WORDS))
    bias[: len(SPECIAL)] = -100.0
    head.bias = torch.nn.Parameter(bias)
    return model.eval()


def blip():
    text = {**TEXT, **IDS, "sep_token_id": 2, "encoder_hidden_size": 16, "projection_dim": 16, "max_position_embeddings": 32}
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=VISION, projection_dim=16))
    images = BlipImageProcessor(size={"height": SIZE, "width": SIZE})
    return sharp(model, model.text_decoder.cls.predictions.decoder), BlipProcessor(images, tokenizer("[BOS] $A [EOS]"))


def blip2():
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**VISION).to_dict(),
        qformer_config=Blip2QFormerConfig(**{**TEXT, "encoder_hidden_size": 16, "cross_attention_frequency": 1}).to_dict(),
        text_config=OPTConfig(**{**TEXT, **IDS, "ffn_dim": 16, "word_embed_proj_dim": 16, "max_position_embeddings": 64}).to_dict(),
        num_query_tokens=3,
        image_token_index=WORDS.index("<image>"),
    )
    images = BlipImageProcessor(size={"height": SIZE, "width": SIZE})
    processor = Blip2Processor(images, tokenizer(), num_query_tokens=3)
    model = Blip2ForConditionalGeneration(config)
    return sharp(model, model.get_output_embeddings()), processor


def llava(chat_template=CHAT):
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**TEXT, **IDS, num_key_value_heads=2, max_position_embeddings=128),
        image_token_index=WORDS.index("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    images = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    processor = LlavaProcessor(
        images,
        tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template,
    )
    model = LlavaForConditionalGeneration(config)
    return sharp(model, model.get_output_embeddings()), processor


def greedy(start, logits):
    """The most probable word, step by step."""
    ids = torch.tensor([start])
    for _ in range(STEPS):
        ids = torch.cat([ids, logits(ids)[:, -1].argmax(-1, keepdim=True)], 1)
    return " ".join(WORDS[i] for i in ids[0, len(start) :].tolist())


def ids(text):
    return [WORDS.index(word) if word in WORDS else WORDS.index("[UNK]") for word in text.split()]


@pytest.fixture
def picture():
    return Image.frombytes("RGB", (20, 20), bytes(range(240)) * 5)


def test_blip_captions_without_a_prompt_and_goes_on_from_one(picture):
    model, processor = blip()
    seen = model.vision_model(processor.image_processor(picture, return_tensors="pt").pixel_values)[0]

    def logits(tokens):
        return model.text_decoder(tokens, encoder_hidden_states=seen).logits

    assert ImageToText(model, processor, max_new_tokens=STEPS)(picture) == greedy([1], logits)
    begun = ImageToText(model, processor, prompt="a photo of", max_new_tokens=STEPS)(picture)
    assert begun == "a photo of " + greedy([1, *ids("a photo of")], logits)


def test_blip2_captions_without_a_prompt_and_answers_one(picture):
    model, processor = blip2()
    pixels = processor.image_processor(picture, return_tensors="pt").pixel_values

    def logits(tokens):
        return model(pixel_values=pixels, input_ids=tokens).logits

    place = ids("<image> <image> <image>")
    assert ImageToText(model, processor, max_new_tokens=STEPS)(picture) == greedy([*place, 1], logits)
    asked = ImageToText(model, processor, prompt="say what", max_new_tokens=STEPS)
    assert asked(picture) == greedy([*place, *ids("say what")], logits)


@pytest.mark.parametrize(
    "template, prompt, text",
    [
        (CHAT, "say what", "user {place} say what assistant"),
        (CHAT, None, f"user {{place}} {REQUEST} assistant"),
        (None, "say what", "{place} say what"),
        (None, "user <image> say what assistant", "user {place} say what assistant"),
    ],
)
def test_models_that_chat_are_asked_and_their_answer_alone_is_returned(picture, template, prompt, text):
    model, processor = llava(template)
    pixels = processor.image_processor(picture, return_tensors="pt").pixel_values
    place = "<image> " * (SIZE // 8) ** 2
    expected = greedy(ids(text.format(place=place)), lambda tokens: model(pixel_values=pixels, input_ids=tokens).logits)
    assert ImageToText(model, processor, prompt=prompt, max_new_tokens=STEPS)(picture) == expected


def test_captions_hang_on_the_picture(picture):
    captioner = ImageToText(*blip2(), max_new_tokens=STEPS)
    assert captioner(picture) != captioner(Image.new("RGB", (20, 20), "white"))
    assert captioner(picture.convert("RGBA")) == captioner(picture)


def test_a_captioner_is_loaded_from_a_folder(tmp_path, picture):
    model, processor = blip()
    model.save_pretrained(tmp_path), processor.save_pretrained(tmp_path)
    loaded = ImageToText.from_pretrained(str(tmp_path), max_new_tokens=STEPS, device="cpu")
    assert isinstance(loaded.model, BlipForConditionalGeneration)
    assert isinstance(loaded(picture), str)
    assert str(tmp_path) in loaded.identity
    assert loaded.identity != ImageToText(loaded.model, loaded.processor, prompt="a photo of").identity


def test_bad_settings_of_a_captioning_model_are_refused():
    model, processor = blip()
    with pytest.raises(TypeError, match="has no generate"):
        ImageToText(torch.nn.Linear(1, 1), processor)
    with pytest.raises(ValueError, match="max_new_tokens"):
        ImageToText(model, processor, max_new_tokens=0)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_person_sees_the_path_of_the_picture_and_answers(tmp_path, picture, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", Terminal("a red  car \n"))
    assert captioners.ask(Person(folder=tmp_path / "new"), picture) == "a red car"
    (file,) = (tmp_path / "new").iterdir()
    assert str(file) in capsys.readouterr().out
    assert Image.open(file).tobytes() == picture.tobytes()


def test_nobody_at_the_terminal_is_told_at_once(monkeypatch, picture, tmp_path):
    monkeypatch.setattr(sys, "stdin", io.StringIO("a red car\n"))
    with pytest.raises(RuntimeError, match="the standard input is none; give another captioner"):
        Person()
    questions = []
    assert Person(tmp_path, ask=lambda question: questions.append(question) or "sea")(picture) == "sea"
    assert "What does this picture show" in questions[0]


@pytest.mark.parametrize("answer", ["", " \n", None, 3, ["a"]])
def test_what_is_no_caption_is_refused(answer, picture):
    with pytest.raises(ValueError, match="the captioner returned"):
        captioners.ask(lambda image: answer, picture)


def test_a_captioner_is_shown_rgb():
    assert captioners.ask(lambda image: image.mode, Image.new("L", (2, 2))) == "RGB"


def named(image):
    return "a"


def test_captioners_are_told_apart():
    assert captioners.identity(named) == f"{__name__}.named"
    assert captioners.identity(lambda image: "a") is None
    assert captioners.identity(Person(ask=input)) == "person"
    assert ImageToText(*blip()).identity is None
    assert ImageToText(*blip(), identity="mine").identity == "mine"


FACTS = {"prompt": "a cat", "seed": 3, "guidance": 7.5, "call": {"height": 32}}


def png(image):
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def test_a_caption_is_kept_with_its_picture(tmp_path, picture):
    cache = CaptionCache(tmp_path / "new")
    assert cache.find(FACTS) is None
    cache.keep(FACTS, "ein Bär", png(picture))
    caption, kept = CaptionCache(tmp_path / "new").find(dict(reversed(FACTS.items())))
    assert (caption, kept.tobytes()) == ("ein Bär", picture.tobytes())
    assert {file.suffix for file in (tmp_path / "new").iterdir()} == {".json", ".png"}
    for change in ({"seed": 4}, {"guidance": 7.0}, {"call": {"height": 64}}, {"call": {"height": 32, "image": picture}}):
        assert cache.find(FACTS | change) is None


def test_pictures_and_tensors_are_told_apart_by_content(picture):
    other = picture.copy()
    other.putpixel((0, 0), (1, 2, 3))
    values = [picture, other, picture.convert("L"), torch.ones(2), torch.zeros(2), torch.ones(2, 1), torch.ones(2).numpy() * 2]
    found = [captioners.cache.fingerprint([value]) for value in values]
    assert len({json.dumps(value) for value in found}) == len(values)
    assert captioners.cache.fingerprint([picture.copy()]) == found[0]
    with pytest.raises(TypeError, match="call without a cache"):
        captioners.cache.fingerprint({"callback": print})


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"caption": "a"}', b'{"caption": "", "facts": {}}', b"\xff", None])
def test_a_damaged_file_is_named(tmp_path, picture, text):
    cache = CaptionCache(tmp_path)
    cache.keep(FACTS, "a dog", png(picture))
    (path,) = tmp_path.glob("*.json")
    if text is not None:
        path.write_bytes(text)
    else:
        path.with_suffix(".png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=f"{path.stem}.* damaged"):
        cache.find(FACTS)


def test_a_file_that_speaks_of_something_else_is_damaged(tmp_path, picture):
    cache = CaptionCache(tmp_path)
    cache.keep(FACTS, "a dog", png(picture))
    (path,) = tmp_path.glob("*.json")
    path.write_text(path.read_text().replace('"a cat"', '"a cow"'))
    with pytest.raises(ValueError, match="does not hold what its name says"):
        cache.find(FACTS)


def test_the_error_of_a_captioner_survives_a_process_boundary(picture):
    import pickle

    error = pickle.loads(pickle.dumps(CaptionError("no answer", "a cat", 3, picture)))
    assert (error.prompt, error.seed, error.image.size) == ("a cat", 3, (20, 20))
    assert "'a cat', seed 3: no answer" in str(error)
