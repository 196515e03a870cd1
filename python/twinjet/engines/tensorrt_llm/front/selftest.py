"""What start-up tries out before the engine serves: a token at all, our sampler, our grammars.

A version may ignore logits processors, run them where they cannot report, or change the forced token; no
signature tells. So two requests with known answers go through, and what fails here is not used later.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from twinjet.engines.tensorrt_llm.front.channel import FaultReported, ReportChannel, ReportLost
from twinjet.engines.tensorrt_llm.front.grammar import GrammarCompiler
from twinjet.engines.tensorrt_llm.front.params import TokenFacts
from twinjet.engines.tensorrt_llm.worker.grammar import GrammarHandle
from twinjet.engines.tensorrt_llm.worker.logits import DrawProcessor, DrawSettings
from twinjet.request import Constraint

_NUM_TOKENS = 3
_TWO_ANSWERS = 2


class SelfTest:
    """submit: SamplingParams arguments and prompt ids to the engine's result object."""

    def __init__(
        self,
        *,
        submit: Callable[[dict[str, Any], list[int]], Any],
        channel: ReportChannel,
        tokens: TokenFacts,
        prompt: list[int],
        timeout_s: float,
    ) -> None:
        self._submit = submit
        self._channel = channel
        self._tokens = tokens
        self._prompt = prompt
        self._timeout_s = timeout_s
        self.target = ""
        """What draws in the workers, known after sampler()."""

    async def probe(self) -> None:
        """Draw one token, greedily, with the engine's own sampler. Raises whatever the engine raises."""
        tokens = await self._generate({"max_tokens": 1})
        if not tokens:
            raise RuntimeError("the engine gave no token")

    async def sampler(self) -> str:
        """Try our sampler; "" if the engine kept its tokens and its reports arrived, else why not."""
        # Ids that no model would say here, so that an ignored processor shows.
        allowed = tuple(range(self._tokens.vocab_size - _TWO_ANSWERS - 1, self._tokens.vocab_size - 1))
        return await self._try(allowed, None)

    async def grammar(self, compiler: GrammarCompiler) -> str:
        """Try a grammar in our sampler; "" if it held, else why not. Also warms the workers' caches."""
        handle = await asyncio.to_thread(
            compiler.compile, Constraint("choice", choices=("aaaaaaaa", "bbbbbbbb"))
        )
        return await self._try((), handle)

    async def _try(self, allowed: tuple[int, ...], grammar: GrammarHandle | None) -> str:
        key, inbox = self._channel.open()
        settings = DrawSettings(
            key=key, report_path=self._channel.path, vocab_size=self._tokens.vocab_size,
            num_prompt_tokens=len(self._prompt), output_index=0, seed=1, temperature=1.0, top_p=1.0, top_k=0,
            min_p=0.0, repetition_penalty=1.0, frequency_penalty=0.0, presence_penalty=0.0, logit_bias={},
            allowed_token_ids=allowed, bad_text=None, min_tokens=0, max_tokens=_NUM_TOKENS, end_token_ids=(),
            fault_token_id=self._tokens.first_eos_token_id, num_logprobs=0, grammar=grammar,
            tells_target=True,
        )  # fmt: skip
        try:
            tokens = await self._generate(
                {"max_tokens": _NUM_TOKENS, "ignore_eos": True, "logits_processor": DrawProcessor(settings)}
            )
            reports = [(await inbox.take(i, self._timeout_s)).token_id for i in range(len(tokens))]
        except (FaultReported, ReportLost, TimeoutError) as error:
            return f"our sampler does not work in the engine's workers: {error or 'timed out'}"
        except Exception as error:  # noqa: BLE001 - an engine that refuses the hook still serves without it
            return f"the engine refused our sampler: {error}"
        finally:
            self._channel.close(key)
        self.target = inbox.target or self.target
        if not tokens or tokens != reports or (allowed and not set(tokens) <= set(allowed)):
            return f"the engine did not keep our sampler's tokens: drew {reports}, got {tokens}"
        return ""

    async def _generate(self, arguments: dict[str, Any]) -> list[int]:
        greedy = {"temperature": 1.0, "top_p": 1.0, "top_k": 1, "n": 1, "best_of": 1, "detokenize": False}
        result = self._submit({**greedy, **arguments}, self._prompt)
        try:
            async with asyncio.timeout(self._timeout_s):
                await result.aresult()
        finally:
            if not result.finished:
                result.abort()
        return list(result.outputs[0].token_ids)
