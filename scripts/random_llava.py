"""A LLaVA 1.5 of given shapes whose weights are random numbers: what speed and memory depend on, without the download."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from captioning.styles import STYLES

SPECIAL = ("<pad>", "<s>", "</s>", "<image>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>")
CHAT = (
    "{% for message in messages %}{{ message.role | upper }}: {% for part in message.content %}"
    "{% if part.type == 'image' %}<image>\n{% else %}{{ part.text }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""A conversation as LLaVA 1.5 was trained on it."""


@dataclass(frozen=True)
class LlavaSize:
    """Shapes of a LLaVA 1.5: a Llama, and CLIP's vision tower."""

    name: str
    text: dict[str, Any]
    vision: dict[str, Any]


# text_config and vision_config of llava-hf/llava-1.5-7b-hf.
SEVEN_B = LlavaSize(
    "LLaVA-1.5-7B, random weights",
    {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064},
    {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14},
)
TINY = LlavaSize(
    "tiny, random weights",
    {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 640},
    {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
)


def tokenizer() -> PreTrainedTokenizerFast:
    """A real byte-level BPE, trained on our instructions, so that a prompt has about as many tokens as LLaVA's own would make of it."""
    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False)
    tokens.train_from_iterator([instruction for _, instruction in STYLES.values()], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def write_llava(folder: Path, size: LlavaSize, device: torch.device, dtype: torch.dtype, spread: float = 0.02) -> Path:
    """Write the model with its processor as the hub's repositories have them. spread: standard deviation of the weights."""
    words = tokenizer()
    side, patch = size.vision["image_size"], size.vision["patch_size"]
    ids = {f"{name}_token_id": words.convert_tokens_to_ids(token) for name, token in (("pad", "<pad>"), ("bos", "<s>"), ("eos", "</s>"))}
    config = LlavaConfig(
        text_config=LlamaConfig(**size.text, **ids, max_position_embeddings=4096, initializer_range=spread),
        vision_config=CLIPVisionConfig(**size.vision, projection_dim=size.vision["hidden_size"]),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        image_seq_length=(side // patch) ** 2,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    model.generation_config.eos_token_id = ids["eos_token_id"]
    model.save_pretrained(folder)
    del model
    pictures = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    options = {"patch_size": patch, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1, "chat_template": CHAT}
    LlavaProcessor(pictures, words, **options).save_pretrained(folder)
    return folder
