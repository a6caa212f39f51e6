"""README.md says what the code does: its commands, its table of settings, its example."""

import dataclasses
import re
from pathlib import Path

from refine_jax.config import SECTIONS

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


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


def test_the_example_runs():
    (example,) = blocks("python")
    exec(compile(example, "README.md", "exec"), {})
