#!/usr/bin/env bash
# All encoders at reduced sizes from scratch on ESC-10: the table and the picture "ESC-10, all encoders" of RESULTS.md.
#
#     benchmarks/encoders_esc10.sh ESC-10_FOLDER WORKSPACE [--seeds 1]
#
# ESC-10_FOLDER: ESC-10 in ESC-50's layout, folds 1 to 4. Fold 4 tests, fold 1 chooses the epoch, folds 2 and 3 train.
# Of each clip the first 2.4 s count. All encoders have the same clips, steps and learning rates. Interrupted, it resumes.
set -euo pipefail
raw=$1 workspace=$2
shift 2
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
vit=dim=192,depth=4,heads=3
[ -f "$workspace/data/esc-50/esc-50.h5" ] || "$python" main.py prepare --dataset_type esc-50 --raw "$raw" --workspace "$workspace"
exec "$python" main.py compare --dataset_type esc-50 --esc_fold 4 --workspace "$workspace" \
    --encoders htsat,ast,atst-f,beats,fpasst,m2d,asit,psla,resnet50,mobilenetv2,cnn14,mn10,frame_mn06,frame_mn10,tal,taltrans,transformer,fnet,linear \
    --clip_samples 38400 --max_epoch 12 --batch_size 8 --lr_schedule cosine --learning_rate 1e-3 --save_top_k 1 \
    --mixup_alpha 0 --spec_augment False \
    --flags_of "htsat --htsat_size tiny --htsat_spec_size 128 --clip_samples 76800" \
    --flags_of "ast --encoder_options $vit,frequency_stride=16,time_stride=16" \
    --flags_of "atst-f --encoder_options $vit" \
    --flags_of "beats --encoder_options $vit" \
    --flags_of "fpasst --encoder_options $vit" \
    --flags_of "m2d --encoder_options dim=96,depth=4,heads=3" \
    --flags_of "asit --encoder_options $vit" \
    --flags_of "psla --encoder_options variant=b0,width=0.5,norm_momentum=0.1" \
    --flags_of "resnet50 --encoder_options width=0.25" \
    --flags_of "mobilenetv2 --encoder_options width=0.5" \
    --flags_of "cnn14 --encoder_options width=0.25 --clip_samples 76800" \
    --flags_of "mn10 --encoder_options width=0.5,norm_momentum=0.1 --clip_samples 76800" \
    --flags_of "frame_mn06 --encoder_options width=0.3,norm_momentum=0.1" \
    --flags_of "frame_mn10 --encoder_options width=0.5,norm_momentum=0.1" \
    --flags_of "tal --encoder_options dim=256,conv_layers=5" \
    --flags_of "taltrans --encoder_options dim=256,conv_layers=5" \
    --flags_of "transformer --encoder_options dim=256" \
    --flags_of "fnet --encoder_options dim=128,layers=12" \
    "$@"
