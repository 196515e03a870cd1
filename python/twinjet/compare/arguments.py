"""The flags of `twinjet compare`; imports nothing heavy."""

from __future__ import annotations

import argparse
from pathlib import Path


def compare_arguments(command: argparse.ArgumentParser) -> None:
    """Add the flags."""
    work = command.add_mutually_exclusive_group()
    work.add_argument(
        "--prompts", type=Path, metavar="FILE", help="a prompt a line; .jsonl: text or token_ids"
    )
    work.add_argument(
        "--synthetic",
        default="128,64",
        metavar="IN,OUT",
        help="random prompts of so many tokens; default: %(default)s",
    )
    command.add_argument(
        "--max-tokens", type=int, default=64, metavar="N", help="with --prompts; default: %(default)s"
    )
    command.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default: 0, greedy")
    command.add_argument("--top-p", type=float, metavar="P")
    command.add_argument("--top-k", type=int, metavar="K")
    command.add_argument("--seed", type=int, default=0, help="of requests and arrivals; default: %(default)s")
    load = command.add_mutually_exclusive_group()
    load.add_argument(
        "--concurrency", type=int, default=8, metavar="N", help="closed loop; default: %(default)s"
    )
    load.add_argument(
        "--rate", type=float, metavar="R", help="open loop: requests a second, Poisson arrivals"
    )
    load.add_argument("--constant-rate", type=float, metavar="R", help="open loop: evenly spaced")
    load.add_argument("--trace", type=Path, metavar="FILE", help="open loop: a number of seconds a line")
    command.add_argument(
        "--requests", type=int, default=16, metavar="N", help="a leg of A B B A; default: %(default)s"
    )
    command.add_argument(
        "--precision",
        type=float,
        default=2.0,
        metavar="PERCENT",
        help="wanted half width; default: %(default)s",
    )
    command.add_argument("--max-blocks", type=int, default=60, metavar="N", help="default: %(default)s")
    command.add_argument(
        "--metric",
        choices=("token_time", "e2e", "ttft", "tpot"),
        help="what is judged; default: token_time (throughput) in a closed loop, e2e in an open one",
    )
    command.add_argument("--natural", action="store_true", help="outputs end where the model ends them")
    command.add_argument(
        "--json-schema", type=Path, metavar="FILE", help="every answer must fit it; outputs end by it"
    )
    command.add_argument(
        "--answers",
        type=int,
        default=16,
        metavar="N",
        help="requests whose natural answers are compared, apart from speed; 0: none; default: %(default)s",
    )
    command.add_argument(
        "--ladder", metavar="R,R,...", help="also these rates, for goodput and the Pareto plot"
    )
    command.add_argument("--slo", metavar="ttft=S,tpot=S,itl=S", help="limits in seconds for goodput")
    command.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="SETTING",
        help="may be unequal; may be repeated; all: any",
    )
    command.add_argument(
        "--recommend", metavar="PRICE_A,PRICE_B", help="prices of an hour: say which costs less a token"
    )
    command.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="raw data, CSV, page and guidellm's JSON; default: a new folder here",
    )
    command.add_argument(
        "--other", type=Path, metavar="FILE", help="with report and a JSON file of guidellm: the file of B"
    )
    command.add_argument("--resume", type=Path, metavar="FOLDER", help="go on with a run that was ended")
