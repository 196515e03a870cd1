"""Hash and match prompts against a warm cache: the block manager beside vLLM's default path.

vLLM's side is its own code: get_request_block_hasher(sha256) on a Request, and the look-up of
FullAttentionManager in a filled BlockPool. Variants alternate in each round; medians; microseconds.

    .venv/bin/python bench/kv_hash.py [--json FILE] [--block-size 16] [--rounds 15]
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.request import Request

from twinjet._core import BlockHasher, BlockManager


def variants_for(num_tokens: int, block_size: int) -> dict[str, Callable[[], object]]:
    tokens = np.random.default_rng(num_tokens).integers(0, 150_000, num_tokens).tolist()
    array = np.array(tokens, dtype=np.int32)
    num_blocks = num_tokens // block_size

    vllm_hasher = get_request_block_hasher(block_size, sha256)
    request = Request("r", tokens, SamplingParams(max_tokens=1), None)
    request.block_hashes = vllm_hasher(request)
    pool = BlockPool(num_blocks + 1, True, block_size)
    blocks = pool.get_new_blocks(num_blocks)
    pool.cache_full_blocks(request, blocks, 0, num_blocks, block_size, 0)
    vllm_hashes = list(request.block_hashes)
    spec = FullAttentionSpec(block_size=block_size, num_kv_heads=1, head_size=64, dtype=torch.float16)

    def vllm_hash() -> list[bytes]:
        request.block_hashes = []
        return vllm_hasher(request)

    def vllm_match() -> int:
        _, length = FullAttentionManager.find_longest_cache_hit(
            vllm_hashes, num_tokens - 1, [0], pool, spec, False, block_size
        )
        return length

    manager = BlockManager(num_blocks + 1, block_size)
    manager.allocate(tokens)
    hasher = manager.hasher
    hashes = hasher.hash_blocks(tokens)
    siphash = BlockHasher(block_size, algorithm="siphash")
    expected = (num_tokens - 1) // block_size
    if vllm_match() != expected * block_size or manager.match(tokens).num_tokens != expected * block_size:
        raise SystemExit("the variants do not do the same work")
    return {
        "vllm hash": vllm_hash,
        "vllm match": vllm_match,
        "hash, list": lambda: hasher.hash_blocks(tokens),
        "hash, int32": lambda: hasher.hash_blocks(array),
        "hash, int32 to bytes": lambda: hasher.hash_bytes(array),
        "siphash, list": lambda: siphash.hash_blocks(tokens),
        "siphash, int32": lambda: siphash.hash_blocks(array),
        "match hashes": lambda: manager.match_hashes(hashes, expected),
        "hash and match, list": lambda: manager.match(tokens),
        "hash and match, int32": lambda: manager.match(array),
    }


def measure(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            repeats = 1 if name.startswith("vllm") else 5
            start = time.perf_counter()
            for _ in range(repeats):
                run()
            times[name].append((time.perf_counter() - start) / repeats * 1e6)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    init_none_hash(sha256)
    results: dict[str, dict[str, float]] = {}
    for num_tokens in (2048, 32768, 131072):
        results[str(num_tokens)] = measure(variants_for(num_tokens, options.block_size), options.rounds)
    names = list(next(iter(results.values())))
    print(f"{'microseconds (times faster)':28s}" + "".join(f"{n:>22s}" for n in results))
    for name in names:
        row = f"{name:28s}"
        for result in results.values():
            base = result["vllm match"] if name in ("vllm match", "match hashes") else result["vllm hash"]
            if name.startswith("hash and match"):
                base = result["vllm hash"] + result["vllm match"]
            row += f"{result[name]:12.1f} ({base / result[name]:6.1f}x)"
        print(row)
    if options.json:
        facts = {"machine": platform.processor() or platform.machine(), "python": platform.python_version()}
        facts["implementation"] = BlockHasher(16).implementation
        options.json.write_text(
            json.dumps({**facts, "block_size": options.block_size, "us": results}, indent=2)
        )


if __name__ == "__main__":
    main()
