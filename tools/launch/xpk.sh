#!/bin/bash
# One run on TPU slices of a GKE cluster that XPK (github.com/AI-Hypercomputer/xpk) has made:
#     CLUSTER=my-cluster TPU=v5litepod-256 SLICES=2 IMAGE=gcr.io/my-project/jdiff \
#         tools/launch/xpk.sh my-run --config configs/dit_xl2_imagenet256.py --workdir /mnt/runs/xl
# IMAGE has the repository as its working directory and jax[tpu] and jdiff installed; /mnt/runs is a storage of the cluster
# (`xpk storage attach`). GKE starts the workload again where a node is lost, up to RESTARTS times.
set -euo pipefail
name=$1
shift
xpk workload create --cluster="$CLUSTER" --workload="$name" --tpu-type="$TPU" --num-slices="${SLICES:-1}" \
    --docker-image="$IMAGE" --max-restarts="${RESTARTS:-10}" \
    --command="python launch.py --processes auto $(printf '%q ' "$@")"
