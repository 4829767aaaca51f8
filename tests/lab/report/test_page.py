"""The frame of a page: only plotly runs, and nothing is loaded."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from gspo.lab.report.comparison_page import comparison_page
from gspo.lab.report.run_page import read_runs, run_page
from lab.report.page_elements import Elements
from lab.report.report_cases import run_folder


def test_nothing_runs_but_the_charts_scripts_and_nothing_is_loaded(tmp_path: Path):
    elements = Elements(run_page(read_runs([run_folder(tmp_path)])))
    (policy,) = [
        attributes["content"]
        for tag, attributes in elements.tags
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy is not None and policy.startswith("default-src 'none'; script-src 'sha256-")
    for script in elements.scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert "http" not in policy and "connect-src" not in policy
    for tag, attributes in elements.tags:
        assert not {"src", "href", "srcset", "action"} & set(attributes), tag


def test_tables_hold_text_and_a_page_without_charts_runs_nothing():
    case = {
        "name": "</title><b>",
        "cells": [{"id": "<i>", "arm": "a", "stress": {}, "status": "<s>"}],
    }
    page = comparison_page(case)
    assert "<td>&lt;i&gt;</td>" in page and "1 &lt;s&gt;" in page and "&lt;/title&gt;" in page
    assert "script-src &#39;none&#39;" in page and "Over steps" not in page
