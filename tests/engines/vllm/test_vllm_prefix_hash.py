"""Native prompt hashes: equal for equal contexts, different for anything a block depends on."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("vllm", reason="the vllm extra is not installed")

from scheduler_harness import Prompt, stock_hasher
from vllm.lora.request import LoRARequest

from twinjet._core import BlockHasher
from twinjet.engines.vllm.core.prefix_hash import RequestHasher

BLOCK_SIZE = 16
HASHER = RequestHasher(BlockHasher(BLOCK_SIZE))
TOKENS = tuple(range(3, 3 + 5 * BLOCK_SIZE + 3))


def hashes(tokens: tuple[int, ...] = TOKENS, hasher: Any = HASHER, **options: Any) -> list[bytes]:
    return Prompt("r", tokens, 4, **options).request(hasher, 0.0).block_hashes


def test_one_hash_a_full_block() -> None:
    assert len(hashes()) == 5
    assert len(hashes(TOKENS[:15])) == 0
    assert len(set(hashes())) == 5
    assert hashes() == hashes()


def test_a_hash_depends_on_all_tokens_before() -> None:
    changed = (TOKENS[0] + 1, *TOKENS[1:])
    assert not set(hashes()) & set(hashes(changed))
    assert hashes(TOKENS[: 2 * BLOCK_SIZE]) == hashes()[:2]


def test_salts_keep_tenants_apart() -> None:
    seen = [hashes(), hashes(cache_salt="a"), hashes(cache_salt="b")]
    assert len({block for blocks in seen for block in blocks}) == 15
    assert hashes(cache_salt="") == hashes()


def test_an_adapter_enters_each_block() -> None:
    def with_adapter(path: str) -> list[bytes]:
        request = Prompt("r", TOKENS, 4).request(None, 0.0)
        request.lora_request = LoRARequest("name", 1, path)
        return HASHER(request)

    seen = [hashes(), with_adapter("/one"), with_adapter("/other")]
    assert len({block for blocks in seen for block in blocks}) == 15
    assert with_adapter("/one") == with_adapter("/one")


def test_prompt_embeddings_enter_the_hash() -> None:
    import torch

    def with_embeddings(value: float) -> list[bytes]:
        request = Prompt("r", TOKENS, 4).request(None, 0.0)
        request.prompt_embeds = torch.full((len(TOKENS), 4), value)
        return HASHER(request)

    assert not set(with_embeddings(1.0)) & set(with_embeddings(2.0))
    assert with_embeddings(1.0) == with_embeddings(1.0)


def test_appended_tokens_go_on_with_the_chain() -> None:
    request = Prompt("r", TOKENS[:20], 200).request(HASHER, 0.0)
    for token in TOKENS[20:]:
        request.append_output_token_ids(token)

    assert request.block_hashes == hashes()


def test_appended_tokens_with_an_adapter_go_on_with_the_chain() -> None:
    whole = Prompt("r", TOKENS, 4).request(None, 0.0)
    whole.lora_request = LoRARequest("name", 1, "/one")
    request = Prompt("r", TOKENS[:20], 200).request(None, 0.0)
    request.lora_request = whole.lora_request
    request._block_hasher = HASHER
    request.update_block_hashes()
    for token in TOKENS[20:]:
        request.append_output_token_ids(token)

    assert request.block_hashes == HASHER(whole)


def test_the_same_blocks_are_equal_as_for_vllms_hasher() -> None:
    prompts = [TOKENS, TOKENS[:40], TOKENS[16:], (TOKENS[0] + 1, *TOKENS[1:]), TOKENS[:16] * 3]
    pairs: set[tuple[bytes, bytes]] = set()
    for tokens in prompts:
        for salt in (None, "a"):
            mine = hashes(tokens, cache_salt=salt)
            theirs = hashes(tokens, stock_hasher(BLOCK_SIZE), cache_salt=salt)
            pairs.update(zip(mine, theirs, strict=True))
    assert len(pairs) == len({mine for mine, _ in pairs}) == len({theirs for _, theirs in pairs})
