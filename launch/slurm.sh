#!/usr/bin/env bash
# Submits training to SLURM, one process per GPU. A job that is preempted or reaches its time limit is
# requeued and resumes.
#
#   launch/slurm.sh [FLAGS of training]
#
# Settings come from launch/settings.env or --settings=FILE; --dry_run prints the command and the script.
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

parse_flags "$@"
need NAME CONFIG WORKDIR PARTITION NODES GPUS_PER_NODE TIME VENV
need_tool sbatch "run this on a login node of the cluster"

script=$(
  cat <<END
#!/usr/bin/env bash
#SBATCH --job-name=${setting[NAME]}
#SBATCH --partition=${setting[PARTITION]}
#SBATCH --nodes=${setting[NODES]}
#SBATCH --gpus-per-node=${setting[GPUS_PER_NODE]}
#SBATCH --ntasks-per-node=${setting[GPUS_PER_NODE]}
#SBATCH --time=${setting[TIME]}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=${setting[NAME]}-%j.log
#SBATCH --signal=TERM@180
trap : TERM # the processes get it too, save and end with 75; this shell waits for them
. $(printf %q "${setting[VENV]}")/bin/activate
code=0
srun --kill-on-bad-exit=0 $(train_command "${arguments[@]}") || code=\$?
if ((code == 75)); then scontrol requeue "\$SLURM_JOB_ID"; fi
exit \$code
END
)
if [[ -n "$dry_run" ]]; then
  run sbatch
  printf '%s\n' "$script"
  exit 0
fi
sbatch <<<"$script" || fail "the job was not submitted (see above)" 1
