#!/usr/bin/env bash
# Every table that two cores can make: bash results/all.sh, or some of them: bash results/all.sh small labels
#
# Parts: demo small patient choices labels ten augmented draws cores findings costs. The parts paper, three and
# course take hours without a GPU and run only if they are named. So do mura and multilabel, which need MURA-v1.1
# and ChestX-ray14 from their authors. All others but demo, findings and costs need the X-rays in data/chest_xray.
# The parts patient and choices also need the teachers of small, and ten, augmented and draws those of labels. Finished
# runs are not trained again, and killed runs resume. The figures need matplotlib (pip install matplotlib).
# WEIGHTS and TEACHER_WEIGHTS name files, if torchvision's ImageNet weights cannot be fetched. On a CPU with
# AVX512-BF16, PRECISION=bfloat16 can make the larger convolutional networks faster. Set it for all parts or for none.
set -euo pipefail
cd "$(dirname "$0")/.."
xrays="--data data/chest_xray --weights ${WEIGHTS:-imagenet}"
few="--steps-per-epoch 37 --epochs 5"  # 37 steps: an epoch of all labels at the recipe's batch
precision=${PRECISION:+--precision $PRECISION}
inception="--data data/chest_xray --weights ${TEACHER_WEIGHTS:-imagenet} --size 128 --epochs 3 $precision"
tiny="--weights none --finetune all --size 96 --batch-size 64 --lr-gamma 0.3"
eight="--steps-per-epoch 74 --epochs 8 --lr-step 3"

demo() {
  for s in 0 1 2 3 4; do
    r=runs/demo teacher=runs/demo/teacher-seed$s baseline=runs/demo/baseline-seed$s
    python train.py --role teacher --seed $s --out $teacher
    python train.py --role baseline --seed $s --out $baseline
    python train.py --role student --T 1 --seed $s --teacher $teacher --out $r/student-T1-seed$s
    python train.py --role student --T 1 --seed $s --teacher $baseline --out $r/self-distilled-seed$s
    python train.py --role baseline --seed $s --labels-per-class 320 --out $r/baseline-all-labels-seed$s
  done
  python evaluate.py runs/demo --json results/demo.json
  python figures/plots.py table results/demo.json figures/demo.svg
}

small() {  # small networks, with random first weights, learn from InceptionV3
  r=runs/small
  for s in 0 1 2 3 4; do
    t=runs/labels/inception-seed$s
    python train.py --role teacher $inception --seed $s --out $t
    for arch in shufflenet_v2_x0_5 mobilenet_v3_small squeezenet1_1; do
      n=$arch-seed$s x="--data data/chest_xray $tiny $eight --arch $arch --seed $s" lr=0.05
      if [ $arch = shufflenet_v2_x0_5 ]; then lr=0.02; fi
      if [ $arch = squeezenet1_1 ]; then x="$x --clip 1 $precision"; fi
      twenty="$x --lr $lr --labels-per-class 10" all="$x --lr 0.05"
      python train.py --role baseline $twenty --out $r/baseline-20-labels-$n
      python train.py --role student $twenty --teacher $t --out $r/student-20-labels-$n
      python train.py --role student $twenty --teacher $r/baseline-20-labels-$n --out $r/self-20-labels-$n
      python train.py --role baseline $all --out $r/baseline-all-labels-$n
      python train.py --role student $all --teacher $t --out $r/student-all-labels-$n
      if [ $arch != mobilenet_v3_small ]; then
        python train.py --role student $all --teacher $t --alpha 0.5 --out $r/student-all-labels-alpha0.5-$n
        python train.py --role student $all --teacher $t --alpha 1 --out $r/student-all-labels-alpha1-$n
        python train.py --role student $all --teacher $t --T 4 --out $r/student-all-labels-T4-$n
      fi
    done
  done
  python evaluate.py $r runs/labels/inception-seed* --json results/small.json
  python figures/plots.py costs results/small.json figures/small.svg
}

patient() {  # Beyer et al.: student and teacher see the same augmented image, and training takes long
  r=runs/patient
  for s in 0 1 2; do
    for e in 8 40; do
      for name in "" all-labels-; do
        if [ $name ]; then labels="--lr 0.05"; else labels="--lr 0.02 --labels-per-class 10"; fi
        x="--data data/chest_xray $tiny --arch shufflenet_v2_x0_5 $labels $precision --seed $s"
        x="$x --steps-per-epoch 37 --epochs $e --lr-step $((e * 3 / 8))"
        baseline="--role baseline $x" student="--role student $x --teacher runs/labels/inception-seed$s"
        python train.py $baseline --out $r/${name}baseline-$e-seed$s
        python train.py $baseline --augment --out $r/${name}augmented-baseline-$e-seed$s
        python train.py $student --out $r/${name}precomputed-$e-seed$s
        python train.py $student --augment --out $r/${name}consistent-$e-seed$s
      done
    done
  done
  python evaluate.py $r --json results/patient.json
}

choices() {  # other choices of the small student's 20 labels
  r=runs/choices t=runs/labels/inception-seed0
  x="$tiny $eight --arch shufflenet_v2_x0_5 --lr 0.02 --labels-per-class 10"
  python results/draws.py data/chest_xray 1 2
  for d in 1 2; do
    drawn="--data data/draw-$d --val-fraction 0.9306 $x"
    python train.py --role baseline $drawn --out $r/baseline-$d
    python train.py --role student $drawn --teacher $t --out $r/student-$d
    python train.py --role student $drawn --teacher $r/baseline-$d --out $r/self-$d
  done
  python evaluate.py $r --json results/choices.json
}

labels() {
  r=runs/labels
  for s in 0 1 2; do
    python train.py --role teacher $inception --seed $s --out $r/inception-seed$s
    for n in 10 30 100 300; do
      x="$xrays $few --seed $s --labels-per-class $n"
      python train.py --role baseline $x --out $r/alone-$n-seed$s
      python train.py --role student --T 1 $x --teacher $r/inception-seed$s --out $r/taught-$n-seed$s
      python train.py --role student --T 1 $x --teacher $r/alone-$n-seed$s --out $r/self-$n-seed$s
    done
  done
  python evaluate.py $r/*-seed[012] --json results/labels.json
  python figures/plots.py labels results/labels.json figures/labels.svg
}

ten() {  # other ways to hand on ten labels of each class
  r=runs/ten alone=runs/labels/alone-10
  for s in 0 1 2; do
    x="$xrays $few --seed $s --labels-per-class 10"
    student="--role student $x --teacher"
    python train.py $student $alone-seed$s --T 4 --out $r/T4-seed$s
    python train.py $student $alone-seed0 $alone-seed1 $alone-seed2 --T 1 --out $r/three-teachers-seed$s
  done
  python evaluate.py $r $alone-seed* runs/labels/self-10-seed* --json results/ten.json
}

augmented() {  # the same ten labels of each class, with augmentation
  r=runs/augmented alone=runs/labels/alone-10
  for s in 0 1 2; do
    x="$xrays $few --seed $s --labels-per-class 10"
    python train.py --role baseline $x --augment --out $r/baseline-seed$s
    python train.py --role student $x --augment --T 1 --teacher $alone-seed$s --out $r/student-seed$s
  done
  python evaluate.py $r $alone-seed* --json results/augmented.json
}

draws() {  # ten other labels of each class, the rest in train/UNLABELLED
  r=runs/draws
  python results/draws.py data/chest_xray 0 1 2 3 4
  for d in 0 1 2 3 4; do
    x="--data data/draw-$d --weights ${WEIGHTS:-imagenet} $few --labels-per-class 10 --val-fraction 0.9306"
    python train.py --role baseline $x --out $r/alone-$d
    python train.py --role student --T 1 $x --teacher runs/labels/inception-seed0 --out $r/taught-$d
    python train.py --role student --T 1 $x --teacher $r/alone-$d --out $r/self-$d
  done
  python evaluate.py $r --json results/draws.json
}

cores() {  # the temperatures
  r=runs/two-cores teacher=runs/labels/inception  # two-cores.json has other teachers
  for s in 0 1 2; do
    python train.py --role teacher $inception --seed $s --out $teacher-seed$s
    python train.py --role baseline $xrays --seed $s --out $r/alexnet-seed$s
    for T in 1 10 20 30 40 50; do
      python train.py --role student $xrays --seed $s --T $T --teacher $teacher-seed$s --out $r/T$T-seed$s
    done
  done
  python evaluate.py $teacher-seed[012] $r --json results/two-cores.json
}

paper() {  # the pair of arXiv 2406.08837, other teachers, other students
  for s in 0 1 2 3 4; do
    x="--data data/chest_xray --seed $s" r=runs/xrays
    student="--role student $x --clip 0"
    python train.py --role teacher $x --out $r/inception-seed$s
    python train.py --role teacher $x --finetune head --epochs 20 --lr 0.3 --out $r/inception-head-seed$s
    python train.py --role baseline $x --clip 0 --arch vgg16 --out $r/vgg16-seed$s
    python train.py --role baseline $x --clip 0 --out $r/alexnet-seed$s
    python train.py --role baseline $x --clip 0 --label-smoothing 0.1 --out $r/alexnet-smoothed-seed$s
    python train.py $student --T 1 --teacher $r/inception-seed$s --out $r/T1-seed$s
    for a in 0.5 1; do
      python train.py $student --T 1 --alpha $a --teacher $r/inception-seed$s --out $r/T1-alpha$a-seed$s
    done
    python train.py $student --T 1 --teacher $r/inception-seed$s $r/vgg16-seed$s --out $r/T1-two-teachers-seed$s
    python train.py $student --T 1 --teacher $r/inception-head-seed$s --out $r/T1-of-head-seed$s
  done
  python evaluate.py runs/xrays --json results/xrays.json
}

three() {  # three classes: normal, reversed and defective teachers
  for s in 0 1 2; do
    x="--data data/chest_xray --classes 3 --clip 0 --seed $s" r=runs/three
    large="--arch vgg16 $x"
    python train.py --role baseline $x --out $r/small-seed$s
    python train.py --role baseline $x --out $r/small-smoothed-seed$s --label-smoothing 0.1
    python train.py --role baseline $large --out $r/large-seed$s
    python train.py --role baseline $large --out $r/large-smoothed-seed$s --label-smoothing 0.1
    python train.py --role teacher $large --out $r/stopped-seed$s --size 224 --finetune fc --batch-size 128 \
      --lr 0.01 --stop-at 0.5 --steps-per-epoch 4
    python train.py --role student $x --out $r/normal-seed$s --T 4 --teacher $r/large-seed$s
    python train.py --role student $large --out $r/reversed-seed$s --T 4 --teacher $r/small-seed$s
    python train.py --role student $x --out $r/defective-seed$s --T 4 --teacher $r/stopped-seed$s
  done
  python evaluate.py runs/three --json results/three-classes.json
}

course() {  # fine-tuning or fixed features
  for s in 0 1 2; do
    for v in 0.2 0.3 0.4; do
      for a in alexnet vgg16; do
        for f in head fc all; do  # VGG16 in all layers: the table has seed 0 alone
          python train.py --role baseline --recipe course --data data/chest_xray --epochs 10 --lr 0.01 \
            --clip 1 --arch $a --finetune $f --val-fraction $v --seed $s --out runs/course/$a-$f-$v-seed$s
        done
      done
    done
  done
  python evaluate.py runs/course --json results/course.json
}

findings() {
  python train.py --role teacher --data findings
  python train.py --role baseline --data findings
  python train.py --role student --T 4 --data findings
  python evaluate.py runs/findings --json results/findings.json
}

mura() {  # normal, reversed and defective teachers, for seven body parts
  x="--data MURA-v1.1 --recipe mura" r=runs/mura
  python train.py --role baseline $x --arch seresnet50 --out $r/teacher  # also the baseline of "reversed"
  python train.py --role baseline $x
  python train.py --role teacher $x --stop-at 0.5 --steps-per-epoch 50 --out $r/stopped
  python train.py --role student $x --out $r/normal
  python train.py --role student $x --out $r/reversed --arch seresnet50 --teacher $r/baseline
  python train.py --role student $x --out $r/defective --teacher $r/stopped
  python evaluate.py $r
}

multilabel() {  # several findings per image
  for role in teacher baseline student; do
    python train.py --role $role --data ChestX-ray14 --recipe multilabel
  done
  python evaluate.py runs/multilabel
}

costs() {  # on a machine that does nothing else
  python profile_gpu.py alexnet vgg16 resnet18 resnet34 inception_v3 --steps 1 --rounds 3 \
    --json results/cost-networks.json
  python profile_gpu.py inception_v3 alexnet --batch-size 16 --steps 1 --rounds 5 \
    --json results/cost-inception_v3-alexnet.json
  OMP_NUM_THREADS=1 python profile_gpu.py inception_v3 --size 128 --steps 1 --rounds 5 \
    --json results/cost-small-teacher.json
  OMP_NUM_THREADS=1 python profile_gpu.py mobilenet_v3_small squeezenet1_1 shufflenet_v2_x0_5 --size 96 --steps 1 \
    --rounds 5 --json results/cost-small-student.json
}

for part in ${@:-demo small patient choices labels ten augmented draws cores findings costs}; do $part; done
