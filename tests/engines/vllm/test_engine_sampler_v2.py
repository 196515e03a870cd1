"""The runners' samplers on a device with look-alikes of the runners' parts: what can be tried without a GPU."""

import sys
from pathlib import Path
from types import ModuleType
from types import SimpleNamespace as Made
from typing import Any

import numpy as np
import pytest

from tests.doubles.seats import HostSeats
from tests.engines.vllm.support import native_params
from twinjet._core import TokenTexts, Vocabulary
from twinjet.engines.vllm.fields import EXTRA_KEY, NO_TOKEN
from twinjet.sampling import Request, Sampler

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("default")]

VOCAB = 64
PROMPT = [10, 11, 12]


class Stock:
    """Stands for vLLM's V2 sampler: counts calls, draws `token` in every row."""

    logprobs_mode = "raw_logprobs"

    def __init__(self) -> None:
        self.calls = 0
        self.token = 7
        self.req_states = Made(index_to_req_id={index: f"r{index}" for index in range(4)})
        self.num_logprobs: int | None = None
        self.logits_processors: list[Any] = []
        self.num_applied = self.num_asked = 0

    def add_request(self, index: int, params: Any) -> None:
        if len(params.allowed_token_ids or ()) > 8 or len(params.logit_bias or ()) > 8:
            raise ValueError("too many")

    def apply_staged_writes(self) -> None:
        self.num_applied += 1

    def get_logprobs_dims(self, indices: Any) -> Any:
        self.num_asked += 1
        return None if self.num_logprobs is None else (self.num_logprobs, 0)

    def __call__(self, logits: Any, batch: Any) -> Any:
        import torch

        self.calls += 1
        return Made(by="stock", sampled_token_ids=torch.full((len(logits), 1), self.token, dtype=torch.int64))


def batch(seats: list[int], seq_lens: list[int]) -> Made:
    import torch

    return Made(
        idx_mapping_np=np.array(seats), num_reqs=len(seats), req_ids=[f"r{seat}" for seat in seats],
        seq_lens_cpu_upper_bound=torch.tensor(seq_lens), prefill_len_np=np.full(len(seats), 3),
    )  # fmt: skip


def drawing() -> Any:
    from twinjet.engines.vllm.core.device_drawing import DeviceDrawing

    return DeviceDrawing(VOCAB, 4, "raw_logprobs", 0, HostSeats(VOCAB))


@pytest.fixture
def wrapped(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A NativeSamplerV2; vLLM's V2 modules, which need Triton, are stood in for."""
    from twinjet import _core

    output = ModuleType("output")
    output.SamplerOutput = Made  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.v1.worker.gpu.sample.output", output)
    monkeypatch.setattr(_core, "CUDA_MAX_LOGPROBS", 128, raising=False)
    from twinjet.engines.vllm.core.sampler_v2 import NativeSamplerV2

    return NativeSamplerV2(Stock(), drawing())


def add(sampler: Any, index: int, output: list[int] | None = None, **changed: Any) -> None:
    tokens = PROMPT + (output or [])
    new = Made(prompt_token_ids=PROMPT, prompt_len=len(PROMPT), prefill_token_ids=tokens)
    sampler.incoming = {f"r{index}": new}
    sampler.add_request(index, native_params(**changed))


def logits(rows: int) -> Any:
    import torch

    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(3))


def test_it_draws_what_the_native_sampler_draws(wrapped: Any) -> None:
    import torch

    add(wrapped, 1)
    made = wrapped(logits(1), batch([1], [3]))
    alone = Request(VOCAB, temperature=1.0, seed=5, prompt_token_ids=PROMPT)
    expected = Sampler(1).sample(logits(1), [alone]).token_ids
    assert made.sampled_token_ids.dtype == torch.int64
    assert made.sampled_token_ids.tolist() == [[int(expected[0])]]
    assert made.num_sampled.tolist() == [1]
    assert made.num_rejected.tolist() == [0]
    second = wrapped(logits(1), batch([1], [4])).sampled_token_ids[0, 0]
    assert int(second) == int(Sampler(1).sample(logits(1), [alone]).token_ids[0])
    assert wrapped.stock.calls == 0
    assert wrapped.drawing.target == "cuda"


def test_logprobs_come_in_the_runners_form(wrapped: Any) -> None:
    wrapped.stock.num_logprobs = 2
    add(wrapped, 0)
    add(wrapped, 1, logprobs=2)
    made = wrapped(logits(2), batch([1, 0], [3, 3]))
    alone = [Request(VOCAB, temperature=1.0, seed=5, prompt_token_ids=PROMPT) for _ in range(2)]
    expected = Sampler(1).sample(logits(2), alone, num_logprobs=2)
    found = made.logprobs_tensors
    assert expected.logprobs is not None
    assert made.sampled_token_ids[:, 0].tolist() == expected.token_ids.tolist()
    assert found.logprob_token_ids.tolist() == expected.logprobs.token_ids.tolist()
    assert found.logprobs.numpy().tobytes() == expected.logprobs.logprobs.tobytes()
    assert found.selected_token_ranks.tolist() == expected.logprobs.ranks.tolist()


def test_what_the_device_cannot_draw_goes_to_vllms_sampler(wrapped: Any) -> None:
    import torch

    add(wrapped, 1)
    seats, reason = np.array([1]), wrapped.drawing.reason
    assert reason(logits(1), seats, 128) == ""
    assert reason(logits(1), seats, 129) == "more_logprobs_than_on_cuda"
    assert reason(logits(1).to(torch.float64), seats, None) == "logits_layout"
    assert reason(logits(1)[:, ::2], seats, None) == "logits_layout"
    assert reason(logits(2), seats, None) == "several_rows_a_request"
    assert reason(logits(1), np.array([0]), None) == "dummy_run"


def test_an_unfinished_prefill_does_not_advance(wrapped: Any) -> None:
    add(wrapped, 1)
    thrown = wrapped(logits(1), batch([1], [2]))
    assert thrown.num_sampled.tolist() == [0]
    kept = wrapped(logits(1), batch([1], [3]))
    assert thrown.sampled_token_ids.tolist() == kept.sampled_token_ids.tolist()


def test_results_stay_while_a_step_may_be_in_flight(wrapped: Any) -> None:
    add(wrapped, 1)
    made = [wrapped(logits(1), batch([1], [3 + i])).sampled_token_ids for i in range(9)]
    places = [tokens.data_ptr() for tokens in made]
    assert all(len(set(places[i : i + 4])) == 4 for i in range(6))
    assert len(set(places)) == 4


def test_a_resumed_request_goes_on_where_it_was(wrapped: Any) -> None:
    penalties = {"frequency_penalty": 1.5, "presence_penalty": 0.5}
    add(wrapped, 0, **penalties)
    tokens = [int(wrapped(logits(1), batch([0], [3 + i])).sampled_token_ids[0, 0]) for i in range(6)]
    add(wrapped, 2, tokens[:4], **penalties)
    resumed = [int(wrapped(logits(1), batch([2], [7 + i])).sampled_token_ids[0, 0]) for i in range(2)]
    assert resumed == tokens[4:]


def test_rows_beside_a_foreign_one_take_over_what_vllms_sampler_draws(wrapped: Any) -> None:
    add(wrapped, 0)
    add(wrapped, 1, extra_args=None)
    assert wrapped(logits(2), batch([0, 1], [3, 3])).by == "stock"
    assert wrapped.drawing.counters["stock_steps.foreign_request"] == 1
    assert wrapped.drawing.native.requests[0].output_token_ids.tolist() == [7]
    made = wrapped(logits(1), batch([0], [4]))
    alone = Request(VOCAB, temperature=1.0, seed=5, prompt_token_ids=PROMPT, output_token_ids=[7])
    assert made.sampled_token_ids.tolist() == [[int(Sampler(1).sample(logits(1), [alone]).token_ids[0])]]
    add(wrapped, 1)
    assert not hasattr(wrapped(logits(2), batch([0, 1], [5, 3])), "by")


def test_steps_of_a_warm_up_are_no_fall_backs(wrapped: Any) -> None:
    assert wrapped(logits(2), batch([2, 3], [1, 1])).by == "stock"
    add(wrapped, 0, extra_args=None)
    wrapped.drawing.is_warming = True
    assert wrapped(logits(1), batch([0], [3])).by == "stock"
    assert not any("stock" in name for name in wrapped.drawing.counters)
    wrapped.drawing.is_warming = False
    assert wrapped(logits(1), batch([0], [3])).by == "stock"
    assert wrapped.drawing.counters["stock_steps"] == 1


def test_a_row_without_a_token_is_marked_on_the_host(wrapped: Any) -> None:
    from twinjet.engines.vllm.core.device_drawing import MarkedOutput

    add(wrapped, 0, allowed_token_ids=[])
    add(wrapped, 1)
    made = wrapped(logits(2), batch([0, 1], [3, 3]))
    assert (made.sampled_token_ids >= 0).all()
    unread = wrapped.take_unread()
    assert wrapped.take_unread() is None
    output = Made(sampled_token_ids=[[0], [9]], req_id_to_index={"r0": 0, "r1": 1})
    marked = MarkedOutput(Made(get_output=lambda: output), unread).get_output()
    assert marked.sampled_token_ids == [[NO_TOKEN], [9]]
    assert wrapped.drawing.counters["rows_without_token"] == 1


def test_a_row_without_a_token_ends_no_request_whose_prefill_goes_on(wrapped: Any) -> None:
    add(wrapped, 0, allowed_token_ids=[])
    wrapped(logits(1), batch([0], [2]))
    assert wrapped.take_unread().failed() == []


def test_the_hook_leaves_models_with_their_own_sampler_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from twinjet.engines.vllm.core import sampler_v2

    monkeypatch.setattr(sampler_v2, "DeviceDrawing", lambda *args, max_in_flight: (*args, max_in_flight))
    monkeypatch.setattr(sampler_v2, "can_draw_on", lambda device: device.type == "cuda")

    def made(theirs: Any, speculative: Any, device: str = "cuda:1", processors: Any = ()) -> Any:
        stock = Stock()
        stock.logits_processors.extend(processors)
        runner = Made(init_model_state=lambda config, *rest: Made(custom_sampler=lambda sampler: theirs))
        sampler_v2.hook_custom_sampler(runner, VOCAB, torch.device(device), is_tested=True)
        config = Made(
            speculative_config=speculative,
            scheduler_config=Made(max_num_seqs=4),
            max_concurrent_batches=2,
        )
        return runner.init_model_state(config, 1, 2).custom_sampler(stock)

    ours = made(None, None)
    assert isinstance(ours[0], sampler_v2.NativeSamplerV2)
    assert ours[0].drawing == (VOCAB, 4, "raw_logprobs", 1, 2)
    assert ours[1] is None
    assert ours[0]._draws_none == ""
    assert made(None, None, processors=[object()])[0]._draws_none == "custom_logits_processor"
    assert made(("s", "r"), None) == ("s", "r")
    assert made(None, object()) is None
    assert made(None, None, "cpu") is None


def test_vllms_sampler_is_brought_up_to_date_when_a_request_has_entered(wrapped: Any) -> None:
    from twinjet.engines.vllm.core.sampler_v2 import NativeSamplerV2

    always = NativeSamplerV2(Stock(), drawing())
    lazy = NativeSamplerV2(Stock(), drawing(), is_lazy=True)
    for sampler, expected in ((always, [1, 2, 3, 4, 5]), (lazy, [1, 2, 2, 3, 3])):
        applied = []
        for index, allowed in ((None, None), (0, None), (None, None), (1, range(20, 40)), (None, None)):
            if index is not None:
                add(sampler, index, allowed_token_ids=allowed)
            sampler.apply_staged_writes()
            applied.append(sampler.stock.num_applied)
        assert applied == expected


def test_vllms_sampler_is_asked_for_logprobs_only_while_a_request_wants_them(wrapped: Any) -> None:
    running = wrapped.stock.req_states.index_to_req_id
    add(wrapped, 0)
    wrapped(logits(1), batch([0], [3]))
    assert wrapped.stock.num_asked == 0
    wrapped.stock.num_logprobs = 2
    add(wrapped, 1, logprobs=2)
    add(wrapped, 2, logprob_token_ids=[3])
    assert wrapped(logits(1), batch([1], [3])).logprobs_tensors is not None
    wrapped.stock.num_logprobs = None
    del running[1]
    for position in (4, 5):
        wrapped(logits(1), batch([0], [position]))
    assert wrapped.stock.num_asked == 3, "2 may be in a later batch"
    del running[2]
    for position in (6, 7):
        wrapped(logits(1), batch([0], [position]))
    assert wrapped.stock.num_asked == 4
    running[1] = "r1"
    add(wrapped, 1, logprobs=2)
    add(wrapped, 1)
    wrapped(logits(1), batch([1], [3]))
    assert wrapped.stock.num_asked == 4


class Kernels:
    """Stands for a Triton kernel or its launcher: counts calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __getitem__(self, grid: Any) -> Any:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.calls += 1


def vllms_sampler(patch: pytest.MonkeyPatch, processors: tuple[Any, ...] = ()) -> Any:
    """vLLM's own V2 sampler with a request of everything in place 2."""
    import torch
    from vllm import SamplingParams
    from vllm.v1.worker.gpu import buffer_utils
    from vllm.v1.worker.gpu.sample.sampler import Sampler as StockSampler
    from vllm.v1.worker.gpu.states import RequestState

    patch.setattr(buffer_utils, "is_uva_available", lambda: False)
    config = Made(reasoning_config=None)
    states = RequestState(4, 64, 64, 0, VOCAB, torch.device("cpu"))
    made = StockSampler(
        config,
        4,
        VOCAB,
        torch.device("cpu"),
        states,
        enable_trace_replay=True,
        custom_logits_processors=processors,
    )
    params = SamplingParams(
        temperature=0.7, top_k=9, top_p=0.5, min_p=0.1, seed=7, frequency_penalty=0.5, repetition_penalty=1.5,
        presence_penalty=0.5, logit_bias={3: 1.0}, allowed_token_ids=[3, 4], min_tokens=2, stop_token_ids=[5],
        logprobs=2, trace_decode_token_ids=[6, 7],
    )  # fmt: skip
    params._bad_words_token_ids = [[8, 9]]
    params.logprob_token_ids = [10, 11]
    made.add_request(2, params)
    return made


def on_device(found: Any, depth: int = 3) -> list[list[Any]]:
    """What a sampler of vLLM's, or a part of it, has shown the device."""
    from vllm.v1.worker.gpu.buffer_utils import UvaBackedTensor

    if isinstance(found, UvaBackedTensor):
        assert found.gpu.tolist() == found.np.tolist()
        return [found.gpu.tolist()]
    parts = found if isinstance(found, list) else list(getattr(found, "__dict__", {}).values())
    return [shown for part in parts if depth for shown in on_device(part, depth - 1)]


def test_applied_again_vllms_own_sampler_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a step without a new request can leave it out."""
    from vllm.v1.worker.gpu import buffer_utils
    from vllm.v1.worker.gpu.sample import penalties

    from twinjet.engines.vllm.core.sampler_v2 import changes_with_requests_alone

    kernels = Kernels()
    monkeypatch.setattr(buffer_utils, "_apply_write_kernel", kernels)
    monkeypatch.setattr(penalties, "bincount", kernels)
    monkeypatch.setattr(penalties, "async_tensor_h2d", lambda *args, **kwargs: None)
    monkeypatch.setattr(buffer_utils, "async_tensor_h2d", lambda *args, **kwargs: None)
    stock = vllms_sampler(monkeypatch)
    stock.apply_staged_writes()
    shown, written = on_device(stock), kernels.calls
    assert len(shown) >= 15
    assert written >= 7
    for _ in range(3):
        stock.apply_staged_writes()
        assert on_device(stock) == shown
    assert kernels.calls == written
    assert changes_with_requests_alone(stock)


def test_a_deployments_own_logits_processors_are_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    from twinjet.engines.vllm.core.sampler_v2 import (
        NativeSamplerV2,
        changes_with_requests_alone,
        has_custom_processors,
    )

    assert not has_custom_processors(vllms_sampler(monkeypatch))
    custom = vllms_sampler(monkeypatch, (Made(add_request=lambda *args: True),))
    assert has_custom_processors(custom)
    assert not changes_with_requests_alone(custom)
    assert not changes_with_requests_alone(Stock())
    wrapped = NativeSamplerV2(Stock(), drawing(), draws_none="custom_logits_processor")
    add(wrapped, 0)
    assert wrapped(logits(1), batch([0], [3])).by == "stock"
    assert wrapped.drawing.counters["stock_steps.custom_logits_processor"] == 1


def test_the_shortened_steps_are_for_the_runner_that_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from twinjet.engines.vllm import compat

    compat.check_runner()
    monkeypatch.setattr(compat, "RUNNER_FINGERPRINT", "another")
    with pytest.raises(compat.UntestedVllmError, match="V2 model runner"):
        compat.check_runner()


def test_batches_come_in_vllms_order() -> None:
    from vllm.v1.worker.gpu import model_runner

    from twinjet.engines.vllm.core.runner_v2 import hook_order

    asked = []

    def original(*args: Any) -> list[str]:
        asked.append(args)
        return model_runner.sort_batch_req_ids(*args)

    hooked = Made(sort_batch_req_ids=original)
    hook_order(hooked)
    rng = np.random.default_rng(1)
    for most in (1, 2, 40):
        for size in (1, 7, 300):
            tokens = {f"r{i}": int(n) for i, n in enumerate(rng.integers(1, most + 1, size))}
            assert hooked.sort_batch_req_ids(tokens, {}, 1) == model_runner.sort_batch_req_ids(tokens, {}, 1)
    assert asked == []
    tokens, drafts = {"a": 1, "b": 3, "c": 3}, {"c": [4, 5]}
    assert hooked.sort_batch_req_ids(tokens, drafts, 3) == ["c", "b", "a"]
    assert hooked.sort_batch_req_ids(tokens, {}, 3) == ["b", "c", "a"]
    assert len(asked) == 2


def favours(token: int) -> Any:
    import torch

    made = torch.zeros(1, VOCAB)
    made[0, token] = 9.0
    return made


@pytest.fixture
def bans_1_after_0(tmp_path: Path) -> dict[str, Any]:
    """Parameters of a request whose tokens are single characters, of which 1 may not follow 0."""
    texts = tmp_path / "texts"
    letters = Vocabulary("byte_level", [chr(33 + i) for i in range(VOCAB)], special=[])
    texts.write_bytes(TokenTexts(letters).save())
    own = {"temperature": 0.0, "seed": 5, "output_index": 0, "bad_text": [str(texts), ['!"'], True]}
    return {"extra_args": {EXTRA_KEY: own}}


def test_bad_words_hold_whichever_sampler_draws(wrapped: Any, bans_1_after_0: dict[str, Any]) -> None:
    import torch

    add(wrapped, 0, **bans_1_after_0)
    assert wrapped(favours(0), batch([0], [3])).sampled_token_ids.tolist() == [[0]]
    second = favours(1)
    assert wrapped(second, batch([0], [4])).sampled_token_ids.tolist() != [[1]]
    assert not second.isinf().any(), "the draw itself bans"
    assert wrapped(favours(0), batch([0], [5])).sampled_token_ids.tolist() == [[0]]
    add(wrapped, 1, extra_args=None)
    both = torch.cat([favours(1), favours(1)])
    assert wrapped(both, batch([0, 1], [6, 3])).by == "stock"
    assert both.isinf().nonzero().tolist() == [[0, 1]]
    wrapped.drawing.leave(0)
    alone = favours(1)
    wrapped(alone, batch([1], [4]))
    assert not alone.isinf().any()
    assert not any(count for name, count in wrapped.drawing.counters.items() if "waits" in name)


def test_a_request_that_only_vllms_sampler_can_draw_has_its_bad_words_too(
    wrapped: Any, bans_1_after_0: dict[str, Any]
) -> None:
    import torch

    add(wrapped, 0, logprobs=-1, **bans_1_after_0)
    wrapped.stock.token = 0
    apart = torch.zeros(1, 2 * VOCAB)[:, ::2]
    for position, banned in ((3, []), (4, [[0, 1]])):
        for made in (favours(1), favours(1).to(torch.float64), apart):
            wrapped.drawing.ban_text(made, np.array([0]))
            assert made.isinf().nonzero().tolist() == banned
        assert wrapped(favours(0), batch([0], [position])).by == "stock"
    assert wrapped.drawing.counters["stock_steps.all_logprobs"] == 2


def test_a_batch_without_bad_words_costs_no_mask(wrapped: Any, bans_1_after_0: dict[str, Any]) -> None:
    import torch

    masked = []
    mask = wrapped.drawing.native.mask
    wrapped.drawing.native.mask = lambda seats, *rest: (masked.append(seats.tolist()), mask(seats, *rest))
    add(wrapped, 0, logprobs=-1)
    add(wrapped, 1, **bans_1_after_0)
    assert wrapped(favours(0), batch([0], [3])).by == "stock"
    assert masked == []
    assert wrapped(torch.cat([favours(0), favours(0)]), batch([0, 1], [4, 3])).by == "stock"
    assert masked == [[-1, 1]]


def test_bad_words_without_room_end_a_request(wrapped: Any, bans_1_after_0: dict[str, Any]) -> None:
    put = wrapped.drawing.native.put

    def refuse(seat: int, request: Request) -> None:
        if request.has_bad_text:
            raise ValueError("no room")
        put(seat, request)

    wrapped.drawing.native.put = refuse
    add(wrapped, 0, **bans_1_after_0)
    wrapped(favours(0), batch([0], [3]))
    assert wrapped.take_unread().failed() == ["r0"]
    assert wrapped.drawing.counters["requests_without_room"] == 1


def grammar_of(allowed: list[int], *request_ids: str) -> Made:
    mask = np.zeros((len(request_ids), 2), np.int32)
    for token in allowed:
        mask[:, token // 32] |= np.int32(1) << np.int32(token % 32)
    return Made(structured_output_request_ids=list(request_ids), grammar_bitmask=mask)


def test_logprobs_under_a_grammar_are_those_before_its_mask(wrapped: Any) -> None:
    import torch

    wrapped.stock.num_logprobs = 2
    add(wrapped, 0)
    add(wrapped, 1, logprobs=2)
    masked: list[Any] = []
    worker = Made(apply_grammar_bitmask=lambda logits, *rest: masked.append(logits))
    with wrapped.with_grammar(grammar_of([5, 6], "r1"), Made(structured_outputs_worker=worker)):
        made = wrapped(logits(2), batch([0, 1], [3, 3]))
        free = torch.log_softmax(logits(2), 1)
        assert made.sampled_token_ids[1, 0] in (5, 6)
        found = made.logprobs_tensors.logprobs
        assert torch.allclose(found[1, 0], free[1, int(made.sampled_token_ids[1, 0])], atol=1e-5)
        assert torch.allclose(found[:, 1], free.max(1).values, atol=1e-5)
        assert masked == []
        add(wrapped, 0, extra_args=None)
        assert wrapped(logits(2), batch([0, 1], [3, 4])).by == "stock"
        assert len(masked) == 1
    wrapped(logits(1), batch([1], [5]))
    assert wrapped.drawing.counters["rows"] == 3


def test_lists_too_long_for_vllms_sampler_do_not_end_the_engine(wrapped: Any) -> None:
    allowed = list(range(20, 40))
    add(wrapped, 0, allowed_token_ids=allowed)
    assert wrapped(logits(1), batch([0], [3])).sampled_token_ids[0, 0].item() in allowed
    add(wrapped, 1, extra_args=None)
    assert wrapped(logits(2), batch([0, 1], [4, 3])).by == "stock"
    assert wrapped.drawing.counters["rows_beyond_vllms_limits"] == 1
    add(wrapped, 0)
    wrapped(logits(2), batch([0, 1], [3, 4]))
    assert wrapped.drawing.counters["rows_beyond_vllms_limits"] == 1


def v1_state(**changed: Any) -> Made:
    return Made(sampling_params=native_params(**changed), prompt_token_ids=PROMPT, output_token_ids=[])


def test_v1_seats_follow_the_runners_lists_by_length_alone() -> None:
    """Asynchronous scheduling appends placeholders; a rollback makes the list shorter."""
    import torch

    from twinjet.engines.vllm.core.device_seats import DeviceSeats

    device = drawing()
    seats = DeviceSeats(device)
    states = {"a": v1_state(frequency_penalty=1.0), "b": v1_state(extra_args=None)}
    greedy = {"extra_args": {EXTRA_KEY: {"temperature": 0.0, "seed": 5, "output_index": 0}}}
    states["c"] = v1_state(**greedy)

    def step(ids: list[str]) -> list[int]:
        found = seats.find(ids, states)
        assert device.reason(logits(len(ids)), found, None) == ""
        advances = np.ones(len(ids), np.bool_)
        drawn = device.draw(logits(len(ids)), found, advances, None, ids, torch.int32)
        assert drawn.tokens.dtype == torch.int32
        for request_id in ids:
            states[request_id].output_token_ids.append(-1)
        return [row[0] for row in drawn.tokens.tolist()]

    first = [step(["a", "c"])[0] for _ in range(5)]
    assert device.reason(logits(1), seats.find(["b"], states), None) == "foreign_request"
    states["a"].output_token_ids = first[:3]
    assert step(["a"]) == [first[3]]
    states["a"].output_token_ids = [*first[:3], -1, -1, -1]
    assert device.reason(logits(1), seats.find(["a"], states), None) == "tokens_not_known"
    seats.forget(["a", "b", "c", "unknown"])
    assert len(seats) == 0
    assert device.native.requests == {}
    states["d"] = v1_state()
    assert seats.find(["d"], states).tolist() in ([0], [1], [2]), "seats that were left are used again"
