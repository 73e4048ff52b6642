"""The shapes of what a run writes; tests/worker/test_rundir.py has how they are read."""

import re
import subprocess
import sys
from dataclasses import fields
from typing import get_args

import pytest

from defeat.engine.events import Event
from tests.conftest import REPOSITORY


@pytest.mark.parametrize("event", get_args(Event), ids=lambda event: event.__name__)
def test_the_documentation_names_every_member(event: type) -> None:
    names = {field.name for field in fields(event)} - {"type", "time"}
    text = (REPOSITORY / "docs" / "architecture.md").read_text()
    (members,) = re.findall(rf"^\| `{event.type}` \| (.*) \|$", text, re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", members)) == names


def test_a_run_pays_for_neither_pydantic_nor_torch_to_write_events() -> None:
    code = "import sys, defeat.engine.report; print(sorted({'pydantic', 'torch', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stdout.strip() == "[]"
