#!/usr/bin/env bash
# Runs training, or another command, as N processes on this machine, like N hosts of a pod. For testing.
#
#   launch/local_hosts.sh 2 --config=configs/digits.py --workdir=runs/two
#
# Without flags, it trains the default config in runs/local_hosts. To run another command, put its name
# before the flags: launch/local_hosts.sh 2 sample --checkpoint=runs/digits --out=runs/many
# Each line of output starts with the number of its process. The exit code is 0 if all processes succeed, 75
# if all were preempted (start again), and otherwise the code of the first process that failed. Ctrl-C stops
# all processes. After a failure, processes that keep running are killed after END_SECONDS (60).
# --dry_run after N prints the commands. DEVICES=4 gives each process 4 (virtual CPU) devices. PYTHON
# sets the interpreter.
set -euo pipefail

if [[ ! "${1:-}" =~ ^[1-9][0-9]*$ ]]; then
  awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0" >&2
  exit 2
fi
count=$1
shift
dry_run=""
if [[ "${1:-}" == --dry_run ]]; then
  dry_run=1
  shift
fi
command=train
if [[ "${1:-}" =~ ^[a-z_]+$ ]]; then
  command=$1
  shift
fi
[[ "$command" != train || " $*" == *" --workdir"* ]] || set -- "$@" --workdir=runs/local_hosts
python=${PYTHON:-python}
port=${PORT:-$("$python" -c 'import socket; s = socket.create_server(("", 0)); print(s.getsockname()[1])')}
if [[ -n "${DEVICES:-}" ]]; then
  export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$DEVICES"
fi

if [[ -n "$dry_run" ]]; then
  for ((i = 0; i < count; i++)); do
    echo "+ JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_NUM_PROCESSES=$count JAX_PROCESS_ID=$i" \
      "$python -m pixelflow_jax.$command $*"
  done
  exit 0
fi
pids=()
stop_all() { # stop_all SIGNAL: sends it to the processes that still run
  for pid in "${pids[@]}"; do [[ -z "$pid" ]] || kill "-$1" "$pid" 2>/dev/null || true; done
}
trap 'stop_all TERM' TERM   # like a preemption: each process saves and ends with 75
trap 'stop_all INT; sleep 1; stop_all KILL; exit 130' INT

for ((i = 0; i < count; i++)); do
  JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_NUM_PROCESSES=$count JAX_PROCESS_ID=$i PYTHONUNBUFFERED=1 \
    "$python" -m "pixelflow_jax.$command" "$@" > >(sed -u "s/^/[$i] /") 2>&1 &
  pids+=($!)
done

result=0
ended=0
while ((ended < count)); do
  for ((i = 0; i < count; i++)); do
    if [[ -z "${pids[i]}" ]] || kill -0 "${pids[i]}" 2>/dev/null; then continue; fi
    code=0
    wait "${pids[i]}" 2>/dev/null || code=$?
    pids[i]=""
    ended=$((ended + 1))
    if ((code == 0)); then continue; fi
    echo "process $i ended with code $code$( ((code < 128)) || echo ", by signal $((code - 128))")" >&2
    if ((result == 0 || result == 75)); then result=$code; fi
    deadline=${deadline:-$((SECONDS + ${END_SECONDS:-60}))} # the others should end by themselves
  done
  if ((SECONDS > ${deadline:-SECONDS})); then stop_all KILL; fi
  sleep 0.2
done
exit "$result"
