#!/usr/bin/env bash
# What makes generated images teach more: `tiny` with other images, a run each. Three to seven minutes a line on one CPU
# core. All of them, or some:
#   benchmarks/teaching.sh [plain|four|near8|best|near5|near2|alike-1|alike-10|near5-long|best-long]...
set -euo pipefail

line() { # name, options: text towers, three seeds
  gmail run tiny --run "$@" --set 'train.tasks=["clip-text"]' --set 'train.seeds=[0,1,2]' --set generate.score=true \
    --set 'train.arms=["none","real","generated-naive","generated-aligned","mixed"]'
}

long() { # name, options: a stretched text tower for long captions, one seed
  gmail run tiny --run "$@" --set 'train.tasks=["long-clip"]' --set 'train.kinds=["long"]' --set generate.score=true
}

four=(--set generate.per_caption=4)
best=("${four[@]}" --set generate.keep_best=1)
[ $# -gt 0 ] || set -- plain four near8 best near5 near2 alike-1 alike-10 near5-long best-long
for name in "$@"; do
  case $name in
    plain) line "$name" ;;
    four) line "$name" "${four[@]}" ;;
    near8) line "$name" --set generate.strength=0.8 ;;
    best) line "$name" "${best[@]}" ;;
    near5) line "$name" --set generate.strength=0.5 ;;
    near2) line "$name" --set generate.strength=0.25 ;;
    alike-*) # real scenes that show what the generator drew in `plain`, each of the 1 or 10 most alike
      drawn=$(gmail generate --profile tiny --run plain --set generate.score=true)
      [ -d "scenes-$name" ] || python "$(dirname "$0")/look_alikes.py" "$drawn" "scenes-$name" "${name#alike-}"
      line "$name" --set generate.source=import --set "generate.import_path=scenes-$name"
      ;;
    near5-long) long "$name" --set generate.strength=0.5 ;;
    best-long) long "$name" "${best[@]}" ;;
    *) echo "no line $name" >&2 && exit 2 ;;
  esac
done
