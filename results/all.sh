#!/usr/bin/env bash
# Every table that two cores can make: bash results/all.sh, or one part: bash results/all.sh labels
#
# Parts: demo labels ten draws cores findings costs. Finished runs are not trained again, a killed one
# goes on. labels, ten, draws (in this order) and cores need the X-rays in data/chest_xray. WEIGHTS and
# TEACHER_WEIGHTS name files, where torchvision's ImageNet weights cannot be fetched.
set -euo pipefail
cd "$(dirname "$0")/.."
xrays="--data data/chest_xray --weights ${WEIGHTS:-imagenet}"
few="--steps-per-epoch 37 --epochs 5"  # 37 steps: an epoch of all labels at the recipe's batch
inception="--data data/chest_xray --weights ${TEACHER_WEIGHTS:-imagenet} --size 128 --epochs 3"

demo() {
  for s in 0 1 2 3 4; do
    python train.py --role teacher --seed $s --out runs/demo/teacher-seed$s
    student="--role student --T 1 --seed $s --teacher runs/demo/teacher-seed$s"
    python train.py --role baseline --seed $s --out runs/demo/baseline-seed$s
    python train.py $student --out runs/demo/student-T1-seed$s
    python train.py --role student --T 1 --seed $s --teacher runs/demo/baseline-seed$s \
      --out runs/demo/student-of-itself-seed$s
  done
  for s in 0 1; do
    student="--role student --T 1 --seed $s --teacher runs/demo/teacher-seed$s"
    python train.py --role baseline --seed $s --labels-per-class 320 --out runs/demo/baseline-all-labels-seed$s
    python train.py $student --per-class 10 --out runs/demo/student-T1-20-images-seed$s
    python train.py $student --alpha 0.5 --out runs/demo/student-T1-alpha0.5-seed$s
  done
  python evaluate.py runs/demo --json results/demo.json
  python figures/plots.py table results/demo.json figures/demo.svg
  python figures/plots.py curves figures/demo-curves.svg runs/demo/teacher-seed* runs/demo/baseline-seed* \
    runs/demo/student-T1-seed*
}

labels() {
  r=runs/labels
  for s in 0 1 2; do
    x="$xrays $few --seed $s"
    python train.py --role teacher $inception --seed $s --out $r/inception-seed$s
    python train.py --role baseline $x --out $r/alone-all-seed$s
    python train.py --role student --T 1 $x --teacher $r/inception-seed$s --out $r/taught-all-seed$s
    for n in 10 30 100 300; do
      x="$xrays $few --seed $s --labels-per-class $n"
      python train.py --role baseline $x --out $r/alone-$n-seed$s
      python train.py --role student --T 1 $x --teacher $r/inception-seed$s --out $r/taught-$n-seed$s
      python train.py --role student --T 1 $x --teacher $r/alone-$n-seed$s --out $r/self-$n-seed$s
    done
  done
  python evaluate.py $r --json results/labels.json
  python figures/plots.py labels results/labels.json figures/labels.svg
}

ten() {  # other ways to hand on ten labels of each class
  r=runs/ten alone=runs/labels/alone-10
  for s in 0 1 2; do
    x="$xrays $few --seed $s --labels-per-class 10"
    student="--role student $x --teacher"
    python train.py $student $alone-seed$s --T 4 --out $r/T4-seed$s
    python train.py $student $alone-seed0 $alone-seed1 $alone-seed2 --T 1 --out $r/three-teachers-seed$s
    python train.py --role baseline $x --augment --out $r/moved-alone-seed$s
    python train.py $student $alone-seed$s --T 1 --augment --out $r/moved-seed$s
  done
  python evaluate.py $r $alone-seed* --json results/ten.json
}

draws() {  # ten other labels of each class, the rest in train/UNLABELLED
  r=runs/draws
  python results/draws.py data/chest_xray 0 1 2
  for d in 0 1 2; do
    x="--data data/draw-$d --weights ${WEIGHTS:-imagenet} $few --labels-per-class 10 --val-fraction 0.9306"
    python train.py --role baseline $x --out $r/alone-$d
    python train.py --role student --T 1 $x --teacher runs/labels/inception-seed0 --out $r/taught-$d
    python train.py --role student --T 1 $x --teacher $r/alone-$d --out $r/self-$d
  done
  python evaluate.py $r --json results/draws.json
}

cores() {  # the temperatures
  r=runs/two-cores teacher=runs/labels/inception  # the same teachers as for the labels
  for s in 0 1 2; do
    python train.py --role teacher $inception --seed $s --out $teacher-seed$s
    python train.py --role baseline $xrays --seed $s --out $r/alexnet-seed$s
    for T in 1 10 20 30 40 50; do
      python train.py --role student $xrays --seed $s --T $T --teacher $teacher-seed$s --out $r/T$T-seed$s
    done
  done
  python evaluate.py $teacher-seed* $r --json results/two-cores.json
}

findings() {
  python train.py --role teacher --data findings
  python train.py --role baseline --data findings
  python train.py --role student --T 4 --data findings
  python evaluate.py runs/findings --json results/findings.json
}

costs() {  # on a machine that does nothing else
  python profile_gpu.py alexnet vgg16 resnet18 resnet34 inception_v3 --steps 1 --rounds 3 \
    --json results/cost-networks.json
  python profile_gpu.py inception_v3 alexnet --batch-size 16 --steps 1 --rounds 5 \
    --json results/cost-inception_v3-alexnet.json
}

for part in ${@:-demo labels ten draws cores findings costs}; do $part; done
