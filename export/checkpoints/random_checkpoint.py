"""Random weights for built-in configurations: performance work at Starling's shape, without its weights."""

import hashlib
import math
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch

from starling.export.checkpoints.checkpoint import Checkpoint, Skeleton, TokenizerFiles, skeleton_of
from starling.export.checkpoints.random_models import RANDOM_MODELS, check_random
from starling.export.checkpoints.scoring_models import pooling_of
from starling.export.tokenizers.starling_tokenizer import (
    BOS,
    END_OF_TURN,
    PAD,
    VOCAB_SIZE,
    openchat_extra_templates,
    openchat_template,
    starling_tokenizer_json,
)

if TYPE_CHECKING:
    from transformers import LlamaConfig, MistralConfig, PreTrainedConfig

SEED = 20231128
BLOCK_VALUES = 1 << 20


def open_random(name: str) -> Checkpoint:
    """A built-in configuration with random weights and the real Starling tokenizer.

    Raises CheckpointError for a name that is not in RANDOM_MODELS, or where the tokenizer's package is missing.
    """
    check_random(name)
    tokenizer = starling_tokenizer_files()
    if "score" in RANDOM_MODELS[name]:
        config: PreTrainedConfig = starling_rm_config(name)
        pooling = pooling_of(config, tokenizer, value_head=True)
        return Checkpoint("random", name, config, RandomTensors(config), tokenizer, {}, task="score", pooling=pooling)
    config = starling_config(name)
    generation = {"bos_token_id": BOS, "eos_token_id": END_OF_TURN, "pad_token_id": PAD}
    return Checkpoint("random", name, config, RandomTensors(config), tokenizer, generation)


def starling_config(name: str = "starling-7b") -> "MistralConfig":
    """The configuration of Starling-LM-7B-alpha, or of one of its smaller relatives in RANDOM_MODELS."""
    from transformers import MistralConfig

    settings: dict[str, Any] = RANDOM_MODELS[name]
    return MistralConfig(
        **settings,
        architectures=["MistralForCausalLM"],
        vocab_size=VOCAB_SIZE,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=8192,
        sliding_window=4096,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        dtype="bfloat16",
        bos_token_id=BOS,
        eos_token_id=END_OF_TURN,
        pad_token_id=PAD,
    )


def starling_rm_config(name: str = "starling-rm-7b") -> "LlamaConfig":
    """The configuration of Starling-RM-7B-alpha's trunk, Llama-2-7b-chat, or of one of its smaller relatives.

    The vocabulary is the other models': 32,002 tokens in place of 32,000.
    """
    from transformers import LlamaConfig

    settings: dict[str, Any] = {key: value for key, value in RANDOM_MODELS[name].items() if key != "score"}
    return LlamaConfig(
        **settings,
        architectures=["LlamaForSequenceClassification"],
        id2label={index: f"LABEL_{index}" for index in range(int(RANDOM_MODELS[name]["score"]))},
        vocab_size=VOCAB_SIZE,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        dtype="bfloat16",
        bos_token_id=BOS,
        eos_token_id=2,
        pad_token_id=0,
    )


def starling_tokenizer_files() -> TokenizerFiles:
    """Starling's tokenizer with its three chat templates."""
    named = {"bos_token": "<s>", "eos_token": "<|end_of_turn|>", "unk_token": "<unk>", "pad_token": "<|pad_0|>"}
    return TokenizerFiles(
        tokenizer_json=starling_tokenizer_json(),
        tokenizer_config={
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "add_bos_token": True,
            "add_eos_token": False,
            **named,
        },
        special_tokens_map=dict(named),
        chat_template=openchat_template(),
        additional_chat_templates=openchat_extra_templates(),
        bos=BOS,
        eos=(END_OF_TURN,),
        pad=PAD,
    )


class RandomTensors:
    """A TensorSource that makes every row block from (seed, name, block) alone, when it is asked for.

    Norms are ones, biases zeros, matrices normal with the configuration's initializer_range. What writes into the
    residual stream is scaled by 1/sqrt(2 * layers), as in GPT-2, so that activations stay far inside float16.
    """

    def __init__(self, config: "PreTrainedConfig", seed: int = SEED) -> None:
        self._skeleton: Skeleton = skeleton_of(config)
        self._dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
        self._std: float = config.initializer_range
        self._residual_scale = 1 / math.sqrt(2 * config.num_hidden_layers)
        self._seed = seed

    def names(self) -> Collection[str]:
        """See TensorSource."""
        return [name for name in self._skeleton.shapes if name not in self._skeleton.tied]

    def shape(self, name: str) -> tuple[int, ...]:
        """See TensorSource."""
        return self._skeleton.shapes[name]

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """See TensorSource."""
        height, *rest = self.shape(name)
        stop = min(stop, height)
        if not rest:
            fill = torch.zeros if name.endswith(".bias") else torch.ones
            return fill(stop - start, dtype=self._dtype)
        block_rows = max(1, BLOCK_VALUES // math.prod(rest))
        out = torch.empty((stop - start, *rest), dtype=self._dtype)
        for block in range(start // block_rows, -(-stop // block_rows)):
            first, last = block * block_rows, min((block + 1) * block_rows, height)
            low, high = max(first, start), min(last, stop)
            if (low, high) == (first, last):
                self._fill(out[low - start : high - start], name, block)
            else:
                whole = torch.empty((last - first, *rest), dtype=self._dtype)
                out[low - start : high - start] = self._fill(whole, name, block)[low - first : high - first]
        return out

    def _fill(self, block: torch.Tensor, name: str, number: int) -> torch.Tensor:
        digest = hashlib.blake2b(f"{self._seed}/{name}/{number}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest))
        scale = self._residual_scale if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
        return block.normal_(std=self._std * scale, generator=generator)
