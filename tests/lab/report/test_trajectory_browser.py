"""The trajectories of a report: what is chosen, and what is told of each."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from gspo import TrajectoryGroup
from gspo.backend.run import Run
from gspo.backend.stored_batch import write_batch
from gspo.core.errors import RunError
from gspo.lab.report.run_page import read_runs, run_page
from gspo.lab.report.trajectory_browser import COMPLETIONS, LONGEST, sampled_groups, token_texts
from gspo.trajectories import History
from lab.report.page_elements import Elements
from lab.report.report_cases import run_folder
from support import choice, trajectory


def test_trajectories_are_shown_with_what_was_made_of_them(tmp_path: Path):
    groups = sampled_groups(read_runs([run_folder(tmp_path, steps=9)])[0])
    assert [group["title"].split(":")[0] for group in groups] == [
        f"p/m, step {step}, group {number}" for step in (1, 5, 9) for number in (0, 1)
    ]
    trained, flat = groups[:2]
    assert trained["title"].endswith("3 of 3 trajectories")
    assert trained["scale"] == pytest.approx(0.03, rel=0.02)
    assert trained["prompt"] == [("user", "?")]
    first = trained["trajectories"][0]
    assert (first["reward"], first["advantage"], first["turns"]) == (0, 1, [(0.004, 3, 3)])
    ((role, text, tokens),) = first["parts"]
    assert (role, text) == ("assistant", "")
    assert [token[:3] for token in tokens] == [(7, "⟨7⟩", -0.5), (8, "⟨8⟩", -1), (9, "⟨9⟩", -0.25)]
    assert [token[3] for token in tokens] == pytest.approx([0.03, -0.02, 0.0])
    ((_, _, tokens),) = flat["trajectories"][0]["parts"]
    assert {token[3] for token in tokens} == {None}


def test_the_page_tells_it_in_words_and_tints(tmp_path: Path):
    page = run_page(read_runs([run_folder(tmp_path, steps=1)]))
    facts = re.findall(r'<span class="pill">(.*?)</span>', page)
    update = ["s = 1.00401 (l = +0.004)", "clipped", "update 1 of the step"]
    assert facts[1:6] == ["reward 0", "A = +1", *update]
    assert "not clipped" in facts and facts[-1] == "no gradient: A = 0"
    tokens = [attributes for tag, attributes in Elements(page).tags if tag == "i"]
    assert [token["class"] for token in tokens[:3]] == ["up", "down", "up"]
    tints = [token["style"] for token in tokens[:3]]
    assert tints == ["--tint:0.75", "--tint:0.50", "--tint:0.00"]
    assert tokens[0]["title"] == "id 7, log-prob when sampled -0.5 (0.607), d_t = +0.03"
    assert (tokens[-1]["title"] or "").endswith("not trained on")
    assert "strongest tint at |d_t| = 0.03" in page and "⟨7⟩</i><i" in page


def test_what_is_embedded_is_bounded(tmp_path: Path):
    run = Run(tmp_path, "p", "m", {})
    long = [trajectory(0.0, choice([5] * (LONGEST + 500))) for _ in range(16)]
    for step in range(1, 5):
        write_batch(run.trajectories("train", step), [TrajectoryGroup(long) for _ in range(5)])
    run.log(1, {"train/reward": 0.0})
    run.close()
    groups = sampled_groups(read_runs([run.folder])[0])
    numbers = [group["title"].split(":")[0] for group in groups[:3]]
    assert numbers == [f"p/m, step 1, group {number}" for number in (0, 2, 4)]
    assert {len(group["trajectories"]) for group in groups} == {COMPLETIONS}
    assert all(f"{COMPLETIONS} of 16 trajectories" in group["title"] for group in groups)
    for group in groups:
        for row in group["trajectories"]:
            ((_, text, tokens),) = row["parts"]
            assert len(tokens) == LONGEST and text.endswith("… 500 more tokens")


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


def test_a_damaged_file_is_named_with_the_remedy(tmp_path: Path):
    folder = run_folder(tmp_path)
    (folder / "trajectories" / "train" / "0001.parquet").write_bytes(b"PAR1")
    with pytest.raises(RunError, match=r"0001\.parquet is damaged.*delete it"):
        sampled_groups(read_runs([folder])[0])


def test_further_conversations_follow_behind_a_heading(tmp_path: Path):
    run = Run(tmp_path, "p", "m", {})
    several = trajectory(0.0, choice([7]))
    task = {"role": "user", "content": "sub"}
    several.additional_histories = [History(messages_and_choices=[task, choice([8])])]
    write_batch(run.trajectories("train", 1), [TrajectoryGroup([several])])
    run.log(1, {"train/reward": 0.0})
    run.close()
    (group,) = sampled_groups(read_runs([run.folder])[0])
    parts = group["trajectories"][0]["parts"]
    assert [(role, text, [token[0] for token in tokens]) for role, text, tokens in parts] == [
        ("assistant", "", [7]),
        ("conversation 2 of 2", "", []),
        ("user", "sub", []),
        ("assistant", "", [8]),
    ]


def test_a_turn_says_what_it_earned(tmp_path: Path):
    run = Run(tmp_path, "p", "m", {})
    one = trajectory(0.0, choice([7]), choice([8], [1, 2, 3, 7]))
    one.turn_rewards = [0.5, 0.0]
    path = run.trajectories("train", 1)
    write_batch(path, [TrajectoryGroup([one])], turn_advantages={0: (1.25, -1.0)})
    run.log(1, {"train/reward": 0.0})
    run.close()
    (group,) = sampled_groups(read_runs([run.folder])[0])
    roles = [role for role, *_ in group["trajectories"][0]["parts"]]
    assert roles == ["assistant, reward 0.5, A 1.25", "assistant, reward 0, A -1"]
