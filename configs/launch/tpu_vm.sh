#!/bin/bash
# Cloud TPU virtual machines, here a v5e-64 with 16 hosts. In a checkout:
#   NAME=my-tpu ZONE=us-west4-a RUNS_DIR=/mnt/shared/runs configs/launch/tpu_vm.sh [options of slm-jax train]
# Creates the machines if they are not there, copies the checkout to every host, installs it, and trains. After a failure or
# a preemption the same command resumes from the last checkpoint. The machines cost money until you delete them:
#   gcloud compute tpus tpu-vm delete my-tpu --zone us-west4-a
set -euo pipefail

NAME=${NAME:?the name of the TPU}
ZONE=${ZONE:?its zone, such as us-west4-a}
ACCELERATOR=${ACCELERATOR:-v5litepod-64}
VERSION=${VERSION:-v2-alpha-tpuv5-lite}            # of the runtime; it belongs to the accelerator
SETUP=${SETUP:-true}                               # before training on every host, such as mounting the shared disk
RUNS_DIR=${RUNS_DIR:?a folder that all hosts share, such as /mnt/shared/runs}
RECIPE=${RECIPE:-gpt2_124m}

tpu() { gcloud compute tpus tpu-vm "$1" "$NAME" --zone "$ZONE" "${@:2}"; }

tpu describe > /dev/null 2>&1 || tpu create --accelerator-type "$ACCELERATOR" --version "$VERSION" --spot
gcloud compute tpus tpu-vm scp --recurse . "$NAME:slm_jax" --zone "$ZONE" --worker=all
tpu ssh --worker=all --command "$SETUP && pip install --quiet -e 'slm_jax[tpu]'"
command=$(printf '%q ' python3 -m slm_jax train --config "$RECIPE" --runs_dir "$RUNS_DIR" --restarts 3 "$@")
tpu ssh --worker=all --command "$command"
