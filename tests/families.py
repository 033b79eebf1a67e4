"""Families of transformers at tiny sizes, and what their attention is, said by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers as tf

VOCABULARY, TOKENS = 99, 12
SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "vocab_size": VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 2}
IMAGE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
SEQ2SEQ = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1,
}  # fmt: skip


class Family(NamedTuple):
    """Attributes:
    make: the model, for an attention implementation.
    inputs: of ``INPUTS``.
    causal: of its modules, in their order.
    windows: of its layers, where there are any.
    attentions: the output's fields that hold the modules' maps.
    """

    make: Callable[[], Any]
    inputs: str
    causal: tuple[bool, ...] = (False,)
    windows: tuple[int | None, ...] = (None, None)
    attentions: tuple[str, ...] = ("attentions",)


def text() -> dict[str, torch.Tensor]:
    """Padded on the right, on the left, and not at all."""
    mask = torch.ones(3, TOKENS, dtype=torch.long)
    mask[0, 8:] = 0
    mask[1, :3] = 0
    ids = torch.randint(5, VOCABULARY, (3, TOKENS), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": mask}


def pixels(count: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {"pixel_values": torch.randn(count, 3, 32, 32, generator=generator)}


def seq2seq() -> dict[str, torch.Tensor]:
    both = text()
    decoder = {f"decoder_{k}": v[:, :9] for k, v in both.items()}
    return {**both, **decoder}


def audio() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(3, 8, 32, generator=generator)
    return {"input_features": features, "decoder_input_ids": text()["input_ids"][:, :9]}


INPUTS: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
    "text": text,
    "image": pixels,
    "both": lambda: {**text(), **pixels()},
    "seq2seq": seq2seq,
    "audio": audio,
}
TWO = ("text_model_output.attentions", "vision_model_output.attentions")
CODERS = ("encoder_attentions", "decoder_attentions")

# the tapped loss must be that of the maps which the eager model returns
EQUAL: dict[str, Family] = {
    "bert": Family(lambda: tf.BertModel(tf.BertConfig(**SMALL)), "text"),
    "roberta": Family(lambda: tf.RobertaModel(tf.RobertaConfig(**SMALL)), "text"),
    "electra": Family(
        lambda: tf.ElectraModel(tf.ElectraConfig(**SMALL, embedding_size=32)), "text"
    ),
    "distilbert": Family(
        lambda: tf.DistilBertModel(
            tf.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=48, vocab_size=99)
        ),
        "text",
    ),
    "modernbert": Family(
        lambda: tf.ModernBertModel(
            tf.ModernBertConfig(
                **SMALL, local_attention=6, global_attn_every_n_layers=2, cls_token_id=1,
                sep_token_id=2,
            )
        ),
        "text",
        windows=(None, 4),
    ),
    "gpt2": Family(
        lambda: tf.GPT2Model(
            tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99, n_positions=64)
        ),
        "text",
        (True,),
    ),
    "gpt_neox": Family(lambda: tf.GPTNeoXModel(tf.GPTNeoXConfig(**SMALL)), "text", (True,)),
    "opt": Family(
        lambda: tf.OPTModel(
            tf.OPTConfig(
                hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48,
                vocab_size=99, max_position_embeddings=64, word_embed_proj_dim=32,
            )
        ),
        "text",
        (True,),
    ),
    "llama": Family(lambda: tf.LlamaModel(tf.LlamaConfig(**GROUPED)), "text", (True,)),
    "qwen2": Family(lambda: tf.Qwen2Model(tf.Qwen2Config(**GROUPED)), "text", (True,)),
    "qwen3": Family(
        lambda: tf.Qwen3Model(tf.Qwen3Config(**GROUPED, head_dim=16)), "text", (True,)
    ),
    "mistral": Family(
        lambda: tf.MistralModel(tf.MistralConfig(**GROUPED, sliding_window=5)),
        "text",
        (True,),
        (5, 5),
    ),
    "phi": Family(lambda: tf.PhiModel(tf.PhiConfig(**SMALL)), "text", (True,)),
    "gemma3": Family(
        lambda: tf.Gemma3TextModel(
            tf.Gemma3TextConfig(
                **GROUPED, head_dim=8, sliding_window=5,
                layer_types=["sliding_attention", "full_attention"],
            )
        ),
        "text",
        (True,),
        (5, None),
    ),
    "vit": Family(lambda: tf.ViTModel(tf.ViTConfig(**IMAGE)), "image"),
    "deit": Family(lambda: tf.DeiTModel(tf.DeiTConfig(**IMAGE)), "image"),
    "dinov2": Family(
        lambda: tf.Dinov2Model(
            tf.Dinov2Config(**{k: v for k, v in IMAGE.items() if k != "intermediate_size"})
        ),
        "image",
    ),
    "clip": Family(
        lambda: tf.CLIPModel(
            tf.CLIPConfig(text_config=SMALL, vision_config=IMAGE, projection_dim=16)
        ),
        "both",
        (True, False),
        attentions=TWO,
    ),
    "siglip": Family(
        lambda: tf.SiglipModel(tf.SiglipConfig(text_config=SMALL, vision_config=IMAGE)),
        "both",
        (False, False),
        attentions=TWO,
    ),
    "bart": Family(
        lambda: tf.BartModel(tf.BartConfig(**SEQ2SEQ, max_position_embeddings=64)),
        "seq2seq",
        (False, True),
        attentions=CODERS,
    ),
    "whisper": Family(
        lambda: tf.WhisperModel(
            tf.WhisperConfig(
                **SEQ2SEQ, max_source_positions=16, max_target_positions=32, num_mel_bins=8
            )
        ),
        "audio",
        (False, True),
        attentions=CODERS,
    ),
}  # fmt: skip

# refused, by reason
REFUSED: dict[str, tuple[Callable[[], Any], str, str]] = {
    "t5": (
        lambda: tf.T5Model(
            tf.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=99)
        ),
        "seq2seq",
        "adds a position bias",
    ),
    "swin": (
        lambda: tf.SwinModel(
            tf.SwinConfig(
                image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4],
                window_size=4,
            )
        ),
        "image",
        "adds a (learned )?bias",
    ),
    "gemma2": (
        lambda: tf.Gemma2Model(tf.Gemma2Config(**GROUPED, head_dim=8)),
        "text",
        "caps its scores",
    ),
    "deberta-v2": (
        lambda: tf.DebertaV2Model(
            tf.DebertaV2Config(**SMALL, relative_attention=True, pos_att_type=["c2p", "p2c"])
        ),
        "text",
        "written by hand",
    ),
    "mpnet": (lambda: tf.MPNetModel(tf.MPNetConfig(**SMALL)), "text", "written by hand"),
}  # fmt: skip
