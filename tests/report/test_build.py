"""The report: self-contained, small, complete, and there at any moment of a run's life."""
import json
import re
from html.parser import HTMLParser

import pyarrow.parquet as pq
import pytest

from copd_megatron.report.build import build_report
from copd_megatron.types import UserError
from support.fake_run import fake_run

VOID = {"meta", "link", "br", "img"}


class Page(HTMLParser):
    """Collects text, tags and links; fails on tags that are closed in the wrong order."""

    def __init__(self, source: str):
        super().__init__()
        self.open, self.links, self.ids, self.text = [], [], [], ""
        self.feed(source)
        assert self.open == []

    def handle_startendtag(self, tag, attrs):
        self.links += [v for k, v in attrs if k in ("src", "href", "data", "srcset", "poster")]
        self.ids += [v for k, v in attrs if k == "id"]

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data + " "


def read(path) -> tuple[str, Page]:
    source = path.read_text()
    return source, Page(source)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = fake_run(tmp_path_factory.mktemp("run"), cycles=2, rl_steps=3, opd_steps=2, evaluate_every=5)
    return folder, *read(build_report(folder))


def test_report_needs_nothing_from_outside(finished):
    folder, source, page = finished
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert not re.search(r"https?:|url\((?!#)|@import", source)
    assert len(page.ids) == len(set(page.ids))
    assert len(source) < 3_000_000
    assert [p.name for p in folder.glob("report*")] == ["report.html"]


def test_report_shows_all_parts(finished):
    _, source, page = finished
    for words in ("finished", "examples/tiny_three_experts.py", "torch", "step 10 of 10",
                  "Policies and domains", "Accuracy on video", "Reward", "Completion length", "Entropy",
                  "KL to the backbone",
                  "Pairwise top-10 overlap", "Symmetric KL", "|β delta| against |A|, student image",
                  "Delta text → image", "Time per step", "Tokens per second", "saved by prefix sharing",
                  "found in the prefix store",
                  "Sample completions", "optimizer.lr", "1,000 held-out prompts"):
        assert words in page.text, words
    assert "Not logged" not in page.text
    assert source.count("<svg") == 3 + 7 + 2 + 3 + 5 + 4
    assert "prefers-color-scheme:dark" in source and "name='viewport'" in source
    assert "http-equiv='refresh'" not in source


def test_samples_show_media_and_tinted_tokens(finished):
    folder, source, page = finished
    assert source.count("data:image/png;base64,") >= 4
    assert "rgb(var(--more)/" in source and "rgb(var(--less)/" in source
    assert "[9 visual tokens]" in page.text and "übrig" in page.text
    assert "<b> <b>" not in source                     # a token that looks like HTML stays text
    rows = pq.read_table(folder / "rollouts" / "step_000010.parquet").to_pylist()
    cross = next(r for r in rows if r["teachers"])
    group = [r for r in rows if all(r[k] == cross[k] for k in ("expert", "domain", "prompt_key"))]
    best = max(group, key=lambda r: r["reward"])
    assert f"delta {best['deltas'][0][0]:+.3f}" in source


def test_table_agrees_with_the_summary(finished):
    folder, source, _ = finished
    summary = json.loads((folder / "summary.json").read_text())
    rows = dict(re.findall(r"<tr><td>(\w+)</td>(.*?)</tr>", source))
    for policy, domains in summary["policies"].items():
        shown = [float(v) for v in re.findall(r"<td[^>]*>(\d+\.\d)", rows[policy])]
        expected = [*domains.values(), sum(domains.values()) / len(domains)]
        assert shown == [round(100 * v, 1) for v in expected]


def test_a_living_run_reloads_itself(tmp_path):
    folder = fake_run(tmp_path, cycles=2, rl_steps=3, opd_steps=2, evaluate_every=2, stop_at=3)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "phase": "rl')
    source, page = read(build_report(folder))
    assert "running" in page.text and "latest evaluation" in page.text and "step 3 of 10" in page.text
    assert "http-equiv='refresh'" in source
    assert "no OPD step yet" in page.text               # said rather than drawn empty
    source, page = read(build_report(folder, "interrupted"))
    assert "interrupted" in page.text and "http-equiv='refresh'" not in source


def test_the_first_seconds_of_a_run(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    source, page = read(build_report(tmp_path))
    assert "No evaluation yet" in page.text and "Not logged" in page.text and "<svg" not in source


def test_only_a_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"seed": 7, "model": {"path": "<model>"}}))
    _, page = read(build_report(tmp_path))
    assert "<model>" in page.text


def test_damaged_rollouts_are_left_out_with_a_note(tmp_path):
    folder = fake_run(tmp_path, cycles=1, rl_steps=3, opd_steps=2, evaluate_every=5)
    last = folder / "rollouts" / "step_000005.parquet"
    last.write_bytes(last.read_bytes()[:1000])
    _, page = read(build_report(folder))
    assert "step_000005.parquet could not be read" in page.text
    assert "step 4 opd" in page.text


def test_one_expert_has_no_empty_sections(tmp_path):
    folder = fake_run(tmp_path, experts=("text",), cycles=1, rl_steps=4, opd_steps=0, evaluate_every=2)
    source, page = read(build_report(folder))
    assert "Not logged: Pairwise top-10 overlap, Symmetric KL." in page.text
    assert "OPD steps" not in page.text
    assert source.count("<svg") == 13


def test_thirty_experts_stay_small(tmp_path):
    experts = tuple(f"expert{i:02d}" for i in range(30))
    folder = fake_run(tmp_path, experts=experts, cycles=1, rl_steps=1, opd_steps=1, evaluate_every=2,
                      rollout_steps=1)
    source, page = read(build_report(folder))
    assert len(source) < 3_000_000
    assert "58 edges: the first 9 are drawn" in page.text
    assert "median of 30 in grey" in page.text


def test_no_run_no_report(tmp_path):
    with pytest.raises(UserError, match="run_dir"):
        build_report(tmp_path)
    assert list(tmp_path.iterdir()) == []
