"""The command line: python -m convblocks info | check."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from convblocks import check, info


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m convblocks", description="Fused kernels for convolutional networks."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("info", help="versions, what is built, what is not and why, who runs what")
    command.add_argument("--json", action="store_true", help="the same for a program")
    commands.add_parser("check", help="a self-test of every operation on every backend that runs here; 1 if it fails")
    chosen = parser.parse_args(arguments)
    return info.main(chosen.json) if chosen.command == "info" else check.main()


if __name__ == "__main__":
    sys.exit(main())
