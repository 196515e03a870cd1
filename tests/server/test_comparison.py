"""AdminService.Compare over real sockets, through every door."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import grpc
import pytest

from tests.models.simulated_twins import compare_twins
from tests.models.virtual_time import run_virtual
from tests.server.harness import Harness, Serve, details
from twinjet.cli import main
from twinjet.compare import analysis
from twinjet.compare.plan import Plan
from twinjet.compare.statistics import Precision
from twinjet.compare.workload import Load, Workload
from twinjet.server import comparison
from twinjet.v1 import compare_pb2 as pb
from twinjet.v1 import sampling_pb2

SLOW = {"engine": "fake", "options": {"step_s": 0.004, "max_num_seqs": 1}}
FAST = {"engine": "fake", "options": {"step_s": 0.002}}
TWINS = {"one": FAST, "two": FAST, "slow": SLOW}


def _request(a: str = "one", b: str = "two", **changed: Any) -> pb.CompareRequest:
    values: dict[str, Any] = {
        "synthetic": pb.SyntheticPrompts(prompt_tokens=4, output_tokens=4),
        "requests_per_leg": 2,
        "max_blocks": 6,
        "num_answers": 3,
    }
    return pb.CompareRequest(deployment_a=a, deployment_b=b, **values | changed)


async def _serve(serve: Serve, **sections: Any) -> Harness:
    return await serve(
        deployments=TWINS, routes={"m": {"weights": {"one": 1, "two": 1, "slow": 1}}}, **sections
    )


async def _events(call: Any) -> list[pb.CompareResponse]:
    return [event async for event in call]


async def test_events_come_in_order_and_the_report_says_what_was_found(serve: Serve) -> None:
    h = await _serve(serve)
    request = _request("one", "slow", allow=["max_concurrent_sequences", "step_s"], ladder=[200.0])
    request.slo.ttft.FromMilliseconds(60_000)
    events = await _events(h.admin.Compare(request))
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[0] == "started" and kinds[-1] == "report" and set(kinds[1:-1]) == {"progress"}
    assert len(events[0].started.digest) == 64
    assert events[0].started.settings_b["max_concurrent_sequences"] == "1"
    phases = [event.progress.phase for event in events[1:-1]]
    assert phases == sorted(phases) and set(phases) == {1, 2, 3, 4}
    assert any(event.progress.HasField("left") for event in events[1:-1])
    report = events[-1].report
    # What is said of a quick run on a busy machine is not certain; that it is said in the verdict's own words is.
    said = {
        pb.COMPARE_OUTCOME_A_FASTER: "one is faster by ",
        pb.COMPARE_OUTCOME_NO_DIFFERENCE: "no difference shown (detectable: ",
        pb.COMPARE_OUTCOME_NOT_COMPARABLE: "not comparable because ",
    }
    assert report.words.startswith(said[report.outcome])
    assert (report.answers.pairs, report.answers.equal_pairs, report.answers.own_equal_pairs_b) == (3, 3, 3)
    assert [(rung.deployment, rung.rate) for rung in report.rungs] == [("one", 200.0), ("slow", 200.0)]
    assert all(rung.goodput > 0 for rung in report.rungs)
    assert {"throughput", "ttft p99"} <= {metric.name for metric in report.metrics}
    assert report.words in report.page_html
    for deployment in h.server.deployments.by_name.values():
        assert deployment.dispatcher.totals().running == 0


def test_a_report_carries_the_whole_verdict() -> None:
    data = run_virtual(compare_twins(5, 0.2, precision=Precision(half_width=0.02, max_blocks=12)))
    data.header = {"names": ["left", "right"], "metric": "token_time", "in_process": True}
    plan = Plan(Workload(()), Load("closed"), 16, Precision(), "token_time")
    report = comparison._report(data, plan, analysis.Slo())
    assert report.outcome == pb.COMPARE_OUTCOME_A_FASTER
    assert re.fullmatch(r"left is faster by \d+\.\d% \[\d+\.\d, \d+\.\d\]", report.words)
    assert 1 < report.ratio.low < report.ratio.ratio < report.ratio.high < 1.4
    assert 0 < report.noise_floor < 0.1 and report.detectable >= report.noise_floor
    throughput = report.metrics[0]
    assert (throughput.name, throughput.unit) == ("throughput", "tokens/s") and throughput.a > throughput.b


async def test_a_client_that_leaves_stops_it_and_the_next_one_can_come(serve: Serve) -> None:
    h = await _serve(serve)
    call = h.admin.Compare(_request(requests_per_leg=64, max_blocks=200, precision=1e-6))
    async for event in call:
        if event.WhichOneof("event") == "progress":
            break
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await _events(h.admin.Compare(_request()))
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert details(refused.value)["ErrorInfo"].reason == "COMPARISON_RUNNING"
    call.cancel()
    dispatchers = [d.dispatcher for d in h.server.deployments.by_name.values()]
    await h.until(lambda: all(d.totals().running == d.totals().waiting == 0 for d in dispatchers))

    async def again() -> list[pb.CompareResponse]:
        while True:
            try:
                return await _events(h.admin.Compare(_request()))
            except grpc.aio.AioRpcError as error:
                assert details(error)["ErrorInfo"].reason == "COMPARISON_RUNNING"
                await asyncio.sleep(0.01)

    async with asyncio.timeout(60):
        assert (await again())[-1].WhichOneof("event") == "report"


async def test_a_listed_prompt_that_is_too_long_is_named(serve: Serve) -> None:
    h = await _serve(serve)
    for text, told in (
        ("x" * 4092, "has 4093 tokens or more; the context leaves 1 to 4092"),
        ("x" * 10**6, "or more"),
    ):
        listed = pb.ListedPrompts(texts=["x", text], output_tokens=4)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await _events(h.admin.Compare(_request(synthetic=None, listed=listed)))
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        (violation,) = details(refused.value)["BadRequest"].field_violations
        assert violation.field == "listed.texts[1]" and told in violation.description


async def test_listed_prompts_are_told_apart_from_others_by_their_digest(serve: Serve) -> None:
    h = await _serve(serve)
    digests = []
    for texts in (["hello", "world"], ["hello", "there"]):
        request = _request(listed=pb.ListedPrompts(texts=texts, output_tokens=3))
        call = h.admin.Compare(request)
        digests.append((await call.read()).started.digest)
        call.cancel()
        await h.until(lambda: not h.server.deployments.by_name["one"].dispatcher.totals().running)
        await asyncio.sleep(0)
    assert len(set(digests)) == 2


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"requests_per_leg": 0}, "requests_per_leg"),
        ({"requests_per_leg": 4096, "max_blocks": 1000}, "requests_per_leg"),
        ({"max_blocks": 5}, "max_blocks"),
        ({"num_answers": 5000}, "num_answers"),
        ({"precision": 0.0}, "precision"),
        ({"precision": float("nan")}, "precision"),
        ({"concurrency": 0}, "concurrency"),
        ({"poisson_rate": -1.0}, "poisson_rate"),
        ({"constant_rate": float("inf")}, "constant_rate"),
        ({"ladder": [1.0, 0.0]}, "ladder[1]"),
        ({"ladder": [1.0] * 17}, "ladder"),
        ({"sampling": sampling_pb2.SamplingParams(seed=1)}, "sampling.seed"),
        ({"sampling": sampling_pb2.SamplingParams(stop=["x"])}, "sampling.stop"),
        ({"sampling": sampling_pb2.SamplingParams(top_p=2)}, "sampling.top_p"),
        ({"synthetic": pb.SyntheticPrompts(prompt_tokens=0, output_tokens=1)}, "synthetic.prompt_tokens"),
        ({"synthetic": pb.SyntheticPrompts(prompt_tokens=5000, output_tokens=1)}, "synthetic.prompt_tokens"),
        ({"synthetic": pb.SyntheticPrompts(prompt_tokens=1)}, "synthetic.output_tokens"),
        ({"synthetic": None}, "prompts"),
        ({"listed": pb.ListedPrompts(texts=["a", ""], output_tokens=1), "synthetic": None}, "listed.texts"),
        ({"slo": pb.LatencyLimits(ttft={"seconds": -1})}, "slo.ttft"),  # type: ignore[arg-type]
    ],
)
async def test_a_wrong_field_is_named(serve: Serve, changed: dict[str, Any], field: str) -> None:
    h = await _serve(serve)
    with pytest.raises(grpc.aio.AioRpcError) as wrong:
        await _events(h.admin.Compare(_request(**changed)))
    assert wrong.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert [v.field for v in details(wrong.value)["BadRequest"].field_violations] == [field]


@pytest.mark.parametrize(
    ("a", "b", "code", "told"),
    [
        ("", "two", grpc.StatusCode.INVALID_ARGUMENT, "deployment_a"),
        ("one", "three", grpc.StatusCode.NOT_FOUND, "three"),
        ("one", "slow", grpc.StatusCode.FAILED_PRECONDITION, "max_concurrent_sequences: 64 and 1"),
    ],
)
async def test_sides_that_cannot_be_compared_are_refused(
    serve: Serve, a: str, b: str, code: grpc.StatusCode, told: str
) -> None:
    h = await _serve(serve)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await _events(h.admin.Compare(_request(a, b)))
    assert refused.value.code() is code and told in (refused.value.details() or "")


async def test_it_is_the_operators_alone(serve: Serve) -> None:
    h = await _serve(serve, admin={"token": "sesame"})
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await _events(h.admin.Compare(_request()))
    assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
    call = h.admin.Compare(_request(), metadata=(("authorization", "Bearer sesame"),))
    assert (await _events(call))[-1].WhichOneof("event") == "report"


async def test_a_deployment_that_loads_is_unavailable(serve: Serve) -> None:
    loading = {"engine": "fake", "options": {"load_s": 600.0}}
    h = await serve(deployments={"one": loading, "two": loading}, ready=False)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await _events(h.admin.Compare(_request()))
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_draining_ends_it(serve: Serve) -> None:
    h = await _serve(serve)
    call = h.admin.Compare(_request(requests_per_leg=8, max_blocks=200, precision=1e-6))
    async for _ in call:
        break
    h.server.deployments.drain()
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        await _events(call)
    assert ended.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_the_command_refuses_other_tokenizers_and_loading_models_in_a_sentence(
    serve: Serve, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    h = await serve(deployments={"one": FAST, "two": FAST})
    tokenizer = h.engines[1].tokenizer
    plain = tokenizer.encode
    monkeypatch.setattr(
        tokenizer, "encode", lambda text, **how: [t for t in plain(text, **how) if t != 32], raising=False
    )
    command = ["compare", "one", "two", "--address", h.server.address, "--allow", "all"]
    assert await asyncio.to_thread(main, command) == 2
    told = capsys.readouterr().err
    assert "different tokenizers" in told and "Traceback" not in told
    loading = await serve(deployments={"one": {"engine": "fake", "options": {"load_s": 600.0}}}, ready=False)
    command = ["compare", "one", "one", "--address", loading.server.address]
    assert await asyncio.to_thread(main, command) == 2
    told = capsys.readouterr().err
    assert "model 'one' is loading" in told and "Traceback" not in told
