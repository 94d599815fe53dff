#!/bin/bash
# One run on all workers of a TPU slice that `gcloud compute tpus tpu-vm create` has made:
#     tools/launch/tpu_pod.sh my-v5e-64 us-west4-a --config configs/dit_xl2_imagenet256.py --workdir /mnt/runs/xl
# /mnt/runs is a file system that all workers have mounted (Filestore, or a bucket through gcsfuse). Run it in the repository: the
# files that git tracks are copied. The same command goes on with a run that was ended.
set -euo pipefail
name=$1 zone=$2
shift 2
git archive --format=tar.gz --output=/tmp/jdiff.tar.gz HEAD
gcloud compute tpus tpu-vm scp /tmp/jdiff.tar.gz "$name": --zone="$zone" --worker=all
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="
    mkdir -p jdiff && tar -xzf jdiff.tar.gz -C jdiff && cd jdiff &&
    pip install --quiet 'jax[tpu]' . && python launch.py --processes auto $(printf '%q ' "$@")"
