from __future__ import annotations

import subprocess
import sys

import pytest

from dq import checkpoints
from dq.errors import DQError


@pytest.mark.parametrize("name", checkpoints.names())
def test_every_name_has_a_folder_with_its_licence(name: str) -> None:
    text = (checkpoints.path(name) / "README.md").read_text()
    assert "Noto emoji" in text
    assert "Apache License" in text


def test_unknown_name_tells_the_nearest_and_all() -> None:
    with pytest.raises(DQError, match="emoji-unte") as error:
        checkpoints.path("emoji-unte")
    assert "Did you mean 'emoji-unet'?" in str(error.value)
    assert all(name in str(error.value) for name in checkpoints.names())


def test_looking_up_a_path_does_not_import_torch() -> None:
    code = "import sys, dq.checkpoints as c; c.path('emoji-dit'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
