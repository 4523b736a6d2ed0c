#!/bin/bash
# Cloud TPU virtual machines, here a v5e-64 with 16 hosts. In a checkout:
#   NAME=my-tpu ZONE=us-west4-a FOLDER=/mnt/shared configs/launch/tpu_vm.sh [options of slm-jax train]
# Creates the machines if they are not there or were preempted, copies the checkout to every host, installs it, and trains.
# After a failure or a preemption the same command resumes from the last checkpoint. Keep runs and data out of the checkout.
# The machines cost money until you delete them:
#   gcloud compute tpus tpu-vm delete my-tpu --zone us-west4-a
set -euo pipefail

NAME=${NAME:?the name of the TPU}
ZONE=${ZONE:?its zone, such as us-west4-a}
ACCELERATOR=${ACCELERATOR:-v5litepod-64}
VERSION=${VERSION:-v2-alpha-tpuv5-lite}            # of the runtime; it belongs to the accelerator
SETUP=${SETUP:-true}                               # before training on every host, such as mounting the shared disk
FOLDER=${FOLDER:?a folder that all hosts share, with the data of the recipe below data/; runs go to runs/}
RECIPE=${RECIPE:-gpt2_124m}

tpu() { gcloud compute tpus tpu-vm "$1" "$NAME" --zone "$ZONE" "${@:2}"; }

state=$(tpu describe --format 'value(state)' 2> /dev/null || true)
if [[ $state == PREEMPTED || $state == TERMINATED ]]; then  # such machines don't come back
  tpu delete --quiet
  state=
fi
[[ $state ]] || tpu create --accelerator-type "$ACCELERATOR" --version "$VERSION" --spot
gcloud compute tpus tpu-vm scp --recurse . "$NAME:slm_jax" --zone "$ZONE" --worker=all
uv=.local/bin/uv    # for a newer Python than the machine's
tpu ssh --worker=all --command "$SETUP && curl -LsSf https://astral.sh/uv/install.sh | sh && \
  $uv venv --quiet --allow-existing --python 3.12 slm_jax_env && \
  $uv pip install --quiet --python slm_jax_env -e 'slm_jax[tpu]'"
folder=$(printf '%q' "$FOLDER")
options=$(printf '%q ' --config "$RECIPE" --restarts 3 "$@")
tpu ssh --worker=all --command "cd $folder && ~/slm_jax_env/bin/slm-jax train $options"
