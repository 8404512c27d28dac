#!/usr/bin/env bash
# The small stand-ins of docs/reproduce.md that have no profile of their own, on the built-in world. Everything lies in
# ./runs/tables and is reused. One part or all of them:
#   benchmarks/tables.sh [clipcap|rank|long|ifcap|sitta|other|tuned|again|generators|questions|siglip|unbiased|clip]...
set -euo pipefail
here=$(dirname "$0")
common=(--profile tiny --run tables)
drawn=$(gmail generate "${common[@]}")
align() { gmail align "${common[@]}" --generated "$drawn" "$@"; } # options
eq1=$(align) # Eq. 1, rank 4

# Trains, embeds the test images, evaluates; prints the folder of results.json and report.html.
cell() { # name, align artifact, options of train
  local name=$1 aligned=$2
  shift 2
  tested "$name" "$(gmail train "${common[@]}" --aligned "$aligned" "$@")"
}

# Embeds the test images and evaluates.
tested() { # name, train artifact, options of embed
  local name=$1 trained=$2 embedded evaluated
  shift 2
  embedded=$(gmail embed "${common[@]}" --train "$trained" "$@")
  evaluated=$(gmail eval "${common[@]}" --embeddings "$embedded" --train "$trained")
  printf '%s\t%s\n' "$name" "$evaluated"
}

images=(--arm real --arm generated-naive --arm generated-aligned)
learnt=(--set train.steps=300 --set train.batch_size=16 --set train.lr=1e-3)
seeds=(--set 'train.seeds=[0,1,2]')

clipcap() { # tables 1, 6, 13, 16
  cell clipcap "$eq1" --task clipcap "${images[@]}" --arm mixed --arm texts "${learnt[@]}" "${seeds[@]}" --set train.text_memory=400
}

rank() { # tables 11, 12
  local aligned
  for change in align.lora_rank=2 align.lora_rank=4 align.lora_rank=6 align.method=full; do
    aligned=$(align --set "$change")
    cell "$change" "$aligned" --task clip-text --arm none "${images[@]}"
  done
}

long() { # table 5
  local arms=(--arm none "${images[@]}" --set 'train.kinds=["long"]')
  cell clip-text "$eq1" --task clip-text "${arms[@]}"
  cell stretched "$eq1" --task long-clip "${arms[@]}"
  cell rotary "$eq1" --task long-clip "${arms[@]}" --set train.positions=rotary
}

ifcap() { # table 1
  cell ifcap "$eq1" --task ifcap "${images[@]}" --arm texts "${learnt[@]}"
}

sitta() { # table 1
  cell sitta "$eq1" --task sitta "${images[@]}" --set train.token_orders=4
}

towers() { gmail train "${common[@]}" --aligned "$eq1" --task clip-text --arm none "${images[@]}"; }

again() { # the alignment of table 2 with other seeds: other pairs in each batch, other images held out
  local seed
  for seed in 1 2; do
    cell "seed $seed" "$(align --set seed=$seed)" --task clip-text --arm none "${images[@]}"
  done
}

other() { # table 3: other scenes by another camera
  [ -d photos ] || python "$here/other_photos.py" photos
  tested other "$(towers)" --captions photos --set data.test_limit=0 --set 'data.protocol=""' --set embed.gap_count=0
}

tuned() { # section 3.2: real test images through f_g, which in `both` learns to read them too
  local both trained
  tested tuned "$(towers)" --aligned "$eq1" --set embed.real_encoder=tuned
  both=$(align --set align.objective=eq1+real-text)
  trained=$(gmail train "${common[@]}" --aligned "$both" --task clip-text --arm none "${images[@]}")
  tested both "$trained"
  tested both-tuned "$trained" --aligned "$both" --set embed.real_encoder=tuned
}

generators() { # table 17: the same weights with other settings
  local change
  for change in generate.guidance=1 generate.guidance=6 generate.steps=2; do
    (
      common+=(--set generate.score=true --set "$change")
      drawn=$(gmail generate "${common[@]}")
      aligned=$(align)
      cell "$change" "$aligned" --task clip-text --arm none "${images[@]}"
    )
  done
}

questions() { # table 15
  [ -d questions ] || python "$here/scene_questions.py" questions > /dev/null
  asked "$eq1" questions
}

asked() { # align artifact, name, options
  (
    common+=(--set train.lm=questions/lm --set train.conversations=questions/conversations.json --set eval.answer_tokens=4)
    common+=(--set 'eval.questions=["questions/mmmu.parquet"]')
    cell "$2" "$1" --task llava "${images[@]}" "${learnt[@]}" --set train.steps=600 "${seeds[@]}" "${@:3}"
  )
}

siglip() { # table 8
  through "$(another siglip --set train.architecture=tiny-siglip.json)" siglip "${seeds[@]}"
}

unbiased() { # the same SigLIP without its bias, so that CLIP's loss trains the text tower
  local clip
  clip=$(another siglip --set train.architecture=tiny-siglip.json)
  [ -d unbiased ] || python "$here/without_bias.py" "$clip" unbiased
  through unbiased unbiased
}

clip() { # the shipped CLIP's recipe with another seed
  through "$(another clip --set 'train.seeds=[1]')" clip "${seeds[@]}"
}

another() { # run, options of tiny-clip: trains another f_r, prints its folder
  gmail run tiny-clip --run "$@" > /dev/null
  echo "runs/$1"/train/latest/clip.real.seed?/clip
}

through() { # folder of f_r, name, seeds of captioners: none, no captioners
  local aligned
  (
    common+=(--set "model.clip=$1")
    aligned=$(align)
    cell "$2" "$aligned" --task clip-text --arm none "${images[@]}"
    [ $# -eq 2 ] || cell "$2-clipcap" "$aligned" --task clipcap "${images[@]}" "${learnt[@]}" "${@:3}"
  )
}

[ $# -gt 0 ] || set -- clipcap rank long ifcap sitta other tuned again generators questions siglip unbiased clip
for part in "$@"; do "$part"; done
