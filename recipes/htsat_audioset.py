"""HTS-AT on AudioSet, from ImageNet's Swin (Chen et al., ICASSP 2022, arXiv 2202.00874, section 3.1).

Published mAP on the evaluation set: 0.471, of the averaged weights of a run's ten best checkpoints (one alone 0.459 to
0.467); an ensemble of six 0.487. Not trained here.

    python main.py train --recipe htsat_audioset --swin_pretrain_path swin_tiny_c24_patch4_window8_256.pth
    python main.py weight_average --recipe htsat_audioset --wa_test True
"""

dataset_type = "audioset"
protocol = "paper"
loss_type = "clip_bce"

max_epoch = 100
batch_size = 128
balanced_data = True

learning_rate = 1e-3
lr_schedule = "epochs"
lr_rate = [0.02, 0.05, 0.1]
lr_scheduler_epoch = [10, 20, 30]
weight_decay = 0.05
gradient_clip = 1.0

mixup_alpha = 0.5
mixup_targets = False
spec_augment = True
