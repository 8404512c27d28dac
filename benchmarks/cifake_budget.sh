#!/usr/bin/env bash
# When do generated images pay? Alignment and the arm `real` get the same N photographs; the generated arms train on
# 20,000 generated images. Needs `gmail run cifake-clip` in ./runs. About 5 minutes a line on one CPU core.
#   benchmarks/cifake_budget.sh > budget.tsv
set -euo pipefail
printf 'photographs\ttask.arm\ttop-1 accuracy\n'
for photographs in ${@:-100 1000 5000 20000}; do
  gmail run cifake --run cifake-budget --set "data.train_limit=$photographs" --set 'train.tasks=["linear-probe"]' \
    --set train.dual_projection=off --json | python3 -c '
import json, pathlib, sys
path = json.load(sys.stdin)["eval"]["path"]
metrics = json.loads((pathlib.Path(path) / "results.json").read_text())["metrics"]
for name, value in sorted(metrics.items()):
    if name.endswith("top_1_accuracy"):
        print(sys.argv[1], name.rsplit(".", 1)[0], f"{value:.4f}", sep="\t")' "$photographs"
done
