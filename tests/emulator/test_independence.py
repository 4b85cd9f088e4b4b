"""The emulator stands on its own: one mistake must not hide in it and in the client."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import kling_voice.emulator

FOLDER = Path(kling_voice.emulator.__file__).parent
FILES = sorted(FOLDER.glob("*.py"))


def imported(source: str) -> set[str]:
    """The modules that a source file imports, wherever it does."""
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            modules.add(node.module or "")
    return modules


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_it_shares_no_room_with_the_client(file: Path) -> None:
    """Of the client it imports auth.py alone; of the client's libraries, no decoder or verifier."""
    modules = imported(file.read_text())
    ours = {name for name in modules if name.split(".")[0] == "kling_voice"}
    assert {name for name in ours if not name.startswith("kling_voice.emulator")} <= {
        "kling_voice.auth"
    }
    assert not {"cattrs", "tenacity", "standardwebhooks", "pytest"} & modules


def test_its_extra_is_not_needed_to_import_it() -> None:
    """Without fetch_samples the emulator needs nothing beyond the core."""
    code = "import sys, kling_voice.emulator; sys.exit('tinytag' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
