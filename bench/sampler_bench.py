"""Times the sampler beside vLLM's CPU sampler and beside reading the row, and counts how often a seed's
token changes when the logits are perturbed.

    python bench/sampler_bench.py --out sampler.json [--vocab 128256 ...] [--batch 1 16] [--repeats 15]
    python bench/sampler_bench.py --vocab --draws 6000          # the seed table alone
    python bench/sampler_bench.py --tables sampler.json ...    # print reports as Markdown

Variants alternate within each repeat, so that noise meets all alike; figures are medians. vLLM is left
out where it is not installed. After a run its tables are printed as Markdown too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from twinjet.sampling import SPEC_VERSION, Request, Sampler, cpu_target

MODES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "top-k 50": {"top_k": 50},
    "top-p .95": {"top_p": 0.95},
    "top-p .9999": {"top_p": 0.9999},
    "top-k 50 + top-p .95": {"top_k": 50, "top_p": 0.95},
    "min-p .05": {"min_p": 0.05},
    "penalties": {"repetition_penalty": 1.1, "frequency_penalty": 0.2, "presence_penalty": 0.1},
}


def language_rows(count: int, vocab_size: int) -> np.ndarray:
    """Rows with a steep head and a long tail, somewhat like a language model's."""
    rng = np.random.default_rng(vocab_size)
    rows = 2.0 * rng.standard_normal((count, vocab_size))
    heads = rng.integers(0, vocab_size, (count, 200))
    np.put_along_axis(rows, heads, 5 + 2.5 * rng.standard_normal((count, 200)), axis=1)
    return rows.astype(np.float32)


def equal_rows(count: int, vocab_size: int) -> np.ndarray:
    """Rows of one value, where every token is at every boundary."""
    return np.ones((count, vocab_size), np.float32)


def elapsed_us(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return 1e6 * (time.perf_counter() - begin)


class Ours:
    """One step of our sampler over all rows."""

    def __init__(self, rows: np.ndarray, options: dict[str, Any], history: np.ndarray, threads: int) -> None:
        self.rows, self.sampler = rows, Sampler(threads)
        self.requests = [
            Request(
                rows.shape[1],
                seed=i,
                prompt_token_ids=history[:256],
                output_token_ids=history[256:],
                **options,
            )
            for i in range(len(rows))
        ]

    def __call__(self) -> float:
        return elapsed_us(lambda: self.sampler.sample(self.rows, self.requests, advance=False))


class Vllm:
    """One step of vLLM's sampler, in this process, on a copy of the rows: it changes its input. Only the
    call is timed."""

    def __init__(self, rows: np.ndarray, options: dict[str, Any], history: np.ndarray) -> None:
        import torch
        from vllm.platforms import current_platform
        from vllm.v1.sample.logits_processor import LogitsProcessors
        from vllm.v1.sample.logits_processor.builtin import MinPLogitsProcessor
        from vllm.v1.sample.metadata import SamplingMetadata
        from vllm.v1.sample.sampler import Sampler as VllmSampler

        current_platform.import_kernels()
        count = len(rows)
        self.logits, self.scratch = torch.from_numpy(rows), torch.empty(rows.shape)
        self.sampler = VllmSampler()
        self.top_k = torch.full((count,), options["top_k"], dtype=torch.int32) if "top_k" in options else None
        greedy = options.get("temperature") == 0.0
        processors = LogitsProcessors()
        if "min_p" in options:
            min_p = MinPLogitsProcessor.__new__(MinPLogitsProcessor)
            min_p.min_p_count, min_p.min_p = count, torch.full((count, 1), options["min_p"])
            processors = LogitsProcessors([min_p])

        def full(name: str, default: float) -> Any:
            return torch.full((count,), options.get(name, default))

        self.metadata = SamplingMetadata(
            temperature=None if greedy else torch.ones(count),
            all_greedy=greedy,
            all_random=not greedy,
            top_p=full("top_p", 1.0) if "top_p" in options else None,
            top_k=None,
            generators={},
            max_num_logprobs=None,
            no_penalties="repetition_penalty" not in options,
            prompt_token_ids=torch.from_numpy(history[:256].astype(np.int64)).repeat(count, 1),
            frequency_penalties=full("frequency_penalty", 0.0),
            presence_penalties=full("presence_penalty", 0.0),
            repetition_penalties=full("repetition_penalty", 1.0),
            output_token_ids=[history[256:].tolist() for _ in range(count)],
            allowed_token_ids_mask=None,
            bad_words_token_ids={},
            logitsprocs=processors,
        )

    def __call__(self) -> float:
        self.scratch.copy_(self.logits)
        if self.top_k is not None:  # its top-k changes k in place
            self.metadata.top_k = self.top_k.clone()
        return elapsed_us(lambda: self.sampler(self.scratch, self.metadata))


def time_case(
    rows: np.ndarray, options: dict[str, Any], repeats: int, threads: int, with_vllm: bool
) -> dict[str, float]:
    """Medians in microseconds a row."""
    count, vocab_size = rows.shape
    history = np.random.default_rng(1).integers(0, vocab_size, 512)
    ours = Ours(rows, options, history, threads)
    theirs = Vllm(rows, options, history) if with_vllm else None
    cold = np.ones((1 + (64 << 20) // (4 * vocab_size), vocab_size), np.float32)
    times: dict[str, list[float]] = {"ours": [], "vllm": [], "read_l2": [], "read_memory": []}
    ours()
    if theirs:
        theirs()
    for repeat in range(repeats):
        times["ours"].append(min(ours() for _ in range(3)))
        if theirs:
            times["vllm"].append(min(theirs() for _ in range(3)))
        row = cold[repeat % len(cold)]
        times["read_memory"].append(elapsed_us(row.max))
        times["read_l2"].append(min(elapsed_us(row.max) for _ in range(3)))
    steps = {name: statistics.median(values) for name, values in times.items() if values}
    return {name: us if name.startswith("read") else us / count for name, us in steps.items()}


def nucleus(row: np.ndarray, top_p: float) -> np.ndarray:
    """Probabilities in float64 after top-p."""
    p = np.exp(row.astype(np.float64) - row.max())
    p /= p.sum()
    if top_p < 1:
        order = np.argsort(-p, kind="stable")
        above = np.cumsum(p[order]) - p[order]
        p[order[above >= top_p]] = 0
        p /= p.sum()
    return p


def seed_robustness(vocab_size: int, draws: int) -> list[dict[str, Any]]:
    """How often one seed's token changes under noise, for our race and for an inverse CDF."""
    rng = np.random.default_rng(0)
    row = language_rows(1, vocab_size)[0]
    sampler = Sampler(1)
    table = []
    for top_p in (1.0, 0.95):
        for noise in (0.001, 0.01):
            changed_race = changed_cdf = 0
            variations = []
            for seed in range(draws):
                noisy = row + (noise * rng.standard_normal(vocab_size)).astype(np.float32)
                both = np.stack([row, noisy])
                pair = [Request(vocab_size, seed=seed, top_p=top_p) for _ in range(2)]
                tokens = sampler.sample(both, pair).token_ids
                changed_race += int(tokens[0] != tokens[1])
                p, q = (nucleus(x, top_p) for x in both)
                variations.append(0.5 * float(np.abs(p - q).sum()))
                u = rng.random()
                changed_cdf += int(np.searchsorted(np.cumsum(p), u) != np.searchsorted(np.cumsum(q), u))
            table.append(
                {
                    "top_p": top_p,
                    "noise": noise,
                    "total_variation": float(np.mean(variations)),
                    "changed_race": changed_race / draws,
                    "changed_inverse_cdf": changed_cdf / draws,
                }
            )
    return table


def tables(reports: list[dict[str, Any]]) -> str:
    """The reports as Markdown. Of a case in several reports the last counts; each table has one target."""
    parts = []
    for target in dict.fromkeys(report["target"] for report in reports):
        own = [report for report in reports if report["target"] == target]
        cases = {(c["vocab"], c["rows"], c["mode"]): c for report in own for c in report["cases"]}
        if cases:
            modes = [mode for mode in MODES if any(mode == key[2] for key in cases)]
            parts.append(timing_table(target, own[-1]["threads"], cases, modes))
    lines = [line for report in reports for line in report.get("seed_robustness", [])]
    return "\n".join([*parts, *([robustness_table(lines)] if lines else [])])


def timing_table(
    target: str, threads: int, cases: dict[tuple[int, int, str], dict[str, Any]], modes: list[str]
) -> str:
    """A line for each vocabulary and batch; in a cell our microseconds a row and how many times vLLM's that
    is faster. The last columns are numpy's max over one row from L2 and from memory."""
    table = [
        f"{target}, {threads} threads:\n",
        f"| vocabulary x rows | {' | '.join(modes)} | read once: L2 | memory |",
        "|---" * (len(modes) + 3) + "|",
    ]
    for vocab_size, rows in dict.fromkeys(key[:2] for key in cases):
        found = [cases.get((vocab_size, rows, mode)) for mode in modes]
        cells = []
        for case in found:
            if case is None:
                cells.append("-")
            elif "vllm" in case:
                cells.append(f"{case['ours']:.1f} / {case['vllm'] / case['ours']:.3g}x")
            else:
                cells.append(f"{case['ours']:.1f}")
        for name in ("read_l2", "read_memory"):
            cells.append(f"{statistics.median(case[name] for case in found if case):.1f}")
        table.append(f"| {vocab_size:,} x {rows} | {' | '.join(cells)} |")
    return "\n".join(table) + "\n"


def robustness_table(lines: list[dict[str, Any]]) -> str:
    table = [
        "| top-p | noise | total variation (TV) | bound, 1.5 x 2 TV | token changed, race "
        "| token changed, inverse CDF |",
        "|---" * 6 + "|",
    ]
    for line in lines:
        top_p = "off" if line["top_p"] >= 1 else f"{line['top_p']:g}"
        variation = line["total_variation"]
        table.append(
            f"| {top_p} | N(0, {line['noise']:g}) | {variation:.5f} | {3 * variation:.4f} "
            f"| {line['changed_race']:.4f} | {line['changed_inverse_cdf']:.3f} |"
        )
    return "\n".join(table) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("sampler_bench.json"))
    parser.add_argument("--vocab", type=int, nargs="*", default=[32000, 49152, 128256, 151936, 262144])
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 16, 64])
    parser.add_argument("--equal", action="store_true", help="time rows of equal logits")
    parser.add_argument("--modes", nargs="*", default=list(MODES))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--draws", type=int, default=2000, help="draws of each line of the seed table")
    parser.add_argument("--seed-vocab", type=int, default=8000, help="vocabulary of the seed table")
    parser.add_argument("--no-vllm", action="store_true")
    parser.add_argument("--tables", type=Path, nargs="+", help="reports to print as Markdown; times nothing")
    args = parser.parse_args()
    if args.tables:
        print(tables([json.loads(path.read_text()) for path in args.tables]))
        return
    with_vllm = not args.no_vllm
    if with_vllm:
        try:
            import torch
            import vllm  # noqa: F401

            torch.set_num_threads(args.threads)
        except ImportError:
            with_vllm = False
    report: dict[str, Any] = {
        "spec_version": SPEC_VERSION,
        "target": cpu_target(),
        "threads": args.threads,
        "machine": platform.processor() or platform.machine(),
        "unit": "microseconds a row",
        "cases": [],
    }
    if args.vocab:
        print(f"target {cpu_target()}, {args.threads} threads; microseconds a row")
        print(
            f"{'vocab':>7} {'rows':>4} {'mode':<21} {'ours':>8} {'vllm':>9} {'ratio':>6} {'L2':>6} "
            f"{'memory':>6}"
        )
    for vocab_size in args.vocab:
        for batch in args.batch:
            rows = (equal_rows if args.equal else language_rows)(batch, vocab_size)
            for mode in args.modes:
                times = time_case(rows, MODES[mode], args.repeats, args.threads, with_vllm)
                ratio = times["vllm"] / times["ours"] if "vllm" in times else float("nan")
                report["cases"].append({"vocab": vocab_size, "rows": batch, "mode": mode, **times})
                print(
                    f"{vocab_size:>7} {batch:>4} {mode:<21} {times['ours']:>8.1f} "
                    f"{times.get('vllm', 0):>9.1f} {ratio:>6.1f} "
                    f"{times['read_l2']:>6.1f} {times['read_memory']:>6.1f}",
                    flush=True,
                )
    if args.draws:
        report["seed_robustness"] = seed_robustness(args.seed_vocab, args.draws)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print("\n" + tables([report]))


if __name__ == "__main__":
    main()
