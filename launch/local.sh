#!/usr/bin/env bash
# Run one configuration on this machine: launch/local.sh CONFIG WORKDIR [--config.a.b=v ...]
# Stages that are finished are not repeated: start it again after a kill and it goes on.
set -euo pipefail
if [ $# -lt 2 ]; then
  echo "usage: $0 CONFIG WORKDIR [--config.a.b=v ...]" >&2
  exit 2
fi
config=$1 workdir=$2
shift 2
exec mpqdiff run --config="$config" --workdir="$workdir" "$@"
