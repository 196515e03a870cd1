"""Turns a GGUF file of the llama architecture into a Hugging Face model folder in bfloat16.

`python -m twinjet.models.convert GGUF FOLDER` runs as a process of its own, so that its memory is given back,
and prints one JSON object a line: {"phase": ..., "done": 0..1}, last {"phase": "done", "done": 1} or
{"error": ...}. FOLDER must exist; it is complete when the manifest is in it. Needs neither torch nor
transformers.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinjet.models.gguf import GgufError, GgufFile

MANIFEST = "twinjet-manifest.json"
_SPECIAL_TOKEN = 3
"""Number of a control token in tokenizer.ggml.token_type."""

Report = Callable[[str, float], None]

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML, as the model knows it, without the system message that the GGUF's own template puts before a conversation
that has none: with it, the four-bit weights answer one question in thirty with nonsense in the language of the
country asked about (docs/decisions/0112)."""

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def hf_name(gguf_name: str) -> str:
    """Give the Hugging Face name of a llama tensor. Raises GgufError for an unknown one."""
    parts = gguf_name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER_NAMES:
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.{parts[3]}"
    if len(parts) == 2 and parts[0] in _OUTER_NAMES:
        return f"{_OUTER_NAMES[parts[0]]}.{parts[1]}"
    raise GgufError(f"tensor {gguf_name} does not belong to a llama model")


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round finite floats to the nearest bfloat16, ties to even; the bits as uint16."""
    bits = values.view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def _rotate_halves(weight: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Undo GGUF's order of query and key rows: rotary pairs are neighbours there, halves here."""
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, columns)


def model_config(meta: dict[str, Any], *, has_head: bool) -> dict[str, Any]:
    """Give config.json. Raises GgufError if the file is not of the llama architecture."""
    if meta.get("general.architecture") != "llama":
        raise GgufError(f"architecture {meta.get('general.architecture')!r} is not known; known: llama")
    heads = meta["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": meta["llama.vocab_size"],
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": meta["llama.embedding_length"] // heads,
        "max_position_embeddings": meta["llama.context_length"],
        "rope_parameters": {"rope_type": "default", "rope_theta": meta["llama.rope.freq_base"]},
        # The shortest decimal of the float32, which is what was meant (1e-05).
        "rms_norm_eps": float(str(np.float32(meta["llama.attention.layer_norm_rms_epsilon"]))),
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "tie_word_embeddings": not has_head,
        "use_cache": True,
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
    }


def tokenizer_json(meta: dict[str, Any]) -> str:
    """Give tokenizer.json for a byte-level BPE. Raises GgufError for another tokenizer.

    The "smollm" splitting takes digits one by one before the byte-level split.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind = (meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise GgufError(f"tokenizer {kind} is not known; known: ('gpt2', 'smollm')")
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    merges = [(left, right) for left, _, right in (m.partition(" ") for m in meta["tokenizer.ggml.merges"])]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=bool(meta["tokenizer.ggml.add_space_prefix"])),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = meta["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [
            AddedToken(t, normalized=False, special=True)
            for t, k in zip(tokens, types, strict=True)
            if k == _SPECIAL_TOKEN
        ]
    )
    return str(tokenizer.to_str(pretty=False))


def tokenizer_config(meta: dict[str, Any]) -> dict[str, Any]:
    """Give tokenizer_config.json: special tokens and the chat template."""
    tokens = meta["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[meta["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[meta["tokenizer.ggml.eos_token_id"]],
        "unk_token": tokens[meta["tokenizer.ggml.unknown_token_id"]],
        "pad_token": tokens[meta["tokenizer.ggml.padding_token_id"]],
        "clean_up_tokenization_spaces": False,
        "model_max_length": meta["llama.context_length"],
        "chat_template": CHAT_TEMPLATE,
    }


def generation_config(meta: dict[str, Any]) -> dict[str, Any]:
    """Give generation_config.json: the end token, and the sampling that the model's authors recommend."""
    return {
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
        "do_sample": True,
        "temperature": 0.2,
        "top_p": 0.9,
    }


class _Folder:
    """Writes files through to the disk and keeps their sizes and checksums for the manifest."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files: dict[str, dict[str, Any]] = {}

    def write(self, name: str, chunks: Iterator[bytes]) -> None:
        digest, size = hashlib.sha256(), 0
        with (self.root / name).open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
                digest.update(chunk)
                size += len(chunk)
            file.flush()
            os.fsync(file.fileno())
        self.files[name] = {"size": size, "sha256": digest.hexdigest()}

    def write_json(self, name: str, value: object) -> None:
        self.write(name, iter([json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"]))


def _safetensors(source: GgufFile, report: Callable[[float], None]) -> Iterator[bytes]:
    """Give the bytes of model.safetensors: header length, JSON header, then the tensors in its order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for info in source.tensors.values():
        size = 2 * int(np.prod(info.shape))
        entry = {"dtype": "BF16", "shape": list(info.shape), "data_offsets": [end, end + size]}
        header[hf_name(info.name)] = entry
        end += size
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    yield len(raw).to_bytes(8, "little")
    yield raw
    num_heads = {
        "attn_q": int(source.metadata["llama.attention.head_count"]),
        "attn_k": int(source.metadata["llama.attention.head_count_kv"]),
    }
    written = 0
    for name in source.tensors:
        values = source.read(name)
        if not np.isfinite(values).all():
            raise GgufError(f"tensor {name} holds values that are not finite")
        kind = name.split(".")[-2]
        if kind in num_heads:
            values = _rotate_halves(values, num_heads[kind])
        data = to_bfloat16(values).tobytes()
        written += len(data)
        yield data
        report(written / end)


def convert(gguf: Path, folder: Path, report: Report) -> None:
    """Fill folder with the model; the manifest is written last.

    Raises GgufError if the file is not what it should be, OSError if the disk refuses.
    """
    report("reading the GGUF file", 0.0)
    source = GgufFile(gguf)
    meta, out = source.metadata, _Folder(folder)
    out.write_json("config.json", model_config(meta, has_head="output.weight" in source.tensors))
    out.write_json("generation_config.json", generation_config(meta))
    report("building the tokenizer", 0.1)
    out.write_json("tokenizer_config.json", tokenizer_config(meta))
    out.write("tokenizer.json", iter([tokenizer_json(meta).encode()]))
    phase = "converting weights to bfloat16"
    report(phase, 0.2)
    out.write("model.safetensors", _safetensors(source, lambda share: report(phase, 0.2 + 0.75 * share)))
    report("writing to disk", 0.95)
    (folder / MANIFEST).write_text(
        json.dumps({"source": gguf.name, "source_size": gguf.stat().st_size, "files": out.files}, indent=2)
    )


def _print_report(phase: str, done: float) -> None:
    print(json.dumps({"phase": phase, "done": round(done, 4)}), flush=True)


def main(arguments: list[str]) -> int:
    """Convert, reporting on stdout; 1 if it failed, with the reason as {"error": ...}."""
    try:
        convert(Path(arguments[0]), Path(arguments[1]), _print_report)
    except (GgufError, OSError) as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return 1
    except KeyError as error:
        print(json.dumps({"error": f"the GGUF file lacks {error}"}), flush=True)
        return 1
    _print_report("done", 1.0)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
