#!/usr/bin/env bash
# Runs training on GKE through xpk (pip install xpk), which restarts it when preempted.
#
#   launch/gke.sh image              builds and pushes IMAGE from this checkout (docker)
#   launch/gke.sh train [FLAGS]      submits the workload
#   launch/gke.sh status             lists the cluster's workloads
#   launch/gke.sh delete             deletes the workload
#
# Settings come from launch/settings.env or --settings=FILE; --dry_run prints every command;
# --any_region allows a bucket in another region.
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

parse_flags "$@"
need PROJECT ZONE NAME TYPE BUCKET CONFIG WORKDIR CLUSTER IMAGE SLICES
where=(--cluster="${setting[CLUSTER]}" "${where[@]}")
need_tool xpk "pip install xpk"

case "${arguments[0]:-}" in
  image)
    run docker build -t "${setting[IMAGE]}" -f "$here/Dockerfile" "$here/.." || fail "the image was not built" 1
    run docker push "${setting[IMAGE]}" || fail "the image was not pushed: gcloud auth configure-docker" 1
    ;;
  train)
    need_tool gcloud "https://cloud.google.com/sdk/docs/install"
    check_region
    run xpk workload create "${where[@]}" --workload="${setting[NAME]}" \
      --tpu-type="${setting[TYPE]}" --num-slices="${setting[SLICES]}" \
      --docker-image="${setting[IMAGE]}" --max-restarts=1000 --restart-on-exit-codes=75,76,143 \
      --termination-grace-period-seconds=120 --command="$(cloud_command "${arguments[@]:1}")" ||
      fail "the workload was not submitted (see above)" 1
    ;;
  status) run xpk workload list "${where[@]}" ;;
  delete) run xpk workload delete "${where[@]}" --workload="${setting[NAME]}" ;;
  *) usage ;;
esac
