"""Stages 3 and 4: CLIP and T5 tokenizers trained on the captions, and text encoders of the real classes that read them."""

import json
import math
import random
import re
import string
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from lorabooth.mini import MAX_SEQUENCE_LENGTH, world
from scripts.mini.common import Training, compute, device

CLIP_TOKENS = 77
WIDTH = 128
BATCH = 192


def captions(seed: int, count: int) -> Iterator[str]:
    """Descriptions of random people, in full and in part."""
    rng = random.Random(seed)
    for _ in range(count):
        yield caption(world.sample_person(rng), rng)


def caption(person: world.Person, rng: random.Random) -> str:
    """A training caption of a person."""
    return sentence(person, said_attributes(rng), rng)


def said_attributes(rng: random.Random) -> list[str]:
    """What a caption mentions: three quarters say everything, the others a part, among them the clothes-and-expression
    captions that photos of a person carry."""
    kind = rng.random()
    if kind < 0.75:
        return list(world.ATTRIBUTES)
    if kind < 0.87:
        return [a for a in world.SCENE if rng.random() < 0.8]
    chance = rng.choice((0.25, 0.5, 0.8))
    return [a for a in world.ATTRIBUTES if rng.random() < chance]


def sentence(person: world.Person, said: list[str], rng: random.Random) -> str:
    """A description with now and then a capital and a full stop, as people write."""
    text = world.describe(person, rng, say=said)
    if rng.random() < 0.2:
        text = text[0].upper() + text[1:]
    return text + "." if rng.random() < 0.1 else text


def known_words() -> Iterator[str]:
    """Every phrase of the world, held-out values too, so that each word has a token of its own."""
    for attribute in world.ATTRIBUTES:
        for value in world.values(attribute):
            yield world.phrase(attribute, value).replace("{hair_color}", "").replace("{clothes_color}", "")


def build_tokenizers(out: Path, seed: int) -> None:
    """Train both tokenizers on the captions and save them in the pipeline's folder layout."""
    texts = [*captions(seed, 20_000), *known_words()]
    clip_tokenizer(texts).save_pretrained(out / "tokenizer")
    t5_tokenizer(texts).save_pretrained(out / "tokenizer_2")


def clip_tokenizer(texts: list[str]) -> CLIPTokenizer:
    """Byte-pair encoding with all 256 bytes in the base vocabulary, so that any text tokenises without unknowns."""
    trained = json.loads(CLIPTokenizer().train_new_from_iterator(texts, vocab_size=1200, show_progress=False).backend_tokenizer.to_str())["model"]
    base = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["<|startoftext|>", "<|endoftext|>", *base, *(b + "</w>" for b in base)]
    pieces += [p for p in sorted(trained["vocab"], key=trained["vocab"].get) if p not in set(pieces)]
    merges = [tuple(m) if not isinstance(m, str) else tuple(m.split(" ")) for m in trained["merges"]]
    return CLIPTokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=merges, model_max_length=CLIP_TOKENS)


def t5_tokenizer(texts: list[str]) -> T5Tokenizer:
    """Unigram model: the captions' words with their log frequency, and every printable character at a low score.

    A world this small has few words, so the maximum-likelihood unigram model is the table of words; other text is spelt.
    """
    counts = Counter(piece for text in texts for piece in re.findall(r"[\w'-]+|[^\w\s]", text))
    total = sum(counts.values())
    vocab = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0}
    for word, count in counts.most_common():
        vocab["▁" + word if word[0].isalnum() else word] = math.log(count / total)
    for character in ["▁", *string.printable.strip(), *(chr(c) for c in range(0xC0, 0x180))]:
        vocab.setdefault(character, -25.0)
    return T5Tokenizer(vocab=list(vocab.items()), extra_ids=0, model_max_length=MAX_SEQUENCE_LENGTH)


def new_text_encoders(clip: CLIPTokenizer, t5: T5Tokenizer) -> tuple[CLIPTextModel, T5EncoderModel]:
    """Random-weight encoders, two layers each, of the classes that FLUX.1-dev uses."""
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip), hidden_size=WIDTH, intermediate_size=2 * WIDTH, projection_dim=WIDTH, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=CLIP_TOKENS, bos_token_id=clip.bos_token_id, eos_token_id=clip.eos_token_id, pad_token_id=clip.pad_token_id,
        )
    )  # fmt: skip
    text_encoder_2 = T5EncoderModel(
        T5Config(
            vocab_size=len(t5), d_model=WIDTH, d_kv=32, d_ff=2 * WIDTH, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
            dropout_rate=0.0, use_cache=False, is_encoder_decoder=False, tie_word_embeddings=False,
        )
    )  # fmt: skip
    return text_encoder, text_encoder_2


class Reader(nn.Module):
    """Both encoders with a linear head each that names every attribute of the person described, or 'unsaid'."""

    def __init__(self, text_encoder: CLIPTextModel, text_encoder_2: T5EncoderModel):
        super().__init__()
        self.text_encoder, self.text_encoder_2 = text_encoder, text_encoder_2
        self.classes = [len(world.values(a)) + 1 for a in world.ATTRIBUTES]
        self.clip_head, self.t5_head = nn.Linear(WIDTH, sum(self.classes)), nn.Linear(WIDTH, sum(self.classes))

    def forward(self, clip: Tensor, t5: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """clip [B, 77], t5 [B, L], labels [B, attributes] -> loss, share of labels both heads name right."""
        logits = (self.clip_head(self.text_encoder(clip).pooler_output), self.t5_head(self.text_encoder_2(t5)[0].mean(1)))
        split = [row.float().split(self.classes, dim=1) for row in logits]
        loss = torch.stack([F.cross_entropy(head, labels[:, i]) for heads in split for i, head in enumerate(heads)]).mean()
        right = torch.stack([head.argmax(1) == labels[:, i] for heads in split for i, head in enumerate(heads)]).float().mean()
        return loss, right


def labelled_caption(rng: random.Random) -> tuple[str, list[int]]:
    """A training caption and, for each attribute, the index of its value, or the last index where it is unsaid."""
    person = world.sample_person(rng)
    said = said_attributes(rng)
    shown = set(said) - world.hidden(person)
    if "clothes" not in shown:
        shown.discard("clothes_color")
    if "hair" not in shown:
        shown.discard("hair_color")
    labels = [world.values(a).index(person[a]) if a in shown else len(world.values(a)) for a in world.ATTRIBUTES]
    return sentence(person, said, rng), labels


def train(work: Path, out: Path, steps: int, seed: int) -> None:
    """Stage 4: teach the encoders what captions say, from text alone. FLUX.1-dev's encoders come pre-trained too; with
    untrained ones, 1,250 steps of the transformer went by without any use of the text."""
    clip, t5 = CLIPTokenizer.from_pretrained(out / "tokenizer"), T5Tokenizer.from_pretrained(out / "tokenizer_2")
    torch.manual_seed(seed)
    reader = Reader(*new_text_encoders(clip, t5)).to(device())
    training = Training(reader, work / "text.safetensors", peak=2e-3, steps=steps, ema_decay=0.99)
    bar = tqdm(range(training.step, steps), initial=training.step, total=steps, desc="text", mininterval=5)
    for step in bar:
        rng = random.Random(f"{seed}/text/{step}")
        texts, labels = zip(*[labelled_caption(rng) for _ in range(BATCH)], strict=True)
        length = rng.choices((MAX_SEQUENCE_LENGTH, 128), (95, 5))[0]
        with compute():
            loss, right = reader(*tokens(clip, t5, list(texts), length), torch.tensor(labels, device=device()))
        training.update(loss)
        bar.set_postfix(loss=f"{loss.item():.4f}", right=f"{right.item():.3f}")
        if training.step % 250 == 0:
            training.save()
    training.save()
    training.load_ema()
    reader.text_encoder.save_pretrained(out / "text_encoder")
    reader.text_encoder_2.save_pretrained(out / "text_encoder_2")


def tokens(clip: CLIPTokenizer, t5: T5Tokenizer, texts: list[str], length: int) -> tuple[Tensor, Tensor]:
    """Token ids [B, 77] and [B, length] on the training device, padded as FluxPipeline pads."""
    clip_ids = clip(texts, padding="max_length", max_length=CLIP_TOKENS, truncation=True, return_tensors="pt").input_ids
    t5_ids = t5(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    return clip_ids.to(device()), t5_ids.to(device())
