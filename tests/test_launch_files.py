"""The files under configs/launch are valid, and what they start is a job of slm_jax, each process with its number."""

import math
import os
import re
import shlex
import subprocess
import tomllib

import pytest
import yaml
from recipes import CONFIGS, RECIPES

from slm_jax.tasks.config import parse_args
from slm_jax.training.distributed import join_arguments

LAUNCH = CONFIGS / "launch"
SCRIPTS, MANIFESTS = ["slurm.sbatch", "tpu_vm.sh"], ["jobset_gpu.yaml", "jobset_tpu.yaml", "skypilot.yaml"]
# Stand-ins: what is called is written to a file.
RECORD = """#!/bin/bash
{ printf "%s|" "$(basename "$0")" "$JAX_COORDINATOR_ADDRESS" "$JAX_NUM_PROCESSES" "$JAX_PROCESS_ID"
  printf "%q " "$@"; echo; } >> "$RECORD"
"""
SRUN = RECORD + 'while [[ $1 == -* ]]; do shift; done\nfor i in 0 1; do SLURM_PROCID=$i "$@"; done\n'
GCLOUD = RECORD + '[[ $4 != describe ]] || { [[ $STATE ]] && echo "$STATE" || exit 1; }\n'


@pytest.fixture
def run(tmp_path):
    """Run a script with stand-ins for the programs of its engine; return what each call was given."""
    for name, text in {"srun": SRUN, "gcloud": GCLOUD, "slm-jax": RECORD}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run(script, *words, **variables):
        record = tmp_path / "record"
        env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "RECORD": str(record), **variables}
        done = subprocess.run(["bash", "-c", script, "script", *words], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [line.split("|", 4) for line in record.read_text().splitlines()]

    return run


def test_every_file_is_tested_and_none_is_taken_for_a_recipe():
    assert {path.name for path in LAUNCH.iterdir()} == {*SCRIPTS, *MANIFESTS, "Dockerfile"}
    assert not {path.name for path in RECIPES} & set(MANIFESTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_bash(name):
    subprocess.run(["bash", "-n", LAUNCH / name], check=True)


def train_options(words):
    """The options of ``slm-jax train``, which must be such."""
    command, name, *options = words
    assert (command, name) == ("slm-jax", "train")
    return parse_args(options)


def test_sbatch_starts_one_process_a_node_with_the_users_options(run):
    script = (LAUNCH / "slurm.sbatch").read_text()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)", script, re.MULTILINE))
    assert asked["ntasks-per-node"] == "1"
    assert asked["signal"].startswith("TERM@")  # to the processes, without B:
    srun, *processes = run(script, "--run", "my run", SLURM_CPUS_PER_TASK=asked["cpus-per-task"])
    assert srun[0] == "srun"
    assert f"--cpus-per-task={asked['cpus-per-task']}" in shlex.split(srun[-1])  # which it does not inherit
    assert len(processes) == int(asked["nodes"])
    for name, *_, words in processes:
        config = train_options([name, *shlex.split(words)])
        assert (config.name, config.runs_dir, config.restarts > 0) == ("my run", "runs", True)


@pytest.mark.parametrize(
    ("state", "first"),
    [("", ["create"]), ("READY", []), ("PREEMPTED", ["delete", "create"])],
    ids=["new", "up", "lost"],
)
def test_tpu_machines_are_made_once_and_train_on_all_hosts(run, state, first):
    script = (LAUNCH / "tpu_vm.sh").read_text()
    variables = {"NAME": "mine", "ZONE": "z", "FOLDER": "/my shared", "STATE": state}
    calls = [shlex.split(words) for *_, words in run(script, "--run", "my run", **variables)]
    assert [call[3] for call in calls] == ["describe", *first, "scp", "ssh", "ssh"]
    assert all(call[:3] == ["compute", "tpus", "tpu-vm"] and "mine" in " ".join(call) for call in calls)
    assert all("--worker=all" in call for call in calls[-3:])
    install, train = (call[call.index("--command") + 1] for call in calls[-2:])
    subprocess.run(["bash", "-n"], input=install, text=True, check=True)
    cd, folder, _, program, *words = shlex.split(train)
    assert (cd, folder) == ("cd", "/my shared")
    assert program == f"~/{re.search('--python ([a-z_]+) -e', install)[1]}/bin/slm-jax"
    config = train_options(["slm-jax", *words])
    assert (config.name, config.runs_dir, config.restarts > 0) == ("my run", "runs", True)


def test_sky_gives_each_machine_its_number(run):
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    subprocess.run(["bash", "-n"], input=task["setup"], text=True, check=True)
    given = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", **task["envs"]}
    for rank in ("0", "1"):
        *_, (name, address, count, index, words) = run(task["run"], SKYPILOT_NODE_RANK=rank, **given)
        assert (address, count, index) == ("10.0.0.1:8476", "2", rank)
        config = train_options([name, *shlex.split(words)])
        assert (config.data.source, config.checkpoint.mirror) == (task["envs"]["DATA"], task["envs"]["MIRROR"])
    assert task["num_nodes"] == 1  # several share no disk; a mounted bucket is none


def test_jobset_gives_each_pod_its_number():
    jobset = Jobset("jobset_gpu.yaml")
    assert jobset.container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    environ = {**jobset.environ, "KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    first_pod = f"{jobset.name}-{jobset.job['name']}-0-0.{jobset.name}"
    for index in range(jobset.hosts):
        arguments = join_arguments({**environ, "JOB_COMPLETION_INDEX": str(index)})
        assert arguments["coordinator_address"] == f"{first_pod}:8476"
        assert (arguments["num_processes"], arguments["process_id"]) == (jobset.hosts, index)


def test_a_tpu_jobset_has_a_pod_for_each_host_of_the_topology():
    jobset = Jobset("jobset_tpu.yaml")
    topology = jobset.pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = jobset.container["resources"]["limits"]["google.com/tpu"]
    assert jobset.hosts * chips == math.prod(map(int, topology.split("x")))
    assert not jobset.environ  # Google Kubernetes Engine sets what tells the pods of each other


def test_the_image_has_an_extra_for_each_kind_of_node():
    extras = tomllib.loads((LAUNCH.parents[1] / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.findall(r"EXTRA=(\w+)", (LAUNCH / "Dockerfile").read_text())
    assert {"cuda13", "tpu", "beam"} == set(named) <= set(extras)


class Jobset:
    """What a JobSet starts, after checks that hold of each."""

    def __init__(self, name):
        manifest = yaml.safe_load((LAUNCH / name).read_text())
        assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
        assert manifest["spec"]["failurePolicy"]["maxRestarts"] > 0
        self.name = manifest["metadata"]["name"]
        (self.job,) = manifest["spec"]["replicatedJobs"]
        job = self.job["template"]["spec"]
        assert (job["completionMode"], job["backoffLimit"]) == ("Indexed", 0)
        assert job["parallelism"] == job["completions"]
        self.hosts, self.pod = job["completions"], job["template"]["spec"]
        assert self.pod["restartPolicy"] == "Never"  # the whole job starts again, not one pod of it
        (self.container,) = self.pod["containers"]
        self.environ = {each["name"]: each["value"] for each in self.container.get("env", [])}
        mounts = {mount["name"]: mount["mountPath"] for mount in self.container["volumeMounts"]}
        assert mounts.keys() == {volume["name"] for volume in self.pod["volumes"]}
        assert self.container["workingDir"] == mounts["shared"]
        assert train_options(self.container["command"]).runs_dir == "runs"
