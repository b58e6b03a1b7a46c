"""TAL on AudioSet, as in AudioTagging Done Right (Li et al., Interspeech 2022, arXiv 2203.13448).

Published mAP in percent, of the best epoch on the evaluation set: 42.9. Not trained here.

    python main.py train --recipe tal_audioset
    python main.py test --resume_checkpoint workspace/runs/htsat_audioset/checkpoints/best.ckpt --tta_shifts 0

Other than published: no L2 of 5e-7, masked cells have the mean and not the log power 0, and mixup takes its partners
from the batch.
"""

dataset_type = "audioset"
encoder = "tal"
encoder_options = {"frontend": "fbank128", "mean": "-3.6788461", "deviation": "4.3739743"}
loss_type = "clip_bce"
balanced_data = True

max_epoch = 10
batch_size = 100
save_top_k = 10
precision = "32"

learning_rate = 4e-4
lr_schedule = "milestones"
warm_up = 1000
lr_milestones = [2, 3, 4, 5, 6, 7, 8, 9, 10]
lr_factor = 0.5
adam_beta1 = 0.95
weight_decay = 0.0
gradient_clip = 0.0

mixup_alpha = 0.0
wavmix = 0.3
wavmix_alpha = 10.0
spec_augment = True
spec_masks = 1
spec_mask_frames = 192
spec_mask_bands = 36
