from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gspo.core.errors import ConfigError
from gspo.experiment.rollout import check_rollout, load_rollout

FUNCTION = "async def f(model, scenario): ...\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("os", "write 'module:name'"),
        ("os:", "write 'module:name'"),
        ("../mine:r", "is not the name of a module"),
        ("os:nothing", "os has no 'nothing'"),
        ("os.path:join", "is not an async function"),
        ("nothing_here:f", r"cannot import nothing_here: there is no nothing_here\.py beside"),
        ("nothing_here.too:f", r"no nothing_here/too\.py"),
        ("folder/none.py:f", "there is no file /.*none.py"),
    ],
)
def test_names_that_lead_nowhere(name: str, message: str):
    with pytest.raises(ConfigError, match=message):
        load_rollout(name)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("1 / 0", "broken_rollout.py fails when it is imported: ZeroDivisionError"),
        ("def f(", "broken_rollout.py fails when it is imported: SyntaxError"),
        ("import sys; sys.exit(0)", "broken_rollout.py fails when it is imported: SystemExit: 0"),
        ("import no_such_library", "ModuleNotFoundError: No module named 'no_such_library'"),
        ("async def f(model): ...", "must take two arguments"),
        ("def f(model, scenario): ...", "is not an async function"),
    ],
)
def test_a_module_that_fails_is_named_each_time(folder: Path, code: str, message: str):
    (folder / "broken_rollout.py").write_text(code)
    for _ in range(2):
        with pytest.raises(ConfigError, match=message):
            load_rollout("broken_rollout:f")


def test_a_module_is_found_in_the_working_directory_and_checked_without_running(folder: Path):
    (folder / "plain_rollout.py").write_text("print('ran')\n" + FUNCTION)
    check_rollout("plain_rollout:f")
    assert "plain_rollout" not in sys.modules
    function = load_rollout("plain_rollout:f")
    assert function.__module__ == "plain_rollout"
    assert load_rollout("plain_rollout.py:f") is function


def test_files_of_the_users_never_take_the_place_of_a_library(folder: Path):
    (folder / "rich.py").write_text("import json, colorsys\n" + FUNCTION)
    (folder / "colorsys.py").write_text("raise RuntimeError('not the library')")
    assert load_rollout("rich:f").__module__ == "gspo_user_rich"
    code = "import rich; print(rich.__file__)"
    (folder / "use.py").write_text("import rich, helper_of_use\nFILE = rich.__file__\n" + FUNCTION)
    (folder / "helper_of_use.py").touch()
    real = subprocess.run(
        [sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=True
    )
    assert load_rollout("use:f").__globals__["FILE"] == real.stdout.strip()  # pyright: ignore[reportFunctionMemberAccess]


def test_a_package_imports_from_itself(folder: Path):
    package = folder / "exp" / "rollouts_package"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "parts.py").write_text("from .whole import f\n")
    (package / "whole.py").write_text(FUNCTION)
    assert load_rollout("exp/rollouts_package/parts.py:f").__module__ == "rollouts_package.whole"
