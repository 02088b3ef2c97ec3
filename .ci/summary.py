"""Adds up the JUnit files of several pytest runs: python .ci/summary.py build/reports/*.xml"""

import sys
import xml.etree.ElementTree as xml
from pathlib import Path

OUTCOMES = ("failed", "errors", "passed", "skipped")


def line(counts: dict[str, float]) -> str:
    words = ", ".join(f"{counts[o]:.0f} {o}" for o in OUTCOMES if counts[o])
    return f"{words or 'no tests ran'} in {counts['seconds']:.1f}s"


total = dict.fromkeys((*OUTCOMES, "seconds"), 0.0)
for file in map(Path, sys.argv[1:]):
    suite = xml.parse(file).getroot()[0].attrib
    counts = {"failed": int(suite["failures"]), "errors": int(suite["errors"]), "skipped": int(suite["skipped"])}
    counts |= {"passed": int(suite["tests"]) - sum(counts.values()), "seconds": float(suite["time"])}
    print(f"{file.stem:>20}: {line(counts)}")
    total = {key: total[key] + counts[key] for key in total}
print(f" all runs: {line(total)} ".center(100, "="))
sys.exit(bool(total["failed"] or total["errors"] or not total["passed"]))
