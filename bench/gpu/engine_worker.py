"""One vLLM engine core in this process, for engines.py: commands as JSON lines on the standard input, answers on
the standard output.

A command names a batch: mode, streams, tokens, prompt, seeded. The answer has its tokens a second while all
streams decode, the time between tokens, and the host's microseconds a step by part. {"check": true} draws each
row once more on the CPU and counts differences; such runs are not timed. {"profile": N} tells what the GPU does in N of
the steps, by kernel. {"arrivals": N} serves N streams of the given tokens, `streams` of them at a time; their requests
are made before, as a server's other threads do it.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 0.8},
    "top-k + top-p": {"temperature": 0.8, "top_k": 50, "top_p": 0.95},
    "top-p": {"temperature": 0.8, "top_p": 0.95},
    "penalties": {"temperature": 0.8, "frequency_penalty": 0.2, "repetition_penalty": 1.1},
    "logprobs": {"temperature": 0.8, "logprobs": 5},
    # For checks alone.
    "everything": {
        "temperature": 0.9, "top_k": 200, "top_p": 0.9, "min_p": 0.01, "presence_penalty": 0.3,
        "logit_bias": {11: 2.0, 900: -3.0}, "min_tokens": 8,
    },
}  # fmt: skip
UNTIMED_STEPS = 6


class Clock:
    """Sums the time spent in methods, and this thread's share of it on a core: the rest it waited."""

    def __init__(self) -> None:
        self.parts: dict[str, list[float]] = {}

    def timed(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        """Give the same function with its time summed."""
        entry = self.entry(part)

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin, on_core = time.perf_counter(), time.thread_time()
            try:
                return call(*args, **kwargs)
            finally:
                entry[0] += time.perf_counter() - begin
                entry[1] += 1
                entry[2] += time.thread_time() - on_core

        return timed

    def watch(self, owner: Any, method: str, part: str) -> None:
        setattr(owner, method, self.timed(getattr(owner, method), part))

    def entry(self, part: str) -> list[float]:
        """Seconds, calls and seconds on a core."""
        return self.parts.setdefault(part, [0.0, 0, 0.0])

    def reset(self) -> None:
        for entry in self.parts.values():
            entry[:] = [0.0, 0, 0.0]

    def microseconds(self) -> dict[str, float]:
        return {part: round(1e6 * spent / max(1, calls), 1) for part, (spent, calls, _) in self.parts.items()}

    def core_microseconds(self) -> dict[str, float]:
        return {part: round(1e6 * on / max(1, calls), 1) for part, (_, calls, on) in self.parts.items()}


class Timed:
    """A sampler that is no module, with a clock on its call."""

    def __init__(self, inner: Any, timed_call: Callable[..., Any]) -> None:
        self.__dict__.update(inner=inner, timed_call=timed_call)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.inner, name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.timed_call(*args, **kwargs)


class Replay:
    """Draws every batch of a DeviceDrawing once more on the CPU, from the same logits."""

    def __init__(self, drawing: Any) -> None:
        from twinjet.sampling import Sampler

        self.rows = self.differences = 0
        self._requests: dict[int, Any] = {}
        self._sampler = Sampler(0)
        self._put, self._draw = drawing.native.put, drawing.draw
        self._drawing = drawing
        self._native = drawing.native
        drawing.native = self
        drawing.draw = self.draw
        self._pinned: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._native, name)

    def put(self, seat: int, request: Any) -> None:
        self._put(seat, request)
        self._requests[seat] = request

    def draw(self, logits: Any, seats: Any, advances: Any, num_logprobs: Any, *rest: Any) -> Any:
        import numpy as np
        import torch

        self._drawing.native = self._native
        try:
            drawn = self._draw(logits, seats, advances, num_logprobs, *rest)
        finally:
            self._drawing.native = self
        if self._pinned is None or self._pinned.numel() < logits.numel():
            self._pinned = torch.empty(logits.numel(), dtype=logits.dtype, pin_memory=True)
        host = self._pinned[: logits.numel()].view(logits.shape)
        host.copy_(logits)
        narrow = logits.dtype == torch.bfloat16
        expected = self._sampler.sample(
            host.view(torch.int16).numpy() if narrow else host.numpy(),
            [self._requests[seat] for seat in seats.tolist()],
            advance=np.array(advances),
            num_logprobs=num_logprobs,
            dtype="bfloat16" if narrow else "",
        )
        same = drawn.tokens[:, 0].cpu().numpy() == np.maximum(expected.token_ids, 0)
        if expected.logprobs is not None:
            same &= (drawn.logprobs.logprobs.cpu().numpy() == expected.logprobs.logprobs).all(1)
            same &= (drawn.logprobs.logprob_token_ids.cpu().numpy() == expected.logprobs.token_ids).all(1)
        self.rows += len(seats)
        self.differences += int(np.count_nonzero(~same))
        return drawn


class Profile:
    """What the device does in some steps, by kernel."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._left = 0
        self._torch: Any = None

    def start(self) -> None:
        if self.steps:
            from torch.profiler import ProfilerActivity, profile

            self._torch = profile(activities=[ProfilerActivity.CUDA])
            self._torch.start()
            self._left = self.steps + 1

    def note_step(self) -> None:
        if self._left:
            self._left -= 1
            if self._left == 0:
                self._torch.stop()

    def summary(self) -> dict[str, Any]:
        """Microseconds a step by kernel, the most first, and how long the device was busy."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self._torch.export_chrome_trace(str(path))
            events = json.loads(path.read_text())["traceEvents"]
        kinds = ("kernel", "gpu_memcpy", "gpu_memset")
        spans = sorted((e["ts"], e["ts"] + e["dur"], e["name"]) for e in events if e.get("cat") in kinds)
        spent: Counter[str] = Counter()
        calls: Counter[str] = Counter()
        busy, until = 0.0, 0.0
        for begin, end, name in spans:
            spent[name] += end - begin
            calls[name] += 1
            busy += max(0.0, end - max(begin, until))
            until = max(until, end)
        whole = spans[-1][1] - spans[0][0] if spans else 0.0
        return {
            "steps": self.steps,
            "step_us": round(whole / self.steps, 1),
            "busy_us": round(busy / self.steps, 1),
            "kernels": [
                [name[:160], round(us / self.steps, 2), round(calls[name] / self.steps, 2)]
                for name, us in spent.most_common(40)
            ],
        }


class Worker:
    def __init__(self, spec: dict[str, Any]) -> None:
        import torch
        from vllm.v1.engine.llm_engine import LLMEngine
        from vllm.v1.executor.abstract import Executor

        from twinjet.engines.vllm import config
        from twinjet.engines.vllm.front import parts

        self.spec, self.native = spec, spec["native"]
        options = {"max_model_len": 2048, "max_num_seqs": 1024, **spec["options"]}
        self.config = config.engine_config(
            spec["model"],
            options,
            scheduler_cls=parts.SCHEDULER if self.native in ("all", "scheduler") else None,
            worker_cls=parts.WORKER if self.native in ("all", "sampler") else None,
        )
        self.engine = LLMEngine(
            self.config,
            Executor.get_class(self.config),
            log_stats=True,
            multiprocess_mode=False,
            stat_loggers=[],
        )
        self.core = self.engine.engine_core.engine_core
        driver = self.core.model_executor.driver_worker
        self.worker = getattr(driver, "worker", driver)
        self.runner = self.worker.model_runner
        if self.config.load_config.load_format == "dummy" and not spec.get("as_is"):
            _shape_weights(self.runner.model)
        self.clock = Clock()
        self.clock.watch(self.core.scheduler, "schedule", "schedule")
        self.clock.watch(self.core.scheduler, "update_from_output", "update")
        self.clock.watch(self.worker, "execute_model", "execute")
        self.clock.watch(self.worker, "sample_tokens", "sample_tokens")
        if hasattr(self.runner, "add_requests"):
            # Of execute_model: here Twinjet's seats are filled.
            self.clock.watch(self.runner, "add_requests", "add_requests")
        if isinstance(self.runner.sampler, torch.nn.Module):
            self.clock.watch(self.runner.sampler, "forward", "sampler")
        else:
            self.runner.sampler = Timed(self.runner.sampler, self.clock.timed(self.runner.sampler, "sampler"))
        self._num_requests = 0
        self._tasks = self.engine.get_supported_tasks()
        self.replay: Replay | None = None

    def about(self) -> dict[str, Any]:
        scheduler = self.core.scheduler
        status = getattr(scheduler, "native_status", None)
        return {
            "v2_runner": bool(self.config.use_v2_model_runner),
            "async_scheduling": bool(self.config.scheduler_config.async_scheduling),
            "cuda_graphs": str(self.config.compilation_config.cudagraph_mode),
            "blocks": self.config.cache_config.num_gpu_blocks,
            "scheduler": type(scheduler).__name__,
            "layers": None if status is None else status.to_dict(),
        }

    def counters(self) -> dict[str, Any]:
        drawing = getattr(self.runner.sampler, "drawing", None)
        status = getattr(self.core.scheduler, "scheduler_status", None)
        return {
            "target": getattr(drawing, "target", None),
            "sampler": dict(drawing.counters) if drawing is not None else {},
            "scheduler": {} if status is None else dict(status().counters),
        }

    def _make(self, command: dict[str, Any], index: int) -> Any:
        """Make a request as the engine's client sends it."""
        import numpy as np

        from twinjet.engines.vllm.front.params import sampling_params
        from twinjet.request import Sampling

        base: dict[str, Any] = {
            "temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0,
            "frequency_penalty": 0.0, "presence_penalty": 0.0, "logit_bias": {}, "n": 1, "min_tokens": 0,
            "stop": (), "stop_token_ids": (), "include_stop": False, "ignore_eos": True, "bad_words": (),
            "allowed_token_ids": (), "logprobs": None, "prompt_logprobs": None,
            "skip_special_tokens": True, "constraint": None,
        }  # fmt: skip
        base |= MODES[command["mode"]]
        sampling = Sampling(**base, seed=index + 1, max_tokens=command["tokens"])
        params = sampling_params(sampling, 0, native=self.native in ("all", "sampler"))
        if not command.get("seeded", True):
            params.seed = None
        rng = np.random.default_rng([command.get("round", 0) + 1, index])
        prompt = rng.integers(10, self.config.model_config.get_vocab_size() - 10, command["prompt"]).tolist()
        self._num_requests += 1
        request = self.engine.input_processor.process_inputs(
            f"r{self._num_requests}", {"prompt_token_ids": prompt, "type": "token"}, params, self._tasks
        )
        self.engine.input_processor.assign_request_id(request)
        return request

    def run(self, command: dict[str, Any]) -> dict[str, Any]:
        sampler = self.runner.sampler
        if hasattr(getattr(sampler, "stock", sampler), "use_flashinfer"):
            stock = getattr(sampler, "stock", getattr(sampler, "inner", sampler))
            stock.use_flashinfer = command.get("flashinfer", True) and self.spec.get("flashinfer", False)
        if command.get("check") and self.replay is None:
            self.replay = Replay(sampler.drawing)
        if command.get("arrivals"):
            return self._serve(command)
        core, streams = self.core, command["streams"]
        for index in range(streams):
            self.engine.engine_core.add_request(self._make(command, index))
        full: list[float] = []  # when a step of all streams had been read
        microseconds: dict[str, float] = {}
        profile = Profile(command.get("profile", 0))
        while core.scheduler.has_requests() or core.batch_queue:
            outputs, was_executed = core.step_fn()
            core.post_step(was_executed)
            if not outputs:
                continue
            made = sum(len(o.new_token_ids) for batch in outputs.values() for o in batch.outputs)
            if made != streams:
                continue
            full.append(time.perf_counter())
            if len(full) == UNTIMED_STEPS:
                self.clock.reset()
                profile.start()
            profile.note_step()
            microseconds = self.clock.microseconds()
        if command.get("check"):
            assert self.replay is not None
            return {"rows": self.replay.rows, "differences": self.replay.differences}
        if profile.steps:
            return profile.summary()
        steps = len(full) - UNTIMED_STEPS
        if steps < 1:
            return {"error": "all streams never decoded at once"}
        gaps = sorted(b - a for a, b in zip(full[UNTIMED_STEPS - 1 :], full[UNTIMED_STEPS:], strict=False))
        spent = full[-1] - full[UNTIMED_STEPS - 1]
        return {
            "tokens_per_s": round(streams * steps / spent, 1),
            "itl_ms": round(1e3 * spent / steps, 4),
            "itl_quantiles_ms": {
                q: round(1e3 * gaps[min(len(gaps) - 1, int(q / 100 * len(gaps)))], 4) for q in (5, 50, 95, 99)
            },
            "steps": steps,
            "host_us": microseconds,
        }

    def _serve(self, command: dict[str, Any]) -> dict[str, Any]:
        """New streams come as others end."""
        core = self.core
        made = (core.preprocess_add_request(self._make(command, i)) for i in range(command["arrivals"]))
        coming = deque(made)
        profile = Profile(command.get("profile", 0))
        # What waits here for its turn is no part of an engine, and collections need not go through it.
        gc.collect()
        gc.freeze()
        steps = rows = 0
        adding = self.clock.entry("add")
        ended = command["streams"]
        self.clock.reset()
        begin, on_core = time.perf_counter(), time.thread_time()
        while True:
            before = time.perf_counter()
            for _ in range(min(len(coming), ended)):
                core.add_request(*coming.popleft())
            adding[0] += time.perf_counter() - before
            if not (core.scheduler.has_requests() or core.batch_queue):
                break
            outputs, was_executed = core.step_fn()
            core.post_step(was_executed)
            ended = 0
            if not outputs:
                continue
            made_now = [o for batch in outputs.values() for o in batch.outputs]
            ended = sum(o.finish_reason is not None for o in made_now)
            rows += sum(len(o.new_token_ids) for o in made_now)
            steps += 1
            adding[1] = steps
            if steps == UNTIMED_STEPS:
                profile.start()
            profile.note_step()
        spent, on_core = time.perf_counter() - begin, time.thread_time() - on_core
        gc.unfreeze()
        if profile.steps:
            return profile.summary()
        return {
            "streams_per_s": round(command["arrivals"] / spent, 1),
            "steps": steps,
            "rows_a_step": round(rows / steps, 1),
            "step_us": round(1e6 * spent / steps, 1),
            "on_core_us": round(1e6 * on_core / steps, 1),
            "host_us": self.clock.microseconds(),
            "host_on_core_us": self.clock.core_microseconds(),
        }


def _shape_weights(model: Any) -> None:
    """Give random weights whose logits are spread as a language model's: some hundred tokens stand out."""
    import torch

    generator = torch.Generator("cuda").manual_seed(3)

    def fill(weight: Any, scale: Any) -> None:
        for first in range(0, weight.shape[0], 8192):
            part = weight[first : first + 8192]
            random = torch.randn(part.shape, device="cuda", generator=generator)
            part.copy_(random * (scale[first : first + 8192] if torch.is_tensor(scale) else scale))

    with torch.no_grad():
        for name, weight in getattr(model, "runnable", model).named_parameters():
            if "norm" in name:
                weight.fill_(1.0)
            elif "lm_head" in name or "embed_tokens" in name:
                rows, width = weight.shape
                scale = torch.full((rows, 1), 2.5 / width**0.5, device="cuda")
                scale[torch.randperm(rows, device="cuda", generator=generator)[:600]] *= 2.4
                fill(weight, scale)
            elif weight.dim() == 2:
                fill(weight, 0.02)


def main() -> None:
    spec = json.loads(sys.argv[1])
    answers, sys.stdout = sys.stdout, sys.stderr
    os.environ.update({"VLLM_ENABLE_V1_MULTIPROCESSING": "0", **spec.get("environment", {})})
    os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = str(int(spec.get("flashinfer", False)))

    def say(**answer: Any) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    begin = time.monotonic()
    worker = Worker(spec)
    say(started_s=round(time.monotonic() - begin, 1), **worker.about())
    for line in sys.stdin:
        command = json.loads(line)
        say(**(worker.counters() if command.get("counters") else worker.run(command)))


if __name__ == "__main__":
    main()
