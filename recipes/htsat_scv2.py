"""HTS-AT on Speech Commands V2, fine-tuned from AudioSet (Chen et al., ICASSP 2022, arXiv 2202.00874, section 3.2).

Published accuracy in percent: 98.0 +- 0.03, of an epoch chosen on the test clips. Not trained here.

    python main.py train --recipe htsat_scv2 --resume_checkpoint htsat-audioset

The published front-end reaches to 14,000 Hz, above half the sample rate: 9 of its 64 bands stay empty.
"""

dataset_type = "scv2"
protocol = "paper"
loss_type = "clip_bce"
short_clips = "repeat"
fmax = 14000.0

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
