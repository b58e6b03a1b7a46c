#!/usr/bin/env bash
# Builds the indexes of AudioSet's packed files (hdf5s/waveforms) below DATASET_PATH, by main.py create_index.
set -euo pipefail

if [ "$#" -lt 1 ] || [ "$#" -gt 2 ]; then
    echo "usage: ./create_index.sh DATASET_PATH [PROCESSES]    (DATASET_PATH is the folder that holds hdf5s/)" >&2
    exit 2
fi
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec "${PYTHON:-python3}" "$here/main.py" create_index --dataset_path="$1" ${2:+--processes="$2"}
