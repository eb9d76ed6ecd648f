#!/usr/bin/env bash
# Runs training on a Cloud TPU VM: one host or a pod.
#
#   launch/tpu_vm.sh create            creates the VM (on demand; for spot capacity see spot.sh)
#   launch/tpu_vm.sh setup             copies this checkout's last commit to all workers and installs packages
#   launch/tpu_vm.sh doctor [FLAGS]    checks on all workers whether training can start
#   launch/tpu_vm.sh train [FLAGS]     starts training in the background on all workers
#   launch/tpu_vm.sh status            prints "running" or the exit code of each worker
#   launch/tpu_vm.sh logs [WORKER]     follows the log of a worker (0); Ctrl-C does not end the run
#   launch/tpu_vm.sh kill              stops training on all workers: SIGTERM (it saves), then SIGKILL
#   launch/tpu_vm.sh delete            deletes the VM
#
# Settings come from launch/settings.env or --settings=FILE; --dry_run prints every command;
# --any_region allows a bucket in another region. `train` first stops what an earlier run left behind.
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

parse_flags "$@"
action=${arguments[0]:-}
need PROJECT ZONE NAME TYPE RUNTIME BUCKET CONFIG WORKDIR
need_tool gcloud "https://cloud.google.com/sdk/docs/install"

case "$action" in
  create)
    check_region
    trap 'say "interrupted: deleting what was created"; delete_vm || say "NOT DELETED: see \
gcloud compute tpus tpu-vm list"; exit 130' INT TERM HUP
    run gcloud compute tpus tpu-vm create "${setting[NAME]}" "${where[@]}" \
      --accelerator-type="${setting[TYPE]}" --version="${setting[RUNTIME]}" ||
      fail "${setting[NAME]} was not created (see above); if it exists partially: launch/tpu_vm.sh delete" 1
    ;;
  setup)
    make_archive
    setup_workers
    ;;
  train)
    check_region
    stop_training
    start_training "${arguments[@]:1}"
    say "started; to follow the log: launch/tpu_vm.sh logs"
    ;;
  doctor) on_workers all "cd $remote && . venv/bin/activate && cd code && \
$(train_command "${arguments[@]:1}" | sed 's/pixelflow_jax.train/pixelflow_jax.doctor/')" ;;
  status) worker_codes ;;
  logs) on_workers "${arguments[1]:-0}" "tail -n 100 -F $remote/train.log" ;;
  kill) stop_training ;;
  delete) delete_vm ;;
  *) usage ;;
esac
