"""What is made of a run's file: means, comparison, HTML, Markdown, CSV."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bench.__main__ import main
from bench.results import Results, Summary, geometric_mean
from tests.bench.common import row, run, save, timing

PEERS = {"eager/contiguous": 4e-3, "compile/channels_last": 2e-3}


def test_geometric_mean() -> None:
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert geometric_mean([0.5, 2.0]) == pytest.approx(1.0)
    assert geometric_mean([]) is None


def test_what_a_row_derives() -> None:
    r = row(1e-3, PEERS)
    assert r.best_peer == "compile/channels_last"
    assert r.ratio == pytest.approx(2.0)
    assert r.median_ratio == pytest.approx(2.0)
    assert r.gbps == pytest.approx(2.0)
    assert r.copy_gbps == pytest.approx(4.0)
    assert r.copy_share == pytest.approx(0.5)
    assert r.gflops == pytest.approx(1.0)
    assert r.graph_ratio is None
    assert row(
        1e-3, PEERS, graph={"ours": timing(1e-3), "eager/contiguous": timing(3e-3)}
    ).graph_ratio == pytest.approx(3)
    wrong = row(None, PEERS)
    assert (wrong.ratio, wrong.median_ratio, wrong.gbps, wrong.copy_share) == (None, None, None, None)
    assert row(1e-3, {}).ratio is None
    assert r.settled
    assert not dataclasses.replace(r, ours=timing(1e-3, near=2)).settled
    assert not dataclasses.replace(r, peers={"eager/contiguous": timing(1e-3, near=2)}).settled
    assert not wrong.settled


def test_summary_counts_only_what_was_timed() -> None:
    rows = [row(1e-3, PEERS), row(0.25e-3, PEERS, size=(9, 9, 9, 9)), row(2e-3, PEERS, layout="channels_last")]
    summary = Summary([*rows, row(None, PEERS, size=(8, 8, 8, 8))])
    assert summary.mean() == pytest.approx((2 * 8 * 1) ** (1 / 3))
    assert summary.mean("contiguous") == pytest.approx(4.0)
    assert summary.mean("channels_last") == pytest.approx(1.0)
    assert summary.worst == rows[2]


def test_a_file_comes_back_as_it_was(tmp_path: Path) -> None:
    rows = [row(1e-3, PEERS, graph={"ours": timing(1e-4)}), row(None, {}, peer_errors={"compile/contiguous": "E: no"})]
    results = Results.load(save(tmp_path / "x.json", *rows))
    assert results.rows == rows
    assert list(tmp_path.iterdir()) == [tmp_path / "x.json"]  # no part of it is left beside it


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "expected a readable file, got No such file"),
        ("{", "expected JSON, got "),
        ("[]", "expected the JSON of a benchmark run (format convblocks-bench/1), got list"),
        ('{"format": "other/7"}', "got other/7"),
        ('{"format": "convblocks-bench/1", "header": {}, "rows": [{"op": "simam"}]}', "expected complete rows, got"),
        ('{"format": "convblocks-bench/1", "header": {}, "rows": 3}', "expected complete rows, got"),
    ],
)
def test_a_wrong_file_is_refused(
    content: str | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.json"
    if content is not None:
        file.write_text(content)
    for args in (["report", str(file), "-o", str(tmp_path / "x.html")], ["compare", str(file), str(file)]):
        with pytest.raises(SystemExit) as stop:
            main(args)
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert f"{file}: " in error
        assert words in error


def test_an_unknown_kind_of_report_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = save(tmp_path / "x.json", row(1e-3, PEERS))
    with pytest.raises(SystemExit):
        main(["report", str(file), "-o", str(tmp_path / "x.pdf")])
    assert "expected a file that ends in .html, .md, .csv, got" in capsys.readouterr().err


def _compare(tmp_path: Path, a: float | None, b: float | None, *, peers: float = 1.0) -> int:
    """Of a run where ours takes a, and one where it takes b and the peers take ``peers`` times as long."""
    before = save(tmp_path / "a.json", row(a, PEERS))
    slower = {name: t * peers for name, t in PEERS.items()}
    after = save(tmp_path / "b.json", row(b, slower))
    return main(["compare", str(before), str(after), "--fail-over", "5%"])


def test_compare_fails_on_what_became_slower(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _compare(tmp_path, 1e-3, 1e-3) == 0
    assert _compare(tmp_path, 1e-3, 0.5e-3) == 0
    assert _compare(tmp_path, 1e-3, 1.04e-3) == 0
    capsys.readouterr()
    assert _compare(tmp_path, 1e-3, 1.2e-3) == 1
    shown = capsys.readouterr().out
    assert "slower by more than 0.05: simam" in shown
    assert "1.20" in shown
    assert "yes" in shown


def test_compare_does_not_fail_on_noise(tmp_path: Path) -> None:
    assert _compare(tmp_path, 1e-3, 1.2e-3, peers=1.2) == 0  # the whole machine is slower
    wide = dataclasses.replace(row(1e-3, PEERS), ours=timing(1e-3, spread=0.2))
    a, b = save(tmp_path / "a.json", wide), save(tmp_path / "b.json", row(1.2e-3, PEERS))
    assert main(["compare", str(a), str(b), "--fail-over", "0.05"]) == 0  # the samples overlap
    assert main(["compare", str(save(tmp_path / "c.json", row(1e-3, PEERS))), str(b)]) == 0  # no limit was set


def test_compare_fails_on_what_is_no_longer_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _compare(tmp_path, 1e-3, None) == 1
    assert "no longer right: simam" in capsys.readouterr().out
    assert _compare(tmp_path, None, 1e-3) == 0


def test_compare_of_runs_with_nothing_in_common(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = save(tmp_path / "a.json", row(1e-3, PEERS))
    b = save(tmp_path / "b.json", row(1e-3, PEERS, size=(5, 5, 5, 5)))
    with pytest.raises(SystemExit) as stop:
        main(["compare", str(a), str(b)])
    assert stop.value.code == 2
    assert "expected two runs with cases in common, got none" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["fast", "-1%", "nan", ""])
def test_compare_refuses_a_bad_limit(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(save(tmp_path / "a.json", row(1e-3, PEERS)))
    with pytest.raises(SystemExit):
        main(["compare", file, file, f"--fail-over={text}"])
    assert f"--fail-over: expected a share as 5% or 0.05, got {text}" in capsys.readouterr().err


def _rows_for_a_report(tmp_path: Path) -> Path:
    return save(
        tmp_path / "x.json",
        row(1e-3, PEERS),
        row(4e-3, PEERS, layout="channels_last"),
        row(None, PEERS, size=(7, 7, 7, 7), problem="Mismatch: <output> | 3 times"),
        row(1e-3, {}, op="eca", mode="fwd+bwd", peer_errors={"compile/contiguous": "E: <no> compiler"}),
    )


def test_html_stands_alone_and_shows_losses(tmp_path: Path) -> None:
    page = tmp_path / "x.html"
    assert main(["report", str(_rows_for_a_report(tmp_path)), "-o", str(page)]) == 0
    text = page.read_text()
    assert not re.search(r"https?:|src=|@import|<script|<link", text)
    assert "prefers-color-scheme: dark" in text
    assert "<output>" not in text
    assert "<processor>" not in text
    charts = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]
    assert len(charts) == 4  # two groups of bars, two rooflines
    gain, loss = charts[0].findall(".//rect")
    assert (gain.get("class"), loss.get("class")) == ("gain", "loss")
    assert float(gain.get("width", 0)) == pytest.approx(
        float(loss.get("width", 0)), abs=0.2
    )  # 2x and 0.5x: equally long
    assert float(loss.get("x", 0)) < float(gain.get("x", 0))
    words = " ".join(t for chart in charts for t in chart.itertext())
    assert "2.00x" in words
    assert "0.50x" in words
    assert "parity failed" in words
    assert "no peer ran" in words
    assert [len(c.findall(".//circle")) for c in charts] == [0, 0, 3, 3]


def test_html_of_a_run_where_nothing_was_timed(tmp_path: Path) -> None:
    page = tmp_path / "x.html"
    assert main(["report", str(save(tmp_path / "x.json", row(None, PEERS))), "-o", str(page)]) == 0
    assert "parity failed" in page.read_text()
    assert main(["report", str(save(tmp_path / "empty.json")), "-o", str(page)]) == 0


def test_markdown(tmp_path: Path) -> None:
    page = tmp_path / "x.md"
    assert main(["report", str(_rows_for_a_report(tmp_path)), "-o", str(page)]) == 0
    tables = [line.count("|") for line in page.read_text().splitlines() if line.startswith("|")]
    assert set(tables) == {10, 13}  # every row has the columns of its table
    assert (
        "| simam (e_lambda=0.1) | fwd | float32 | 3 (1 failed) | 1.00 | 2.00 | 0.50 | 0.50 | 1x2x3x4 channels_last |"
        in page.read_text()
    )


def test_csv_has_a_line_per_row(tmp_path: Path) -> None:
    page = tmp_path / "x.csv"
    assert main(["report", str(_rows_for_a_report(tmp_path)), "-o", str(page)]) == 0
    lines = list(csv.DictReader(io.StringIO(page.read_text())))
    assert [line["ratio"][:3] for line in lines] == ["2.0", "0.5", "", ""]
    assert float(lines[0]["compile/channels_last_min_s"]) == 2e-3
    assert float(lines[0]["ours_median_s"]) == pytest.approx(1.02e-3)
    assert json.loads(lines[0]["options"]) == {"e_lambda": 0.1}
    assert lines[3]["eager/contiguous_min_s"] == ""


def test_from_run_to_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    for file in (a, b):
        assert run("--mode", "fwd", "--output", str(file), "--quiet") == 0
    assert main(["compare", str(a), str(b)]) == 0
    assert "geometric means of B / A" in capsys.readouterr().out
    for kind in ("html", "md", "csv"):
        assert main(["report", str(a), "-o", str(tmp_path / f"x.{kind}")]) == 0
        assert (tmp_path / f"x.{kind}").stat().st_size > 1000
