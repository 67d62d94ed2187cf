"""The files for Kubernetes and Slurm that the documentation gives are valid, and call commands that exist."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
from pathlib import Path

import pytest
import typer
from places import CHECKOUT

import fpxbench
from fpxbench.cli import app

yaml = pytest.importorskip("yaml", reason="PyYAML reads the manifest: pip install pyyaml")

MANIFEST = yaml.safe_load((CHECKOUT / "docs/fleet/kuberay.yaml").read_text())
SLURM = CHECKOUT / "docs/fleet/slurm.sh"


def groups() -> list[dict]:
    return [MANIFEST["spec"]["headGroupSpec"], *MANIFEST["spec"]["workerGroupSpecs"]]


def test_the_manifest_is_a_ray_cluster_with_named_groups() -> None:
    assert (MANIFEST["apiVersion"], MANIFEST["kind"]) == ("ray.io/v1", "RayCluster")
    names = [group["groupName"] for group in groups()[1:]]
    assert len(names) == len(set(names)) >= 2
    for group in groups()[1:]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_every_worker_asks_for_one_gpu_and_keeps_its_folder() -> None:
    for group in groups()[1:]:
        (container,) = group["template"]["spec"]["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
        folder = {each["name"]: each["value"] for each in container["env"]}["FPX_FLEET_FOLDER"]
        (volume,) = [each["name"] for each in container["volumeMounts"] if each["mountPath"] == folder]
        assert volume in [each["name"] for each in group["template"]["spec"]["volumes"]]


def test_the_head_measures_nothing_and_listens_where_the_documentation_says() -> None:
    head = groups()[0]
    assert head["rayStartParams"]["num-cpus"] == "0"
    ports = {each["containerPort"] for each in head["template"]["spec"]["containers"][0]["ports"]}
    assert ports == {6379, 8265, 10001}


def test_every_node_has_the_drivers_versions() -> None:
    images = {group["template"]["spec"]["containers"][0]["image"] for group in groups()}
    assert {image.rpartition(":")[2] for image in images} == {fpxbench.__version__}


COMMANDS = {"scontrol": "echo node-a", "srun": "exit 0", "ray": "exit 0", "fpxbench": """exec python3 -c '
import signal, sys, time
try:
    print("running", flush=True)
    time.sleep(float(sys.argv[1]))
    sys.exit(1)
except KeyboardInterrupt:
    print("fetched", flush=True)
    sys.exit(130)
' "${@: -1}" """}


@pytest.mark.parametrize(("signalled", "seconds", "code", "printed"), [
    (True, "60", 130, "fetched"), (False, "0", 1, "")])
def test_the_batch_script_passes_slurms_signal_to_the_driver_and_ends_as_it_does(
        tmp_path: Path, signalled: bool, seconds: str, code: int, printed: str) -> None:
    """With ``B:`` Slurm signals the script alone; without, its steps and not the script."""
    folder = tmp_path / ".venv/bin"
    folder.mkdir(parents=True)
    for name, body in COMMANDS.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)
    script = subprocess.Popen(["bash", SLURM, "2.13.0", seconds], cwd=tmp_path, stdout=subprocess.PIPE, text=True,
                              env=os.environ | {"SLURM_JOB_NODELIST": "node-a"})
    assert script.stdout is not None and script.stdout.readline() == "running\n"
    if signalled:
        script.send_signal(signal.SIGINT)
    assert script.communicate()[0].strip() == printed and script.returncode == code
    (directive,) = re.findall(r"^#SBATCH --signal=(\S+)", SLURM.read_text(), re.MULTILINE)
    assert directive.startswith("B:INT@")


def test_the_batch_script_runs_a_command_that_exists() -> None:
    text = SLURM.read_text()
    (line,) = re.findall(r"^fpxbench .*$", text, re.MULTILINE)
    arguments = shlex.split(line.replace('"$@" &', "").replace('"$builds"', "2.13.0").replace('"$address"', "h:6379"))
    command, name, context = typer.main.get_command(app), "fpxbench", None
    arguments = arguments[1:]
    for _ in range(2):
        context = command.make_context(name, list(arguments), parent=context, resilient_parsing=False)
        name, command, arguments = command.resolve_command(context, [*context._protected_args, *context.args])
    context = command.make_context(name, arguments, parent=context)
    assert (context.params["builds"], context.params["address"]) == ("2.13.0", "h:6379")


def test_rays_commands_in_the_batch_script_have_their_options() -> None:
    scripts = pytest.importorskip("ray.scripts.scripts", reason="the fleet needs Ray: pip install 'fpxbench[fleet]'")
    options = {option for parameter in scripts.start.params for option in parameter.opts}
    used = set(re.findall(r"(--[a-z-]+)", " ".join(re.findall(r"ray start (.*)", SLURM.read_text()))))
    assert used and used <= options
