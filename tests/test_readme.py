"""README.md says what the code does: its commands, its table of settings, its example."""

import dataclasses
import importlib.util
import json
import re
from pathlib import Path

import pytest

from refine_jax.config import SECTIONS
from refine_jax.settings import table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def test_the_first_screen_holds_the_two_commands():
    screen = "\n".join(README.splitlines()[:25])
    blocks = re.findall(r"```bash\n(.*?)```", screen, re.S)
    commands = [re.sub(r"[\s\\]+", " ", block).strip() for block in blocks]
    environment = "python3 -m venv .venv && . .venv/bin/activate && pip install -e "
    assert commands == [
        f"{environment}. && python -m refine_jax.main --config=configs/demo.py --workdir=runs/demo",
        f"{environment}'.[test]' && JAX_PLATFORMS=cpu python -m pytest",
    ]


def test_the_table_lists_every_field_with_its_default_and_meaning():
    rows = re.findall(r"^\| `(\w+\.\w+)` \| `(.*?)` \| (.*) \|$", README, re.M)
    expected = []
    for name, section in SECTIONS.items():
        for field in dataclasses.fields(section):
            default = f"{field.default:g}" if isinstance(field.default, float) else field.default
            default = repr(default) if isinstance(field.default, str) else str(default)
            choices = field.metadata["choices"]
            meaning = field.metadata["doc"]
            if choices:
                meaning += "; one of " + ", ".join(f"`{choice}`" for choice in choices)
            expected.append((f"{name}.{field.name}", default, meaning))
    assert rows == expected
    assert [line for line in README.splitlines() if line in table(SECTIONS)] == table(SECTIONS)


def test_the_example_runs():
    (example,) = blocks("python")
    exec(compile(example, "README.md", "exec"), {})


def test_the_figures_of_the_demo_are_those_of_a_run_that_is_kept():
    """experiments/demo_figures.py keeps them with their versions; README quotes its text."""
    source = importlib.util.spec_from_file_location("demo", ROOT / "experiments/demo_figures.py")
    demo = importlib.util.module_from_spec(source)
    source.loader.exec_module(demo)
    kept = json.loads(demo.FILE.read_text(encoding="utf-8"))
    assert [record["step"] for record in kept["evaluations"]] == [0, 15, 30, 45, 60]
    for quoted in (demo.text(kept), f"Python {kept['python']}", f"jax {kept['jax']}"):
        assert quoted in README


def sections(text):
    """(headings from the first level down, text) of each part of a document that has a heading."""
    above = []
    for part in re.split(r"^(?=#+ )", text, flags=re.M)[1:]:
        level = len(re.match(r"#+", part)[0])
        above = [*above[: level - 1], part]
        yield above


@pytest.mark.parametrize("name", ["README.md", "experiments/README.md", "experiments/scale.md"])
def test_measured_tables_say_which_version_they_were_measured_with(name):
    measured = []
    for above in sections((ROOT / name).read_text(encoding="utf-8")):
        part = above[-1]
        if any(re.match(r"\|(?! `).*\d\.\d", line) for line in part.splitlines()):
            measured.append(part.splitlines()[0])
            assert any(re.search(r"jax \d+\.\d+", text) for text in above), measured[-1]
    assert measured
