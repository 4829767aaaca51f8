"""The report of runs: its numbers, that it stands alone, and that text stays text."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from typer.testing import CliRunner

import gspo.lab.report.page as page_module
from gspo.backend.run import Run
from gspo.cli import app
from gspo.core.errors import ConfigError, MissingDependencyError, RunError
from gspo.experiment.spec import Spec
from gspo.lab.report.charts import sections
from gspo.lab.report.command import make_report
from gspo.lab.report.data import RunData, changed, read_runs, resolved
from gspo.lab.report.figure import POINTS, thin
from gspo.lab.report.page import Live
from gspo.lab.report.run_page import run_page
from gspo.lab.report.trajectories import LONGEST, TOKENS, sampled_trajectories, token_texts
from lab.report_cases import run_folder

ATTACK = "</script><script>alert(1)</script><!-- <script>"


class Elements(HTMLParser):
    """The elements of a page as a browser would see them, and the text of its scripts."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script":
            self.scripts[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.tags.append((f"/{tag}", {}))

    @property
    def figures(self) -> list[str]:
        """Ids of the charts that have a place."""
        return sorted(found for _, has in self.tags if (found := has.get("data-figure")))

    def embedded(self, id: str) -> Any:
        """The JSON of a data block."""
        scripts = [attributes for tag, attributes in self.tags if tag == "script"]
        (at,) = [i for i, attributes in enumerate(scripts) if attributes.get("id") == id]
        return json.loads(self.scripts[at])


def charts_of(*folders: Path) -> dict[str, Any]:
    return {c.id: c for _, charts in sections(read_runs(folders)) for c in charts}


def data_with(records: list[dict[str, float]], **train: Any) -> RunData:
    spec = Spec(task="sort", train=train).model_dump(mode="json")  # pyright: ignore[reportArgumentType]
    return RunData(Path("p/m"), "p/m", {}, spec, resolved(spec), records, running=False)


def test_the_page_holds_the_runs_numbers(tmp_path: Path):
    page = Elements(run_page(read_runs([run_folder(tmp_path)])))
    charts = page.embedded("chart-data")
    raw, smooth, heldout = charts["reward"]["data"]
    assert (raw["x"], raw["y"]) == ([1, 2, 3, 4], [0.1, 0.2, 0.3, 0.4])
    assert smooth["y"] == pytest.approx([0.25] * 4)
    assert (heldout["x"], heldout["y"]) == ([0, 4], [0.25, 0.75])
    assert heldout["error_y"]["array"] == pytest.approx([0.05, 0.05])
    times = {trace["name"]: trace["y"] for trace in charts["time"]["data"]}
    assert times["train"] == [0.5] * 4
    assert times["rest"] == pytest.approx([0.125] * 4)
    assert page.figures == sorted(charts)
    assert "kl" not in charts  # logged as 0: not measured


def test_the_page_tells_method_settings_and_result(tmp_path: Path):
    page = run_page(read_runs([run_folder(tmp_path)]))
    for text in ("0.250 → 0.750", "embedded:sort", "4 of 4", "0.0003 / 0.0004", "arXiv 2507.18071"):
        assert text in page
    assert '<li class="set"><code>seed = 7</code>' in page
    assert "<li><code>temperature = 1.0</code>" in page
    assert re.search(r"Begun with python [\d.]+.*torch", page)


def test_trajectories_are_shown_with_what_was_made_of_them(tmp_path: Path):
    page = Elements(run_page(read_runs([run_folder(tmp_path, steps=9)])))
    (run,) = page.embedded("trajectory-data")
    assert [step["step"] for step in run["steps"]] == [1, 5, 9]
    trained, flat = run["steps"][0]["groups"]
    assert trained["prompt"] == [{"role": "user", "text": "?"}]
    item = trained["items"][0]
    assert (item["reward"], item["advantage"], item["update"]) == (0.0, 1.0, 0)
    assert (item["clipped"], item["trained"], item["log_ratios"]) == ([3], [3], [0.004])
    (turn,) = item["parts"]
    assert turn["d"] == [0.03, -0.02, 0.0]
    assert turn["logprobs"] == [-0.5, -1.0, -0.25]
    assert turn["ids"] == [7, 8, 9]
    assert trained["items"][1]["clipped"] == [0]
    assert flat["items"][0]["log_ratios"] is None and flat["items"][0]["parts"][0]["d"] is None
    assert run["scale"] == pytest.approx(0.03)


def test_model_output_stays_text(tmp_path: Path):
    folder = run_folder(tmp_path, "<img src=x onerror=alert(1)>", text=ATTACK)
    path = folder / "trajectories" / "train" / "0001.parquet"
    stored = pq.read_table(path)
    messages = [json.dumps([{"role": "user", "content": ATTACK}])] * len(stored)
    at = stored.schema.get_field_index("messages")
    pq.write_table(stored.set_column(at, stored.schema.field(at), [messages]), path)
    page = run_page(read_runs([folder]))
    elements = Elements(page)
    tags = [tag for tag, _ in elements.tags]
    assert tags.count("script") == tags.count("/script") == 5
    assert "img" not in tags
    assert "alert(1)" not in "".join(elements.scripts[-2:])
    (run,) = elements.embedded("trajectory-data")
    assert run["steps"][0]["groups"][0]["prompt"] == [{"role": "user", "text": ATTACK}]
    assert not any(name.startswith("on") for _, attributes in elements.tags for name in attributes)


def test_nothing_runs_but_the_two_scripts_and_nothing_is_loaded(tmp_path: Path):
    elements = Elements(run_page(read_runs([run_folder(tmp_path)]), Live(10, 600)))
    (policy,) = [
        attributes["content"]
        for tag, attributes in elements.tags
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy is not None and policy.startswith("default-src 'none'; script-src 'sha256-")
    for script in elements.scripts[-2:]:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert "http" not in policy and "connect-src" not in policy
    for tag, attributes in elements.tags:
        assert not {"src", "href", "srcset", "action"} & set(attributes), tag


def test_every_figure_is_one_that_plotly_accepts(tmp_path: Path):
    figures = pytest.importorskip("plotly.graph_objects")
    one, two = run_folder(tmp_path, "a"), run_folder(tmp_path, "b")
    for chart in [*charts_of(one).values(), *charts_of(one, two).values()]:
        text = re.sub(r'"@[a-z]+(/[\d.]+)?"', '"#0b63b0"', json.dumps(chart.figure()))
        figures.Figure(json.loads(text))


def test_old_runs_still_open(tmp_path: Path):
    """Without the columns, the versions and the spec that runs have today."""
    folder = run_folder(tmp_path)
    new = ("update", "sequence_log_ratios", "trained_tokens", "clipped_tokens", "token_log_ratios")
    for path in (folder / "trajectories" / "train").glob("*.parquet"):
        pq.write_table(pq.read_table(path).drop_columns(list(new)), path)
    (folder / "spec.json").unlink()
    (folder / "config.json").write_text('{"format": 1, "base_model": "embedded:sort"}')
    page = run_page(read_runs([folder]))
    (run,) = Elements(page).embedded("trajectory-data")
    assert run["scale"] is None
    assert run["steps"][0]["groups"][0]["items"][0]["parts"][0]["d"] is None
    assert "no spec.json" in page
    assert "clip range" in [trace.get("name") for trace in charts_of(folder)["ratios"].data]


def test_several_runs_stand_side_by_side(tmp_path: Path):
    one, two = run_folder(tmp_path, "one"), run_folder(tmp_path, "two", steps=6)
    page = run_page(read_runs([one, two]))
    charts = Elements(page).embedded("chart-data")
    assert [trace["name"] for trace in charts["entropy"]["data"]] == ["p/one", "p/two"]
    colors = [trace["line"]["color"] for trace in charts["gradient"]["data"]]
    assert len(set(colors)) == 2
    assert [len(trace["x"]) for trace in charts["time"]["data"]] == [4, 6]
    assert [run["label"] for run in Elements(page).embedded("trajectory-data")] == [
        "p/one",
        "p/two",
    ]
    assert "<td>4 of 4</td><td>6 of 6</td>" in page
    again = run_folder(tmp_path / "elsewhere", "one")
    names = [run.label for run in read_runs([one, again])]
    assert len(set(names)) == 2 and names[1] == "elsewhere/p/one"


def test_a_run_without_a_step_has_a_page(tmp_path: Path):
    run = Run(tmp_path, "p", "m", {"base_model": "embedded:sort"})
    run.claim()
    page = run_page(read_runs([run.folder]))
    assert "No step has been made yet" in page
    assert ">running</span>" in page
    run.close()
    assert ">running</span>" not in run_page(read_runs([run.folder]))


def test_numbers_that_are_not_finite_leave_gaps(tmp_path: Path):
    folder = run_folder(tmp_path)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "train/reward": NaN, "loss/entropy": Infinity}\n{"step": 6, "tr')
    charts = Elements(run_page(read_runs([folder]))).embedded("chart-data")
    assert charts["entropy"]["data"][0]["y"][-2:] == [0.4, None]
    assert charts["reward"]["data"][0]["x"] == [1, 2, 3, 4, 5]


def test_long_runs_are_thinned_to_means():
    steps = list(range(1, 2501))
    x, y = thin(steps, [float(step) for step in steps])
    assert len(x) <= POINTS
    assert x[:2] == [3, 6] and y[:2] == [2.0, 5.0]
    assert x[-1] == 2500


def test_a_range_narrower_than_the_noise_is_told_at_the_clip():
    record = {"step": 1, "ratio/clip_fraction": 0.6, "ratio/epsilon_low": 3e-4}
    quantiles = {"ratio/log_p01": -7e-4, "ratio/log_p99": 7e-4}
    noisy = record | quantiles | {"mismatch/clip_fraction": 0.5}
    fits = record | quantiles | {"mismatch/clip_fraction": 0.0}
    narrow = fits | {"ratio/log_p01": -0.1, "ratio/log_p99": 0.1}

    def told(records: list[dict[str, float]], **train: Any) -> str:
        ((_, charts),) = sections([data_with(records, **train)])
        return " ".join(text for chart in charts for text in chart.warnings if chart.id == "clip")

    assert "On 1 of 2 steps" in told([noisy, fits | {"step": 2}])
    assert "noise alone clips 50%" in told([noisy])
    assert "clips many of them" in told([narrow])
    assert told([fits]) == ""
    assert told([noisy], epsilon="auto") == ""
    assert told([noisy], old_logprobs="trainer") == ""
    assert told([noisy], algorithm="grpo") == ""


def test_stored_specs_are_resolved_as_they_were_meant():
    spec = Spec(task="sort", train={"precalculate_logprobs": True, "epochs": 2}, seed=3)  # pyright: ignore[reportArgumentType]
    stored = json.loads(json.dumps(spec.model_dump(mode="json")))
    settings = resolved(stored)
    assert settings is not None
    assert (settings.algorithm, settings.old_logprobs) == ("gspo", "trainer")
    train = {"precalculate_logprobs": True, "old_logprobs": "trainer", "epochs": 2}
    assert changed(stored) == {"seed": 3} | {f"train.{name}": train[name] for name in train}
    assert resolved(stored | {"train": {"from_the_future": 1}}) is None


def test_what_is_embedded_is_bounded(tmp_path: Path):
    from gspo import TrajectoryGroup
    from support import choice, trajectory

    run = Run(tmp_path, "p", "m", {})
    long = [trajectory(0.0, choice([5] * (LONGEST + 500))) for _ in range(16)]
    for step in range(1, 5):
        run.log_trajectories([TrajectoryGroup(long) for _ in range(5)], "train", step)
    run.log(1, {"train/reward": 0.0})
    run.close()
    found = sampled_trajectories(read_runs([run.folder])[0])
    assert found is not None
    groups = [group for step in found["steps"] for group in step["groups"]]
    assert [group["group"] for group in groups[:3]] == [0, 2, 4]
    turns = [item["parts"][0] for group in groups for item in group["items"]]
    assert all(turn["more"] == 500 and len(turn["tokens"]) == LONGEST for turn in turns)
    assert sum(len(turn["tokens"]) for turn in turns) <= TOKENS
    assert {group["size"] for group in groups} == {16}


def test_tokens_are_shown_as_the_text_they_add():
    text = "né 🙂\n<b>"
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    ids = tokenizer.encode(text).ids
    texts = token_texts(ids, tokenizer)
    assert len(texts) == len(ids) == len(text.encode())
    assert "".join(texts) == text
    assert texts[1:3] == ["", "é"]


def test_a_missing_plotly_is_named_with_the_command(tmp_path: Path, monkeypatch):
    page_module._plotly.cache_clear()
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(MissingDependencyError, match=r"pip install -e '\.\[lab\]'"):
        make_report([run_folder(tmp_path)], None, False)


def test_the_command_writes_beside_the_run_or_where_it_is_told(tmp_path: Path):
    one, two = run_folder(tmp_path, "one"), run_folder(tmp_path, "two")
    result = CliRunner().invoke(app, ["report", str(one)])
    assert result.output == f"report: {one / 'report.html'}\n"
    assert (one / "report.html").read_text().startswith("<!DOCTYPE html>")
    out = tmp_path / "both.html"
    result = CliRunner().invoke(app, ["report", str(one), str(two), "--out", str(out)])
    assert result.exit_code == 0 and out.exists()
    # Nobody holds the runs: to watch them ends at once.
    result = CliRunner().invoke(app, ["report", str(one), "--watch"])
    assert result.exit_code == 0
    assert not Elements((one / "report.html").read_text()).embedded("live-data")["live"]


def test_the_command_refuses_with_the_remedy(tmp_path: Path):
    one, two = run_folder(tmp_path, "one"), run_folder(tmp_path, "two")
    with pytest.raises(ConfigError, match="--out FILE"):
        make_report([one, two], None, False)
    with pytest.raises(RunError, match=r"neither metrics\.jsonl nor config\.json"):
        make_report([tmp_path / "nowhere"], None, False)
    with pytest.raises(RunError, match=r"cannot write .*x\.html: No such"):
        make_report([one], tmp_path / "no" / "such" / "x.html", False)
    assert not list(tmp_path.rglob(".*html*"))


def test_a_run_alive_is_marked(tmp_path: Path):
    folder = run_folder(tmp_path)
    run = Run(tmp_path, "p", "m", {"base_model": "embedded:sort", "lora": None})
    try:
        (read,) = read_runs([folder])
        assert read.running
        assert "A snapshot." in run_page([read])
        live = Elements(run_page([read], Live(12.0, 600.0))).embedded("live-data")
        assert (live["live"], live["every"], live["patience"]) == (True, 12, 600)
    finally:
        run.close()
