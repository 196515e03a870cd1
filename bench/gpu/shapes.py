"""Model folders with a shape and no weights, for load_format "dummy"."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

VOCAB = 128_256
# hidden, intermediate, layers, heads, KV heads, head size, tied embeddings
_SHAPES: dict[str, tuple[int, int, int, int, int, int, bool]] = {
    "1b": (2048, 8192, 16, 32, 8, 64, True),
    "8b": (4096, 14336, 32, 32, 8, 128, False),
}


def make_shape(name: str, folder: Path) -> Path:
    """Write the configuration of a Llama of about so many parameters. Returns its folder."""
    hidden, intermediate, layers, heads, kv_heads, head_size, tied = _SHAPES[name]
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": head_size, "vocab_size": VOCAB,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "tie_word_embeddings": tied, "torch_dtype": "bfloat16", "hidden_act": "silu", "bos_token_id": 1,
        "eos_token_id": 2, "attention_bias": False, "mlp_bias": False,
    }  # fmt: skip
    path = folder / name
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return path


def make_served_shape(name: str, folder: Path) -> Path:
    """Write the same with the demo model's tokenizer, whose vocabulary is filled up, so that it can be served."""
    from twinjet.models.demo import demo_model

    path, demo = make_shape(name, folder), demo_model()
    tokenizer = json.loads((demo / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    used = {*vocabulary.values(), *(added["id"] for added in tokenizer["added_tokens"])}
    vocabulary |= {f"\u0120t{i}": i for i in range(VOCAB) if i not in used}
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    shutil.copy(demo / "tokenizer_config.json", path)
    (path / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    return path
