"""What users install: the right packages, with their data, quickly imported."""

import os
import shutil
import statistics
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.modules import FOLDERS, MODULES, ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETTINGS = PYPROJECT["tool"]["setuptools"]
CHECKPOINTS = [pattern.split("/")[0] for pattern in SETTINGS["package-data"]["dq.checkpoints"]]
UNTRACKED = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "dist", ".*")


def python(code: str, *paths: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run `code` on this environment's libraries and `paths`, without its own copy of dq.

    `-S` leaves .pth files alone, and with them the editable installation of this checkout.
    """
    libraries = [p for p in sys.path if p and Path(p).is_dir() and Path(p).resolve() != ROOT]
    return subprocess.run(
        [sys.executable, "-S", "-P", "-c", code],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*paths, *libraries)))},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_package_is_listed() -> None:
    """A package missing from the list works in an editable installation and not in the wheel."""
    folders = {path.parent for path in MODULES.values()}
    assert not [folder for folder in folders if not (folder / "__init__.py").exists()]
    found = [name for name, path in MODULES.items() if path.name == "__init__.py"]
    assert sorted(found) == sorted(SETTINGS["packages"])


@pytest.mark.parametrize("link", ["pipelines", "eval"])
def test_type_checkers_find_the_mapped_folders(link: str) -> None:
    path = ROOT / "typings" / "dq" / link
    if not path.is_symlink():
        pytest.skip("this checkout has no symbolic links; only type checking needs them")
    assert path.resolve() == ROOT / link


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: setuptools leaves folders behind that later builds pick up."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in FOLDERS.values():
        shutil.copytree(ROOT / folder, source / folder, ignore=UNTRACKED)
    command = [sys.executable, "-P", "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    built = subprocess.run(
        [*command, "--no-index", "--quiet", "--wheel-dir", out, source],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return next(out.glob("*.whl"))


def test_wheel_contents(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    metadata = f"dq_diffusion-{PYPROJECT['project']['version']}.dist-info"
    assert {name.split("/")[0] for name in names} == {"dq", metadata}
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            inside = package.replace(".", "/") + "/" + path.relative_to(ROOT / folder).as_posix()
            assert inside in names, f"{inside} is missing from the wheel"
    assert "dq/py.typed" in names


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_wheel_holds_checkpoint(wheel: Path, checkpoint: str) -> None:
    folder = ROOT / "dq" / "checkpoints"
    files = [p for p in (folder / checkpoint).rglob("*") if p.is_file()]
    assert files, f"{checkpoint} is missing from the checkout"
    names = set(zipfile.ZipFile(wheel).namelist())
    missing = {f"dq/checkpoints/{p.relative_to(folder).as_posix()}" for p in files} - names
    assert not missing


def test_wheel_works_elsewhere(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import dq, dq.pipelines as pipelines, dq.eval as evaluation, importlib.util as util\n"
        "from dq import DQPipeline\n"
        "assert util.find_spec('pipelines') is None and util.find_spec('eval') is None\n"
        "print(dq.__file__, pipelines.__file__, evaluation.__file__, sep='\\n')\n"
    )
    ran = python(code, tmp_path / "site", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert all(Path(line).is_relative_to(tmp_path / "site") for line in ran.stdout.splitlines())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="measures in forks of one process")
def test_import_is_light(tmp_path: Path) -> None:
    """`import dq` costs at most 0.3 s of CPU time above torch and diffusers."""
    code = (
        "import os, sys, time, torch, diffusers\n"
        "before = set(sys.modules)\n"
        "for run in range(3):\n"
        "    if os.fork() == 0:\n"
        "        start = time.process_time()\n"
        "        import dq\n"
        "        print(time.process_time() - start, flush=True)\n"
        "        heavy = {'scipy', 'torchmetrics', 'typer'} & (set(sys.modules) - before)\n"
        "        os._exit(bool(heavy) + 2 * torch.cuda.is_initialized())\n"
        "    assert os.wait()[1] == 0, 'scipy, torchmetrics, typer or CUDA'\n"
    )
    ran = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert statistics.median(map(float, ran.stdout.split())) <= 0.3


def test_uninstalled_checkout_says_what_to_do(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "dq", tmp_path / "dq", ignore=shutil.ignore_patterns("emoji-*", "__py*"))
    ran = python("from dq import DQPipeline", tmp_path, cwd=tmp_path)
    assert ran.returncode != 0
    last = ran.stderr.strip().splitlines()[-1]
    assert "pip install -e ." in last, ran.stderr
