#!/usr/bin/env bash
# From a clean clone to the answer of a model that you fine-tuned: installs, fetches the demo model, trains, merges, asks.
# Run: bash scripts/quickstart.sh       (a second run installs nothing and fetches nothing)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/_install.sh
source scripts/_install.sh

install_peftctl
.venv/bin/python scripts/fetch_demo_models.py smollm2-135m
.venv/bin/peftctl train recipes/quickstart.yaml --fresh
rm -rf runs/quickstart/merged
.venv/bin/peftctl merge runs/quickstart --output runs/quickstart/merged
.venv/bin/peftctl chat runs/quickstart/merged \
    --prompt "Could you book a table at Little Mountain for seven people on the 3rd of May at 6:30 pm?"
