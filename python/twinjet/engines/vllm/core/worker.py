"""The engine's worker with our sampler in it: vLLM loads `Worker` by name in its process; imports vLLM."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from vllm.logger import init_logger
from vllm.platforms import current_platform

from twinjet.engines.vllm import compat
from twinjet.engines.vllm.core.device_drawing import MarkedOutput, mark
from twinjet.engines.vllm.core.sampler import NativeSampler
from twinjet.engines.vllm.fields import COUNTERS_METHOD, NO_TOKEN
from twinjet.sampling import SPEC_VERSION

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as _StockWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as _StockWorker

logger = init_logger(__name__)


def _is_tested_runner() -> bool:
    try:
        compat.check_runner()
    except compat.UntestedVllmError as error:
        logger.warning("steps stay as vllm has them: %s", error)
        return False
    return True


class Worker(_StockWorker):  # type: ignore[misc]
    """vLLM's worker for this platform; its runner draws with our sampler."""

    def init_device(self) -> None:
        """Make the device and the model runner, and put our sampler into it."""
        # FlashInfer's sampler, which vLLM would compile for two minutes at the first start, would draw only
        # what ours leaves.
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
        super().init_device()
        if not self.use_v2_model_runner:
            self.model_runner.sampler = NativeSampler(self.model_runner, self.model_runner.sampler)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the weights; the V2 runner makes its sampler meanwhile."""
        if self.use_v2_model_runner:
            from vllm.v1.worker.gpu import model_runner

            from twinjet.engines.vllm.core.runner_v2 import hook_order
            from twinjet.engines.vllm.core.sampler_v2 import hook_custom_sampler

            is_tested = _is_tested_runner()
            hook_custom_sampler(
                model_runner, self.model_config.get_vocab_size(), self.device, is_tested=is_tested
            )
            if is_tested:
                hook_order(model_runner)
        super().load_model(*args, **kwargs)

    def determine_available_memory(self) -> int:
        """Profile the model; see vLLM's worker."""
        with self._warming_up():
            return int(super().determine_available_memory())

    def compile_or_warm_up_model(self) -> Any:
        """Compile, capture graphs and warm up; see vLLM's worker."""
        with self._warming_up():
            return super().compile_or_warm_up_model()

    @contextlib.contextmanager
    def _warming_up(self) -> Iterator[None]:
        drawing = getattr(self.model_runner.sampler, "drawing", None)
        if drawing is None:
            yield
            return
        drawing.is_warming = True
        try:
            yield
        finally:
            drawing.is_warming = False

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Draw the step's tokens; see vLLM's worker."""
        sampler = self.model_runner.sampler
        # Else the runner writes the grammars' masks into the logits.
        takes_grammar = (
            grammar_output is not None
            and hasattr(sampler, "with_grammar")
            and self.vllm_config.speculative_config is None
            and getattr(self.model_runner, "batch_sharder", None) is None
        )
        if takes_grammar:
            with sampler.with_grammar(grammar_output, self.model_runner):
                output = super().sample_tokens(None)
        else:
            output = super().sample_tokens(grammar_output)
        take_unread = getattr(self.model_runner.sampler, "take_unread", None)
        unread = take_unread() if take_unread is not None else None
        if unread is None:
            return output
        if hasattr(output, "get_output"):
            return MarkedOutput(output, unread)
        mark(output, unread.failed())
        return output

    def execute_model(self, scheduler_output: Any) -> Any:
        """Run a step; see vLLM's worker."""
        sampler = self.model_runner.sampler
        for new in scheduler_output.scheduled_new_reqs:
            if new.sampling_params is not None:
                # vLLM's own min-tokens rule would read the id as an index from the end.
                new.sampling_params.all_stop_token_ids.discard(NO_TOKEN)
        if isinstance(sampler, NativeSampler):
            sampler.forget(scheduler_output.finished_req_ids)
        elif hasattr(sampler, "incoming"):
            sampler.incoming = {new.req_id: new for new in scheduler_output.scheduled_new_reqs}
        return super().execute_model(scheduler_output)


def _counters(self: Worker) -> dict[str, Any]:
    """Give what draws the tokens here and its counters."""
    drawing = getattr(self.model_runner.sampler, "drawing", None)
    if drawing is None:
        return {"spec_version": 0, "target": "", "counters": {}, "reason": "this model's runner has none"}
    return {
        "spec_version": SPEC_VERSION,
        "target": drawing.target,
        "counters": dict(drawing.counters),
        "reason": "",
    }


setattr(Worker, COUNTERS_METHOD, _counters)
