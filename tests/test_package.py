"""The package as its users get it: contents, metadata, public names and their documentation."""

import ast
import inspect
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path
from types import ModuleType

import pytest
from packaging.version import Version

import kling_voice
import kling_voice.emulator

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist of this checkout."""
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("the sources are away")
    folder = tmp_path_factory.mktemp("dist")
    command = ["build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run([sys.executable, "-m", *command], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_bytes(archive.read(name))


def test_the_wheel_holds_what_runs_and_nothing_else(wheel: Path) -> None:
    """Code, the type marker and the recordings are in the wheel; tests and benchmarks are not."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "kling_voice/py.typed" in names
    assert "kling_voice/emulator/recordings/ada.mp3" in names
    assert all(name.startswith("kling_voice") for name in names)


def test_the_sdist_holds_what_its_tests_need(built: Path) -> None:
    """The suite can be run from the sdist alone."""
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "tests/test_package.py"}
    assert wanted <= names


def test_the_metadata_names_the_version_and_the_python(metadata: Message) -> None:
    """Version, Python and license are told; the version is the one of the code."""
    assert metadata["Version"] == kling_voice.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "MIT"


def test_a_plain_install_pulls_the_core_alone(metadata: Message) -> None:
    """Without an extra, only the six core packages are required."""
    required = metadata.get_all("Requires-Dist") or []
    core = {line.partition(">")[0] for line in required if "extra ==" not in line}
    wanted = {"aiohttp", "attrs", "cattrs", "pyjwt", "tenacity", "standardwebhooks"}
    assert core == wanted
    extras = set(metadata.get_all("Provides-Extra") or [])
    assert {"emulator", "cli", "storage", "all", "dev", "bench"} <= extras


def test_the_wheel_works_with_the_sources_away(wheel: Path, tmp_path: Path) -> None:
    """Installed from the wheel alone, the smallest program runs without a warning."""
    site = tmp_path / "site"
    command = ["pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([sys.executable, "-m", *command, str(wheel)], check=True, capture_output=True)
    program = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
import kling_voice
from kling_voice.emulator import Emulator
assert kling_voice.__file__.startswith(sys.argv[1]), kling_voice.__file__

async def main():
    async with Emulator(task_seconds=0.05) as emulator:
        polling = kling_voice.PollingPolicy(initial=0.02)
        async with kling_voice.KlingVoiceClient(
            emulator.credentials, base_url=emulator.base_url, polling=polling
        ) as kling:
            voice = await kling.clone_voice("Ada", voice_url="https://example.com/ada.mp3")
            print(voice.voice_name)

asyncio.run(main(), debug=False)  # debug mode tells on stderr what took long
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, str(site)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "Ada\n", "")


def test_all_is_sorted_and_complete() -> None:
    """``__all__`` lists every public name of the package, in order."""
    names = kling_voice.__all__
    assert list(names) == sorted(names)
    public = {
        name
        for name, value in vars(kling_voice).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert public | {"__version__"} == set(names)


def test_the_package_itself_holds_only_imports() -> None:
    """``kling_voice/__init__.py`` has imports and ``__all__``, and nothing that runs."""
    tree = ast.parse(Path(inspect.getfile(kling_voice)).read_text())
    kinds = {type(node) for node in tree.body[1:]}
    assert kinds <= {ast.Import, ast.ImportFrom, ast.Assign}


def public_things() -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    for module in (kling_voice, kling_voice.emulator):
        for name in module.__all__:
            thing = getattr(module, name)
            if not callable(thing):
                continue
            found.append((name, thing))
            if inspect.isclass(thing):
                found += [
                    (f"{name}.{member}", value)
                    for member, value in vars(thing).items()
                    if not member.startswith("_")
                    and (inspect.isfunction(value) or isinstance(value, property))
                ]
    return found


def test_every_public_name_is_documented() -> None:
    """Each public class, function, method and property has a docstring."""
    bare = [name for name, thing in public_things() if not inspect.getdoc(thing)]
    assert bare == []


def test_every_method_of_the_client_says_what_it_raises() -> None:
    """Each coroutine of the client lists its errors, and each argument it takes."""
    for name, method in vars(kling_voice.KlingVoiceClient).items():
        if name.startswith("_") or not inspect.isfunction(method) or name == "close":
            continue
        text = inspect.getdoc(method) or ""
        assert "Raises:" in text, name
        for argument in list(inspect.signature(method).parameters)[1:]:
            assert f"\n    {argument}: " in text, f"{name}: {argument}"


def test_imports_run_downwards_only() -> None:
    """No room imports one above it; the emulator imports nothing of the client but ``auth``."""
    floors = [
        {"redaction", "_version", "deadlines"},
        {"errors"},
        {"policies", "models", "auth"},
        {"protocol"},
        {"backoff", "schedule", "webhooks", "samples", "identity"},
        {"transport"},
        {"watches", "reading", "creating", "paging", "callbacks", "hosting", "trials", "slots"},
        {"waiting"},
        {"cloning"},
        {"batch"},
        {"client"},
    ]
    level = {room: height for height, rooms in enumerate(floors) for room in rooms}
    package = Path(inspect.getfile(kling_voice)).parent
    rooms = {path.stem: path for path in package.glob("*.py")}
    assert set(level) == set(rooms) - {"__init__", "__main__", "testing"}
    for room, height in level.items():
        for target in imported(rooms[room]):
            assert level[target] < height, f"{room} imports {target}"
    for path in (package / "emulator").glob("*.py"):
        assert imported(path) <= {"auth", "emulator"}, path.name


def test_the_oldest_versions_are_those_of_the_metadata() -> None:
    """What CONTRIBUTING.md lets one test with is what the package's users may have."""
    here = Path(__file__).parent
    project = tomllib.loads((here.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = {*project["dependencies"], *extras["cli"], *extras["storage"], *extras["emulator"]}
    lowest = {tuple(need.split(">=")) for need in needed}
    told = (here / "oldest.txt").read_text().splitlines()[1:]
    assert {name: Version(version) for name, version in lowest} == {
        name: Version(version) for name, version in (line.split("==") for line in told)
    }


def imported(path: Path) -> set[str]:
    """Give the rooms of the package that a file imports when it runs."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.dump(branch.test)
        for node in ast.walk(branch)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only or not isinstance(node, ast.ImportFrom) or not node.module:
            continue
        parts = node.module.split(".")
        if parts[0] != "kling_voice":
            continue
        found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return found
