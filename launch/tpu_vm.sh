#!/usr/bin/env bash
# Runs training on a Cloud TPU VM, one host or a pod of many.
#
#   launch/tpu_vm.sh create            makes the VM (on demand; for spot capacity see spot.sh)
#   launch/tpu_vm.sh setup             brings this checkout's last commit and its packages to all workers
#   launch/tpu_vm.sh doctor [FLAGS]    looks on all workers whether training can start
#   launch/tpu_vm.sh train [FLAGS]     starts training on all workers, in the background there
#   launch/tpu_vm.sh status            running, or the exit code, of each worker
#   launch/tpu_vm.sh logs [WORKER]     follows a worker's log (0); Ctrl-C ends the following only
#   launch/tpu_vm.sh kill              ends training on all workers: SIGTERM (it saves), then SIGKILL
#   launch/tpu_vm.sh delete            deletes the VM
#
# Settings come from launch/settings.env or --settings=FILE; --dry_run prints every command;
# --any_region allows a bucket elsewhere. `train` ends what an earlier run left behind first.
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

parse_flags "$@"
action=${arguments[0]:-}
need PROJECT ZONE NAME TYPE RUNTIME BUCKET CONFIG WORKDIR
need_tool gcloud "https://cloud.google.com/sdk/docs/install"

case "$action" in
  create)
    check_region
    trap 'say "interrupted: deleting what was made"; delete_vm || say "NOT DELETED: see \
gcloud compute tpus tpu-vm list"; exit 130' INT TERM HUP
    run gcloud compute tpus tpu-vm create "${setting[NAME]}" "${where[@]}" \
      --accelerator-type="${setting[TYPE]}" --version="${setting[RUNTIME]}" ||
      fail "${setting[NAME]} was not created (see above); if it exists half-made: launch/tpu_vm.sh delete" 1
    ;;
  setup)
    make_archive
    setup_workers
    ;;
  train)
    check_region
    stop_training
    start_training "${arguments[@]:1}"
    say "started; follow it with: launch/tpu_vm.sh logs"
    ;;
  doctor) on_workers all "cd $remote && . venv/bin/activate && cd code && \
$(train_command "${arguments[@]:1}" | sed 's/pixelflow_jax.train/pixelflow_jax.doctor/')" ;;
  status) worker_codes ;;
  logs) on_workers "${arguments[1]:-0}" "tail -n 100 -F $remote/train.log" ;;
  kill) stop_training ;;
  delete) delete_vm ;;
  *) usage ;;
esac
