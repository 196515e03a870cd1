"""What the engine's own sampler and cache honour here, found by trial requests at start-up.

Versions ignore settings in silence, and no signature tells. So each setting is tried in a request whose answer shows
whether it was heeded; one that was not, or that cannot be told, is refused later by its capability's name.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from twinjet.engines.tensorrt_llm.front.params import TokenFacts, bias_vector

log = logging.getLogger(__name__)

Setting = Literal[
    "logit_bias", "bad_words", "min_tokens", "penalties", "logprobs", "prompt_logprobs", "seed", "cache_salt"
]
SETTINGS: tuple[Setting, ...] = (
    "logit_bias", "min_tokens", "penalties", "logprobs", "prompt_logprobs", "seed",
)  # fmt: skip
"""What start-up tries of the engine's own sampler. Not bad_words: the engine bans sequences of tokens, a request strings,
which have many, so they are refused there whatever a trial shows. cache_salt concerns the cache."""

# Above and below what a model says: they decide whatever its weights are, and fit into half precision.
_STRONG_BIAS = 1000.0
_WEAKER_BIAS = 900.0
_MIN_TOKENS = 3
_NUM_DRAWS = 16
_FLAT_TEMPERATURE = 50.0


@dataclass(frozen=True, slots=True)
class Finding:
    """is_honoured: the trial showed that the setting is heeded. seen: what it showed, for people."""

    setting: Setting
    is_honoured: bool
    seen: str


class Submit(Protocol):
    """SamplingParams arguments, prompt ids and generate_async's keywords to the engine's result object."""

    def __call__(self, arguments: dict[str, Any], prompt: list[int], keywords: dict[str, Any]) -> Any: ...


class EngineTrials:
    """Tries settings on an engine that serves nobody yet.

    prompt: at least one token. block_size: tokens per block of the cache. timeout_s: for one trial.
    sampling_fields: what SamplingParams has.
    """

    def __init__(
        self,
        *,
        submit: Submit,
        tokens: TokenFacts,
        prompt: list[int],
        block_size: int,
        timeout_s: float,
        sampling_fields: frozenset[str],
    ) -> None:
        self._submit = submit
        self._tokens = tokens
        # Longer than the smallest number of tokens that is asked for: an engine that counts the prompt shows.
        self._prompt = (prompt * (_MIN_TOKENS + 2))[: _MIN_TOKENS + 2]
        self._block_size = block_size
        self._timeout_s = timeout_s
        self._fields = sampling_fields

    async def sampler(self, *, has_logprobs: bool = True) -> Mapping[Setting, Finding]:
        """Try everything of SETTINGS; without has_logprobs nothing that asks for logprobs."""
        trials: dict[Setting, Callable[[], Awaitable[str]]] = {
            "logit_bias": self._logit_bias,
            "min_tokens": self._min_tokens,
            "penalties": self._penalties,
            "seed": self._seed,
        }
        if has_logprobs:
            trials |= {"logprobs": self._logprobs, "prompt_logprobs": self._prompt_logprobs}
        return {setting: await self._try(setting, trial) for setting, trial in trials.items()}

    async def bad_words(self) -> Finding:
        """Try whether a banned token is drawn; for those who want to know, see SETTINGS."""
        return await self._try("bad_words", self._bad_words)

    async def cache_salt(self) -> Finding:
        """Try whether a prompt finds what was cached under another salt."""
        return await self._try("cache_salt", self._cache_salt)

    async def _try(self, setting: Setting, trial: Callable[[], Awaitable[str]]) -> Finding:
        """Run one trial; its text is what was wrong, "" if nothing."""
        try:
            wrong = await trial()
        except TimeoutError:
            wrong = f"no answer within {self._timeout_s:g} s"
        except Exception as error:  # noqa: BLE001 - what an engine cannot even be asked for, it does not honour
            wrong = f"{type(error).__name__}: {error}"
        return Finding(setting, not wrong, wrong or "honoured")

    async def _logit_bias(self) -> str:
        target = self._other_token()
        tokens = await self._generate(max_tokens=2, embedding_bias=self._bias({target: _STRONG_BIAS}))
        return "" if tokens == [target] * 2 else f"a bias for token {target} gave {tokens}"

    async def _bad_words(self) -> str:
        if "bad_token_ids" not in self._fields:
            return "SamplingParams has no bad_token_ids"
        target = self._other_token()
        bias = self._bias({target: _STRONG_BIAS})
        if target not in await self._generate(max_tokens=1, embedding_bias=bias):
            return "cannot be told, since a bias is ignored"
        tokens = await self._generate(max_tokens=2, embedding_bias=bias, bad_token_ids=[target])
        return f"the banned token {target} was drawn" if target in tokens else ""

    async def _min_tokens(self) -> str:
        end = self._tokens.first_eos_token_id
        bias = self._bias({end: _STRONG_BIAS})
        if (await self._generate(max_tokens=8, ignore_eos=False, embedding_bias=bias))[:1] not in ([], [end]):
            return "cannot be told, since a bias is ignored"
        tokens = await self._generate(
            max_tokens=8, ignore_eos=False, embedding_bias=bias, min_tokens=_MIN_TOKENS
        )
        before_end = [token for token in tokens if token != end]
        if len(before_end) == _MIN_TOKENS:
            return ""
        return f"{len(before_end)} tokens came before the end where {_MIN_TOKENS} were the least"

    async def _penalties(self) -> str:
        first, second = self._other_token(), self._other_token(1)
        tokens = await self._generate(
            max_tokens=2,
            embedding_bias=self._bias({first: _STRONG_BIAS, second: _WEAKER_BIAS}),
            repetition_penalty=2.0,
        )
        return "" if tokens == [first, second] else f"a repeated token was not penalised: {tokens}"

    async def _seed(self) -> str:
        def draw() -> Awaitable[list[int]]:
            return self._generate(
                max_tokens=_NUM_DRAWS, temperature=_FLAT_TEMPERATURE, top_k=0, seed=20260101, logprobs=None
            )

        once, again = await draw(), await draw()
        return "" if once == again else "the same seed gave other tokens"

    async def _logprobs(self) -> str:
        result = await self._finish(
            self._request(max_tokens=_NUM_DRAWS, temperature=_FLAT_TEMPERATURE, top_k=0, logprobs=1)
        )
        output = result.outputs[0]
        tokens, entries = list(output.token_ids), list(output.logprobs or [])
        if len(entries) != len(tokens):
            return f"{len(entries)} logprobs came for {len(tokens)} tokens"
        missing = sum(token not in entry for token, entry in zip(tokens, entries, strict=True))
        return f"{missing} of {len(tokens)} drawn tokens are missing among theirs" if missing else ""

    async def _prompt_logprobs(self) -> str:
        prompt = [self._other_token(i) for i in range(len(self._prompt))]
        beside = [self._other_token(i + 1) for i in range(len(self._prompt))]
        alone = await self._finish(self._request(max_tokens=1, prompt=beside, salt="twinjet-trial-alone"))
        asking = self._request(max_tokens=1, prompt=prompt, prompt_logprobs=1, salt="twinjet-trial-asking")
        second = self._request(max_tokens=1, prompt=beside, salt="twinjet-trial-beside")
        result, other = await asyncio.gather(self._finish(asking), self._finish(second))
        output = result.outputs[0]
        entries = list(output.prompt_logprobs or [])
        if len(entries) != len(prompt):
            return f"{len(entries)} entries came for {len(prompt)} prompt tokens"
        following = [*prompt[1:], *output.token_ids[:1]]
        missing = sum(token not in entry for token, entry in zip(following, entries, strict=True))
        if missing:
            return f"{missing} of {len(prompt)} tokens are missing among theirs"
        if list(other.outputs[0].token_ids) != list(alone.outputs[0].token_ids):
            return "another prompt of the same step drew another token than alone"
        return ""

    async def _cache_salt(self) -> str:
        prompt = [self._other_token(i % 7) for i in range(3 * self._block_size + 1)]

        async def cached(salt: str) -> int:
            result = await self._finish(self._request(max_tokens=1, prompt=prompt, salt=salt))
            return int(getattr(result, "cached_tokens", None) or 0)

        one, other = uuid.uuid4().hex, uuid.uuid4().hex
        await cached(one)
        found = await cached(other)
        return f"{found} tokens were found under another salt" if found else ""

    def _other_token(self, number: int = 0) -> int:
        """Choose a token that ends nothing and is not in the prompt; the highest ids first."""
        taken, token = {*self._tokens.eos_token_ids, *self._prompt}, self._tokens.vocab_size - 1
        while True:
            if token not in taken:
                number -= 1
                if number < 0:
                    return token
            token -= 1

    def _bias(self, biases: dict[int, float]) -> Any:
        return bias_vector(biases, self._tokens.vocab_size)

    def _request(self, *, prompt: list[int] | None = None, salt: str | None = None, **changes: Any) -> Any:
        arguments: dict[str, Any] = {
            "end_id": self._tokens.first_eos_token_id, "pad_id": self._tokens.first_eos_token_id,
            "temperature": 1.0, "top_p": 1.0, "top_k": 1, "n": 1, "best_of": 1, "detokenize": False,
            "ignore_eos": True, "include_stop_str_in_output": True,
        }  # fmt: skip
        keywords: dict[str, Any] = {"streaming": False}
        if salt is not None:
            keywords["cache_salt"] = salt
        return self._submit(arguments | changes, prompt or self._prompt, keywords)

    async def _generate(self, **changes: Any) -> list[int]:
        return list((await self._finish(self._request(**changes))).outputs[0].token_ids)

    async def _finish(self, result: Any) -> Any:
        try:
            async with asyncio.timeout(self._timeout_s):
                await result.aresult()
        finally:
            if not result.finished:
                result.abort()
        return result
