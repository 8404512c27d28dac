#!/usr/bin/env bash
# Objectives and pairings of alignment on CIFAKE, a line each: validation transfer and held-out probe accuracy, 3 seeds.
# Needs `gmail run cifake-clip` and `gmail generate --profile cifake` in ./runs. About 4 minutes a line on 2 CPU cores.
#   benchmarks/cifake_sweep.sh > sweep.tsv
set -euo pipefail
steps=${STEPS:-60}
variants=("paper random mask" "paper random mask-caption" "cosine random mask" "coral random mask"
  "cosine optimal-transport mask" "paper optimal-transport mask" "paper nearest mask" "cosine+coral random mask")
printf 'objective\tpairing\tfalse_negatives\tsteps\tresult\n'
for variant in "${variants[@]}"; do
  read -r objective pairing negatives <<<"$variant"
  common=(--profile cifake --set "align.objective=$objective" --set "align.pairing=$pairing" --set "align.steps=$steps"
    --set "align.false_negatives=$negatives" --set "data.train_limit=20000")
  aligned=$(gmail align "${common[@]}")
  trained=$(gmail train "${common[@]}" --aligned "$aligned" --task linear-probe --set train.dual_projection=off \
    --arm real --arm generated-naive --arm generated-aligned --set train.steps=200)
  embedded=$(gmail embed "${common[@]}" --train "$trained" --set embed.gap_count=500)
  result=$(gmail eval "${common[@]}" --embeddings "$embedded" --json | python3 -c '
import json, sys
metrics = json.load(sys.stdin)["summary"]["metrics"]
wanted = [k for k in metrics if "probe_accuracy" in k or "paired_cosine" in k or "linear_separability" in k]
print(json.dumps({k: round(metrics[k], 4) for k in sorted(wanted)}))')
  printf '%s\t%s\t%s\t%s\t%s\n' "$objective" "$pairing" "$negatives" "$steps" "$result"
done
