"""The command line: python -m convblocks info | check | models | describe."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from convblocks import check, info
from convblocks.models import summary
from convblocks.models.registry import ENTRIES, unknown


def _pixels(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text}")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m convblocks", description="Fused kernels for convolutional networks."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("info", help="versions, what is built, what is not and why, who runs what")
    command.add_argument("--json", action="store_true", help="the same for a program")
    commands.add_parser("check", help="a self-test of every operation on every backend that runs here; 1 if it fails")
    command = commands.add_parser(
        "models", help="the networks: parameters, multiply-accumulates, whose weights they load"
    )
    command.add_argument("pattern", nargs="?", default="", help="only names that contain it")
    command = commands.add_parser(
        "describe", help="the blocks of a network, and the bytes it moves, eager against ours"
    )
    command.add_argument("name")
    command.add_argument("--attention", help="such as se, eca, cbam, simam")
    command.add_argument("--size", type=_pixels, help="height and width of the image; as published if left out")
    chosen = parser.parse_args(arguments)
    if chosen.command == "info":
        return info.main(chosen.json)
    if chosen.command == "check":
        return check.main()
    return _models(chosen)


def _models(chosen: argparse.Namespace) -> int:
    if chosen.command == "models":
        table = summary.listing(chosen.pattern)
        if not table.rows:
            print(f"models: {unknown(chosen.pattern)}", file=sys.stderr)
            return 2
        table.print()
        return 0
    options = {} if chosen.attention is None else {"attention": chosen.attention}
    try:
        if chosen.name not in ENTRIES:
            raise ValueError(unknown(chosen.name))
        print(summary.describe(chosen.name, chosen.size, options))
    except (ValueError, TypeError) as e:
        print(f"describe: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
