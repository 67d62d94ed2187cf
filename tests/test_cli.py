"""The command line as a whole: what it lists, what it imports, what its defaults are."""

import json
import os
import re
import shlex
import subprocess
import sys
import textwrap

import pytest
from commands import command
from few_targets import write_few_targets
from sample_records import case, record
from typer.main import get_command

from fpxbench import cli
from fpxbench.builds.installed import NoPyTorch
from fpxbench.builds.timeline import TimelineError
from fpxbench.cli import COMMANDS
from fpxbench.cli.common import UsageError
from fpxbench.fleet.cluster import NoCluster, NoRay
from fpxbench.fleet.state import AnotherRun
from fpxbench.records.store import Store

NO_TORCH = """
    import sys, traceback

    imported = []

    class Refuse:
        def create_module(self, spec):
            imported.append("".join(traceback.format_stack(limit=40)))
            raise AssertionError("the parent process imports torch")

        exec_module = create_module

    class NoTorch:
        def find_spec(self, name, path=None, target=None):
            if name != "torch":
                return None     # looking for it is allowed
            others = (finder for finder in sys.meta_path if finder is not self)
            found = next(filter(None, (finder.find_spec(name, path, target) for finder in others)))
            found.loader = Refuse()
            return found

    sys.meta_path.insert(0, NoTorch())
"""
RUN = NO_TORCH + """
    import io, json
    from contextlib import redirect_stdout
    from fpxbench import cli

    for arguments in json.loads(sys.stdin.read()):
        sys.argv = ["fpxbench", *arguments]
        printed = io.StringIO()
        try:
            with redirect_stdout(printed):
                cli.main()
            code = 0
        except SystemExit as end:
            code = end.code
        except BaseException:
            print(traceback.format_exc(), file=sys.stderr)
            code = "raised"
        print(json.dumps([arguments, code, imported]), file=sys.__stdout__)
        imported.clear()
"""


def names(command, path=()):
    """Yield every command and command of a group, as the words that are typed."""
    yield path
    for name in getattr(command, "commands", {}):
        yield from names(cli.load(name) if not path else command.commands[name], (*path, name))


EVERY = [path for path in names(get_command(cli.app)) if path]


def run_each(invocations, folder):
    """Run them in one process, in which importing torch raises; exit codes by words."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(RUN)],
        input=json.dumps(invocations),
        cwd=folder,
        text=True,
        capture_output=True,
        env=os.environ | {"COLUMNS": "100"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ended = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[[")]
    assert {" ".join(arguments): stack for arguments, _, stack in ended if stack} == {}
    assert not [arguments for arguments, code, _ in ended if code == "raised"], done.stderr
    assert len(ended) == len(invocations), done.stderr
    return {tuple(arguments): code for arguments, code, _ in ended}


def test_every_command_is_found():
    assert {path[0] for path in EVERY} == set(COMMANDS)
    assert {("timeline", "sync"), ("environments", "remove"), ("targets", "diff")} <= set(EVERY)


def test_no_help_imports_torch(tmp_path):
    helps = [[*path, "--help"] for path in [(), *EVERY]]
    assert set(run_each(helps, tmp_path).values()) == {0}


SMALL_RUN = ("run --implementation eager_upcast --scheme e4m3fn-row --workload canary.seed --device cpu --no-timing"
             " --results fresh")
SUCCEEDING = (SMALL_RUN, "list", "list schemes", "doctor", "report", "records", "show CASE", "repro CASE",
              "regressions")
INVOCATIONS = (*SUCCEEDING, *"""
fleet run --address 127.0.0.1:1
fleet status
fleet nodes --address 127.0.0.1:1
fleet asv
inspect eager_upcast e4m3fn-row --n 32 --k 64 --m 16 --device cpu
list workloads
list cases --scheme e4m3fn-row --workload canary.seed --device cpu
checkpoint model.safetensors
tensor-check 'FloatTensor mxfp4' -o clone --results fresh
generate /no/such/folder --device cpu --results fresh
recommend /no/such/folder --device cpu --results fresh
rank ./no/such/folder --results fresh
decode --format no-such-format --device cpu --results fresh
confirm
bisect CASE 2.11.0 2.12.0
compare 2.11.0 2.12.0
issues
notify --webhook http://127.0.0.1:1 --hud hud.json --atom feed.xml
timeline list
timeline show 2.13.0
timeline here
timeline sync --index absent
environments list
environments remove --all --environments none
detector --series 10 --only rule --jobs 1
numerics --conversion finfo --engine eager --device cpu --results fresh
targets --operation decode/e4m3fn/* --operation triton_fused/mxfp4/* --arch sm_90
targets diff 3.0.0 3.1.0
targets repro encode/e5m2fnuz/fp16-rtne sm_90
codec --elements 1 --only decode/e4m3fn
""".strip().splitlines())
"""Each command, as a user types it in a folder with one record, of CASE, and a file of one weight."""


def test_no_command_imports_torch_in_its_own_process(tmp_path):
    Store(tmp_path / "results").append(record(case()))
    write_few_targets(tmp_path / "results")
    header = json.dumps({"layer.weight": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    invocations = {line: shlex.split(line.replace("CASE", case().id)) for line in INVOCATIONS}
    group = {path[0] for path in EVERY if len(path) > 1}
    asked = {
        tuple(words[:2] if words[0] in group and len(words) > 1 and not words[1].startswith("-") else words[:1])
        for words in invocations.values()
    }
    assert asked >= {path for path in EVERY if path not in {(name,) for name in group}}, "a command is not run here"
    codes = run_each(list(invocations.values()), tmp_path)
    assert {words: code for words, code in codes.items() if code not in (0, 1, 2)} == {}
    assert {line: codes[tuple(invocations[line])] for line in SUCCEEDING} == dict.fromkeys(SUCCEEDING, 0)


def test_the_check_for_torch_can_fail(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(NO_TORCH) + "import fpxbench.sweep.trial"],
        text=True,
        capture_output=True,
        cwd=tmp_path,
    )
    assert "the parent process imports torch" in done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_of_commands_says_what_each_help_says(name):
    """The list is written apart from the commands, which it does not import."""
    first = re.sub(r"\s+", " ", (cli.load(name).help or "").split("\n\n")[0]).strip()
    assert first.rstrip(".") == COMMANDS[name].summary.rstrip(".")


def defaults(name):
    return {parameter.name: parameter.default for parameter in cli.load(name).params}


def test_defaults_are_the_constants_of_the_rules_and_settings():
    from fpxbench.casts.codec_speed import ELEMENTS
    from fpxbench.regressions.confirm import BUDGET_S, LEVEL
    from fpxbench.sweep.settings import Settings

    assert (defaults("confirm")["level"], defaults("confirm")["budget"]) == (LEVEL, BUDGET_S / 60)
    assert defaults("codec")["elements"] == ELEMENTS
    assert defaults("run")["timeout"] == defaults("numerics")["timeout"] == Settings().timeout_s
    assert defaults("run")["profile"] == defaults("list")["profile"] == Settings().profile
    assert {str(defaults(name)["results"]) for name in ("run", "numerics", "report", "records", "confirm")} == {
        str(Settings().results)
    }


@pytest.mark.parametrize("error", [TimelineError, NoCluster, NoRay, AnotherRun, NoPyTorch, UsageError, ValueError])
def test_an_error_that_a_user_can_correct_ends_a_command_with_its_message(error, monkeypatch, capsys):
    def app():
        raise error("x is wrong: give y")

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert (ended.value.code, capsys.readouterr().err) == (2, "fpxbench: x is wrong: give y\n")


def test_any_other_error_is_a_bug_and_shows_its_traceback(monkeypatch):
    def app():
        raise RuntimeError("unforeseen")

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(RuntimeError, match="unforeseen"):
        cli.main()


def test_a_short_sweep_ends_with_a_report_of_its_records(tmp_path):
    run = command("run -i eager_upcast -s mxfp4 -w canary.seed --device cpu --profile smoke --no-timing --results",
                  tmp_path / "results", "--report", tmp_path / "report")
    assert run.exit_code == 0 and (tmp_path / "report" / "index.html").as_uri() in run.output.replace("\n", "")
    assert list((tmp_path / "report").glob("machines/*/*/eager_upcast__mxfp4__canary.seed__m1__bf16.html"))
