#!/usr/bin/env bash
# What makes alignment help on CIFAKE: objectives, pairings, negatives, strength; a line each, judged on photographs held
# out of the training part (never on the test part). Needs `gmail run cifake-clip` in ./runs. About 3 minutes a line on
# one CPU core.
#   benchmarks/cifake_sweep.sh > sweep.tsv
set -euo pipefail
common=(--profile cifake --json --set generate.limit=8000 --set data.train_limit=10000 --set align.validation=0.4
  --set align.batch_size=128)
variants=(
  "paper,random,mask"
  "paper,random,mask,steps=240"
  "paper,random,mask,lr=3e-3"
  "paper,random,mask-caption"
  "paper,nearest,mask"
  "paper,random,mask,temperature=0.3"
  "cosine,random"
  "cosine,optimal-transport"
  "cosine,random,,lr=3e-3"
  "cosine+0.5*eq1,random,mask-caption"
  "coral,random"
  "coral,random,,steps=240"
  "mmd,random"
)
[ $# -eq 0 ] || variants=("$@")
gmail generate "${common[@]}" > /dev/null
printf 'objective,pairing,negatives,...\tbefore\tafter\tgain\tstandard error\treal\tpaired cosine\tcentroid distance\tseparability\n'
for variant in "${variants[@]}"; do
  IFS=, read -r objective pairing negatives more <<<"$variant"
  options=(--set "align.objective=$objective" --set "align.pairing=$pairing")
  [ -z "${negatives:-}" ] || options+=(--set "align.false_negatives=$negatives")
  for setting in ${more//,/ }; do options+=(--set "align.$setting"); done
  result=$(gmail align "${common[@]}" "${options[@]}" | python3 -c '
import json, sys
found = json.load(sys.stdin)["summary"]
before, after = found["before"], found["after"]
pair = lambda key: f"{before[key]:.3f} -> {after[key]:.3f}"
print(f"{before['"'transfer'"']:.4f}\t{after['"'transfer'"']:.4f}\t{found['"'transfer_gain'"']:+.4f}",
      f"{found['"'transfer_standard_error'"']:.4f}", f"{found.get('"'transfer_real'"') or float('"'nan'"'):.4f}",
      pair("paired_cosine"), pair("centroid_distance"), pair("linear_separability"), sep="\t")')
  printf '%s\t%s\n' "$variant" "$result"
done
