"""Prints what this Python lacks of the requirements named: extras of pyproject.toml, "build" or packages, one a line.

Beside them torch as it is installed, so that no requirement replaces it: python .ci/requirements.py build test
"""

import re
import sys
from importlib import metadata
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib


def numbers(version: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", version.split("+")[0])]


def met(requirement: str) -> bool:
    name, relation, version = re.fullmatch(r"([\w.-]+)(?:([>=]=)([\d.]+))?", requirement).groups()
    try:
        installed = numbers(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False
    return installed == numbers(version) if relation == "==" else installed >= numbers(version or "0")


config = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
groups = config["project"]["optional-dependencies"] | {"build": config["build-system"]["requires"]}
missing = sorted({r for name in sys.argv[1:] for r in groups.get(name, [name]) if not met(r)})
if missing:
    print(*missing, f"torch=={metadata.version('torch')}", sep="\n")
