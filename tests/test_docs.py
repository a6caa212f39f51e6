"""README.md and docs/ say what the code does: commands, settings, the example, figures, links."""

import argparse
import dataclasses
import importlib
import importlib.util
import json
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from refine_jax import config_files
from refine_jax.config import SECTIONS, Config
from refine_jax.settings import table

ROOT = Path(__file__).parents[1]
EXPERIMENTS = ("experiments/README.md", "experiments/scale.md")
DOCS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/**/*.md"))
PAGES = ("README.md", "CONTRIBUTING.md", *DOCS, *EXPERIMENTS, "experiments/replicate.md")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


EXTRAS = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", read(name), re.M | re.S)


def prose(name: str) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", read(name), flags=re.M | re.S)


def test_the_first_screen_holds_the_two_commands():
    screen = "\n".join(read("README.md").splitlines()[:25])
    blocks = re.findall(r"```bash\n(.*?)```", screen, re.S)
    commands = [re.sub(r"[\s\\]+", " ", block).strip() for block in blocks]
    environment = "python3 -m venv .venv && . .venv/bin/activate && pip install -e "
    assert commands == [
        f"{environment}. && python -m refine_jax.main --config=configs/demo.py --workdir=runs/demo",
        f"{environment}'.[test]' && JAX_PLATFORMS=cpu python -m pytest",
    ]


def test_the_readme_is_one_page():
    assert len(read("README.md").splitlines()) <= 150


def test_the_table_lists_every_field_with_its_default_and_meaning():
    rows = re.findall(r"^\| `(\w+\.\w+)` \| `(.*?)` \| (.*) \|$", read("docs/settings.md"), re.M)
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
    lines = read("docs/settings.md").splitlines()
    assert [line for line in lines if line in table(SECTIONS)] == table(SECTIONS)


def test_the_example_runs():
    ((name, example),) = [(name, code) for name in PAGES for code in blocks(name, "python")]
    assert name == "docs/library.md"
    exec(compile(example, name, "exec"), {})


def test_the_figures_of_the_demo_are_those_of_a_run_that_is_kept():
    """experiments/demo_figures.py keeps them with their versions; README quotes its text."""
    source = importlib.util.spec_from_file_location("demo", ROOT / "experiments/demo_figures.py")
    demo = importlib.util.module_from_spec(source)
    source.loader.exec_module(demo)
    kept = json.loads(demo.FILE.read_text(encoding="utf-8"))
    assert kept["training"]["refine"]["steps"] == kept["training"]["ntp"]["steps"] == 100
    for quoted in (demo.text(kept), f"Python {kept['python']}", f"jax {kept['jax']}"):
        assert quoted in read("README.md")


def test_the_cost_of_a_step_is_that_of_the_page_on_speed():
    row = r"\| ReFINE step / next-token step, time \| ([\d.]+) \| ([\d.]+) \|"
    lact, deltanet = re.search(row, read("docs/speed.md")).groups()
    low, high = sorted((lact, deltanet))
    assert f"{low} to {high} times as long" in read("README.md")


def test_the_numbers_of_the_paper_are_those_of_the_configurations():
    rows = re.findall(r"^\| ([\w-]+ ?\w*) \| (.*) \|$", read("docs/method.md"), re.M)
    numbers = {name: cells.split(" | ") for name, cells in rows}
    phases = {
        "mid-training": ("midtrain_lact_760m.py", "train"),
        "post-training": ("posttrain_lact_760m.py", "train"),
        "test-time training": ("testtime_ruler_qa.py:official", "testtime"),
    }
    for phase, (file, section) in phases.items():
        config = Config.from_dict(config_files.load_config(str(ROOT / "configs" / file)))
        steps, refine = getattr(config, section), config.refine
        assert numbers[phase] == [
            *(str(steps.batch_size), str(steps.mini_batch_size), refine.reward),
            *(f"{refine.lambda_sft:g}", f"{refine.lambda_rl:g}"),
        ]
        assert (refine.num_positions, refine.rollout_length) == (8, 5)
        assert (refine.rollouts_per_position, refine.selection_temperature) == (1, 1)


def sections(text: str) -> Iterator[list[str]]:
    """(headings from the first level down, text) of each part of a document that has a heading."""
    above = []
    for part in re.split(r"^(?=#+ )", text, flags=re.M)[1:]:
        level = len(re.match(r"#+", part)[0])
        above = [*above[: level - 1], part]
        yield above


def test_measured_tables_say_which_version_they_were_measured_with():
    measured = []
    for name in PAGES:
        for above in sections(read(name)):
            part = re.sub(r"Qwen ?\d[\d., and]*", "Qwen ", above[-1])  # versions of models
            if name != "docs/method.md" and any(  # whose numbers are settings
                re.match(r"\|(?! `).*\d\.\d", line) for line in part.splitlines()
            ):
                measured.append(name)
                assert any(re.search(r"jax \d+\.\d+", text) for text in above), (name, part[:40])
    assert {"README.md", "docs/fit.md", "docs/speed.md", *EXPERIMENTS} <= {*measured}


def test_every_extra_is_listed():
    (table,) = re.findall(r"^\| extra \| .*\n\|-.*\n((?:\|.*\n)+)", read("docs/index.md"), re.M)
    listed = [name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row)]
    assert sorted(listed) == sorted(EXTRAS)


# Names and links


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    kept = re.sub(r"[^\w\- ]", "", re.sub(r"\]\(.*?\)", "", heading)).strip().lower()
    return kept.replace(" ", "-")


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_to_files_and_headings(name):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(name)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M)
            assert anchor in [slug(heading) for heading in headings], link


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", *DOCS])
def test_files_modules_and_settings_that_are_named_exist(name):
    quoted = re.findall(r"`([^`\n]+)`", prose(name))
    folders = r"(refine_jax|kernels|configs|tests|experiments|docs)/"
    for words in quoted:
        if found := re.fullmatch(rf"(python )?({folders}[\w./-]*?)(:[\w,]+)?", words):
            assert (ROOT / found[2]).exists(), words
        if found := re.fullmatch(r"python -m (refine_jax\.[\w.]+)", words):
            assert importlib.util.find_spec(found[1]), words
        for section, field in re.findall(r"(?<![\w.])(\w+)\.(\w+)(?=$|=| )", words):
            if section in SECTIONS and field != "py" and " -m " not in words:
                fields = [field.name for field in dataclasses.fields(SECTIONS[section])]
                assert field in fields or (section, field) == ("model", "forward"), words


# Commands


class Command(NamedTuple):
    """A command of a page: the words of the program and those after it."""

    page: str
    program: str
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        return shlex.join([*self.program.split(), *self.arguments])


def commands_of(name: str) -> Iterator[Command]:
    """Every command in the ```bash blocks of a page, without comments and variables before it."""
    for block in blocks(name, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            yield from _commands(name, line)


def _commands(name: str, line: str) -> Iterator[Command]:
    parser = shlex.shlex(line, posix=True, punctuation_chars="&;|<>")
    parser.whitespace_split = True
    words = list(parser)
    while words:
        end = words.index("&&") if "&&" in words else len(words)
        command, words = words[:end], words[end + 1 :]
        while re.fullmatch(r"[A-Z_]+=.*", command[0]):
            del command[0]
        if command[0] == "gcloud":  # what it runs on every host
            (inner,) = [word for word in command if word.startswith("--command=")]
            yield from _commands(name, inner.removeprefix("--command="))
            continue
        if command[0] == "srun":
            del command[0]
        size = 1
        if command[0].startswith("python"):
            size = 3 if command[1] == "-m" else 2
        yield Command(name, " ".join(command[:size]), tuple(command[size:]))


COMMANDS = [command for name in PAGES for command in commands_of(name)]


class _Parsed(Exception):
    """Ends a script after its command line was parsed."""


def parse(module: str, arguments: list[str]) -> Mapping:
    """The flags of `python -m MODULE ARGUMENTS` by the module's own parser; runs nothing.

    The one place here that knows how commands parse. Settings, of `refine_jax.main`, are checked
    against the configuration file.
    """
    options = importlib.import_module(module).command().parse(arguments)
    if module != "refine_jax.main":
        return vars(options)
    values = config_files.load_config(options.config)
    config_files.override(values, options.settings)
    config = Config.from_dict(values)
    for name in options.allow_change:
        section, field = name.split(".")
        assert field in [field.name for field in dataclasses.fields(SECTIONS[section])], name
    assert options.workdir or options.topology
    return {"config": config}


def parsed_module(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m MODULE FLAGS` takes these flags."""
    parse(command.program.split()[-1], list(command.arguments))


def run_script(program: str, arguments, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run `python FILE ARGUMENTS` in this process."""
    script = ROOT / program.split()[-1]
    monkeypatch.syspath_prepend(str(script.parent))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # some scripts set it
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    runpy.run_path(str(script), run_name="__main__")


def parsed_script(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python FILE FLAGS` takes these flags."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *arguments):
        parse_args(self, *arguments)
        raise _Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    with pytest.raises(_Parsed):
        run_script(command.program, command.arguments, monkeypatch)


def known_extras(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """`pip install -e .[EXTRA]` names extras of this package."""
    assert command.arguments[:2] == ("install", "-e") and len(command.arguments) == 3
    (named,) = re.fullmatch(r"\.(?:\[([\w,]+)\])?", command.arguments[2]).groups()
    assert named is None or set(named.split(",")) <= set(EXTRAS)


def present_files(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words that look like paths of the repository are there."""
    for word in (command.program, *command.arguments):
        if re.match(r"(tests|experiments|\.ci)/", word):
            assert (ROOT / word).exists(), word


def nothing(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing to parse: the command is run in full, or is one of the shell."""


class Check(NamedTuple):
    """How commands that match a pattern are checked.

    parse: what is checked of each, without running it. runs: the test, or the step of .ci/run, that
    runs such a command in a small form; None: nothing does.
    """

    pattern: str
    parse: Callable[[Command, pytest.MonkeyPatch], None]
    runs: str | None


# The first pattern that matches a command counts.
MAIN = r"python -m refine_jax\.main .*"
GENERATE = r"python -m refine_jax\.generate .*"
MODULES = {
    MAIN + "=.?hf://": "tests/phases/test_hub_run.py::"
    "test_it_streams_resumes_and_comes_back_bit_for_bit",
    MAIN + "=gs://": "tests/phases/test_buckets.py::test_a_run_that_crashed_goes_on_in_a_bucket",
    MAIN + "--compile_only": "tests/compile_only/test_report.py::test_a_run_that_fits",
    MAIN + "--allow_change": "tests/phases/test_changes.py::"
    "test_more_steps_bend_a_cosine_schedule_and_need_permission",
    MAIN + "(--coordinator|/shared/)": "tests/phases/test_processes.py::"
    "test_runs_of_one_two_and_four_processes_are_the_same",
    MAIN + "--config.mesh": "tests/refine/test_mesh.py::"
    "test_losses_and_gradients_do_not_depend_on_the_mesh",
    MAIN + "train.trackers": "tests/report/test_trackers.py::"
    "test_a_run_that_is_continued_goes_on_in_the_same_place",
    MAIN + "train.profile": "tests/report/test_profile.py::test_it_holds_the_steps_asked_for",
    MAIN + "train.evaluate": "tests/phases/test_tasks.py::test_scores_are_those_of_the_evaluation",
    MAIN + "refine.preset": "tests/test_presets.py::test_flags_win_over_the_file",
    MAIN + "train.trainable=lora .*copies": "tests/phases/test_lora.py::"
    "test_prompts_adapt_updates_of_their_own_at_once",
    MAIN + "train.trainable=lora": "tests/phases/test_lora.py::"
    "test_checkpoints_hold_updates_and_their_moments_alone",
    MAIN + "configs/demo": ".ci/run: demo, short form",
    MAIN + "configs/compare": "tests/phases/test_compare.py::"
    "test_the_figures_are_those_of_the_parts",
    MAIN + "configs/midtrain": "tests/phases/test_main.py::test_a_run_learns_and_reports",
    MAIN
    + "configs/posttrain": "tests/phases/test_posttrain.py::test_a_nested_run_learns_and_reports",
    MAIN + "configs/eval": "tests/phases/test_evaluate.py::"
    "test_every_prompt_is_answered_greedily_and_scored",
    MAIN + "configs/testtime": "tests/phases/test_evaluate.py::"
    "test_each_prompt_is_answered_with_the_parameters_adapted_to_it",
    GENERATE + "_state": "tests/generation/test_command.py::"
    "test_a_state_is_read_once_and_asked_twice",
    GENERATE + "--chat": "tests/generation/test_command.py::"
    "test_a_prompt_becomes_the_message_of_a_user",
    GENERATE + "--adapt_steps": "tests/generation/test_command.py::"
    "test_each_prompt_is_continued_by_a_copy_trained_on_it",
    GENERATE: "tests/generation/test_command.py::"
    "test_prompts_and_files_of_any_length_are_continued_as_by_the_library",
    r"python -m refine_jax\.convert .*(lora)": "tests/phases/test_lora.py::"
    "test_an_adapter_and_a_merged_model_are_written_and_read",
    r"python -m refine_jax\.convert .*--push": "tests/checkpoint/test_hub.py::"
    "test_what_is_pushed_reads_back_bit_for_bit",
    r"python -m refine_jax\.convert from_hf hf:": "tests/checkpoint/test_hub.py::"
    "test_a_model_on_the_hub_converts_as_its_folder_does",
    r"python -m refine_jax\.convert to_hf runs/": "tests/checkpoint/test_convert.py::"
    "test_a_training_run_goes_back_to_pytorch",
    r"python -m refine_jax\.convert .*--dtype": "tests/checkpoint/test_convert.py::"
    "test_export_in_another_dtype",
    r"python -m refine_jax\.convert": "tests/checkpoint/test_convert.py::"
    "test_golden_folders_round_trip",
    r"python -m refine_jax\.report": "tests/report/test_page.py::"
    "test_the_command_takes_one_run_or_several",
    r"python -m refine_jax\.lm_harness .*--apply_chat_template": "tests/evaluation/"
    "test_harness_oracle.py::test_answers_are_those_of_the_hf_model",
    r"python -m refine_jax\.lm_harness": "tests/evaluation/test_harness.py::test_command",
    r"python -m refine_jax\.evaluation\.position": "tests/evaluation/test_position.py::"
    "test_command",
    r"python -m refine_jax\.data\.prepare": "tests/data/test_builders.py::test_command",
    r"python -m refine_jax\.data\.tasks\.generate": "tests/data/tasks/test_files.py::test_command",
}
PAPER = r"python experiments/paper/\w+\.py"
STUDY = r"python experiments/study/study\.py"
SCRIPTS = {
    r"python experiments/bench_": "tests/test_docs.py::test_benchmarks_run_in_their_smallest_form",
    r"python experiments/gpu_check": "tests/experiments/test_gpu_check.py::"
    "test_kernels_are_compared_with_their_reference",
    r"python experiments/tpu_kernels": "tests/experiments/test_tpu_kernels.py::"
    "test_figures_and_table",
    r"python experiments/tune_tpu": "tests/experiments/test_tpu_kernels.py::"
    "test_the_search_writes_the_fastest_that_compiles",
    r"python experiments/profile_scopes": "tests/report/test_profile.py::"
    "test_a_step_is_shared_out_among_its_scopes",
    PAPER + " --list": "tests/test_docs.py::test_the_runs_of_a_table_are_listed",
    PAPER: "tests/experiments/test_paper.py::test_a_table_holds_means_beside_published_numbers",
    r"python experiments/train_small\.py": "tests/test_small.py::"
    "test_the_script_trains_and_exports_the_same_model_twice",
    STUDY + " .*--signals": "tests/experiments/test_study.py::"
    "test_signals_alone_need_no_more_than_the_base",
    STUDY + " .*--arms": "tests/experiments/test_study.py::test_seeds_may_share_base_models",
    STUDY + " --report": "tests/experiments/test_study.py::test_the_report_of_nothing_says_so",
    STUDY: "tests/experiments/test_study.py::test_a_study_chooses_rates_then_runs_all_seeds_once",
}
CHECKS = [
    *(Check(pattern, parsed_module, runs) for pattern, runs in MODULES.items()),
    *(Check(pattern, parsed_script, runs) for pattern, runs in SCRIPTS.items()),
    Check(
        r"python tests/made_up_runs\.py",
        parsed_script,
        "tests/report/test_page.py::test_sizes_and_times_are_printed",
    ),
    Check(
        r"python tests/soak\.py",
        present_files,
        "tests/phases/test_soak.py::test_killed_runs_end_bit_for_bit_as_uninterrupted_ones",
    ),
    Check(r"pip install -e '?\.(\[(test|eval|docs)\])?'?$", known_extras, ".ci/run"),
    Check(r"pip install -e", known_extras, None),  # jax for accelerators
    Check(r"(python -m )?pytest", present_files, ".ci/run"),
    Check(r"mkdocs build --strict$", nothing, ".ci/run: site of docs/"),
    Check(r"ruff (check|format)", nothing, ".ci/run: lint"),
    Check(r"python3 -m venv \.venv$|\. \.venv/bin/activate$", nothing, ".ci/run"),
    Check(r"\.ci/run$", present_files, None),
    Check(r"python3 -m venv fresh$|fresh/bin/pip install|du -sm fresh$", nothing, None),
    Check(r"python -X importtime", nothing, None),
    Check(r"git clone REPOSITORY|cd refine-jax$|mkdocs serve$", nothing, None),
]


def check_of(command: Command) -> Check:
    for check in CHECKS:
        if re.match(check.pattern, str(command)):
            return check
    raise AssertionError(f"no rule knows how this command of {command.page} is checked: {command}")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.page}: {command}")
def test_every_command_is_one_that_its_program_takes(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    check_of(command).parse(command, monkeypatch)


def test_every_rule_is_needed_and_what_it_names_is_there():
    used = {check_of(command) for command in COMMANDS}
    assert not [check.pattern for check in CHECKS if check not in used]
    for place in {check.runs for check in used if check.runs}:
        file, _, name = re.sub("::|: ", "\n", place).partition("\n")
        assert re.search(rf'^(def {name}\(|step "{name})' if name else "", read(file), re.M), place


def test_the_runs_of_a_table_are_listed(monkeypatch, tmp_path, capsys):
    arguments = ["--list", f"--workdir={tmp_path}"]
    with pytest.raises(SystemExit) as ended:
        run_script("python experiments/paper/table_6.py", arguments, monkeypatch)
    assert not ended.value.code
    assert capsys.readouterr().out.count("python -m refine_jax.main") == 8  # as the page says


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, smallest",
    [
        ("bench_refine_step", ["--model=lact", "--tokens=512", "--repeats=2"]),
        ("bench_decode", ["--model=deltanet", "--generate=2", "--repeats=1"]),
        ("bench_decode", ["--model=hybrid", "--generate=2", "--repeats=1"]),
        ("bench_ops", ["--cases", "delta_rule", "--repeats=1"]),
    ],
)
def test_benchmarks_run_in_their_smallest_form(name, smallest, monkeypatch, capsys):
    run_script(f"python experiments/{name}.py", [*smallest, "--json"], monkeypatch)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])
