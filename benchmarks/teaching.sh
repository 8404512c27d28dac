#!/usr/bin/env bash
# What makes generated images teach more: `tiny` with other images, a run each, three seeds. Three to six minutes a line on
# one CPU core, and the last one ten. All of them, or some:
#   benchmarks/teaching.sh [plain|best|near8|near5|near2|near5-best|four|four-stablerep|alike-1|alike-10|near5-4000]...
set -euo pipefail

line() { # name, options
  gmail run tiny --run "$@" --set 'train.tasks=["clip-text"]' --set 'train.seeds=[0,1,2]' --set generate.score=true \
    --set 'train.arms=["none","real","generated-naive","generated-aligned","mixed"]'
}

four=(--set generate.per_caption=4)
[ $# -gt 0 ] || set -- plain best near8 near5 near2 near5-best four four-stablerep alike-1 alike-10 near5-4000
for name in "$@"; do
  case $name in
    plain) line "$name" ;;
    best) line "$name" "${four[@]}" --set generate.keep_best=1 ;;
    near8) line "$name" --set generate.strength=0.8 ;;
    near5) line "$name" --set generate.strength=0.5 ;;
    near2) line "$name" --set generate.strength=0.25 ;;
    near5-best) line "$name" --set generate.strength=0.5 "${four[@]}" --set generate.keep_best=1 ;;
    four) line "$name" "${four[@]}" ;;
    four-stablerep) line "$name" "${four[@]}" --set align.objective=eq1+stablerep ;;
    alike-*) # real scenes that show what the generator drew in `plain`, each of the 1 or 10 most alike
      drawn=$(gmail generate --profile tiny --run plain --set generate.score=true)
      [ -d "scenes-$name" ] || python "$(dirname "$0")/look_alikes.py" "$drawn" "scenes-$name" "${name#alike-}"
      line "$name" --set generate.source=import --set "generate.import_path=scenes-$name"
      ;;
    near5-4000) line "$name" --set generate.strength=0.5 --set data.train_limit=4000 ;;
    *) echo "no line $name" >&2 && exit 2 ;;
  esac
done
