"""HTS-AT on ESC-50, fine-tuned from AudioSet (Chen et al., ICASSP 2022, arXiv 2202.00874, section 3.2).

Published accuracy in percent, mean of the five folds: 97.0 +- 0.2, of epochs chosen on the test clips. Not trained
here.

    python main.py cross_validate --recipe htsat_esc50 --protocols paper --resume_checkpoint htsat-audioset
"""

dataset_type = "esc-50"
protocol = "paper"
loss_type = "clip_ce"
short_clips = "repeat"

max_epoch = 100
batch_size = 128

learning_rate = 1e-3
lr_schedule = "epochs"
lr_rate = [0.02, 0.05, 0.1]
lr_scheduler_epoch = [10, 20, 30]
weight_decay = 0.05
gradient_clip = 1.0

mixup_alpha = 0.5
mixup_targets = False
spec_augment = True
