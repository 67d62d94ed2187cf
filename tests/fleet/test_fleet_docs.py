"""The files for Kubernetes and Slurm that the documentation gives are valid, and call commands that exist."""

from __future__ import annotations

import re
import shlex
import subprocess

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


def test_the_batch_script_is_valid_bash() -> None:
    done = subprocess.run(["bash", "-n", SLURM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_batch_script_runs_a_command_that_exists() -> None:
    text = SLURM.read_text()
    (line,) = re.findall(r"^fpxbench .*$", text, re.MULTILINE)
    arguments = shlex.split(line.replace('"$@"', "").replace('"$builds"', "2.13.0").replace('"$address"', "h:6379"))
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
