"""The library's modules by the names they are imported by, read from the files: nothing runs."""

from pathlib import Path

__all__ = ["FOLDERS", "MODULES", "ROOT"]

ROOT = Path(__file__).parents[1]
FOLDERS = {"dq": "dq", "dq.pipelines": "pipelines", "dq.eval": "eval"}


def _find() -> dict[str, Path]:
    modules = {}
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            modules[".".join((package, *parts)).removesuffix(".__init__")] = path
    return modules


MODULES = _find()
