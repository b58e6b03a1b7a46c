"""AST on ESC-50, fine-tuned from AudioSet (Gong, Chung, Glass, Interspeech 2021, arXiv 2104.01778).

Published accuracy in percent: 95.75 (folds 95.0, 97.75, 94.75, 97.0, 94.25), of one epoch that is chosen on the average
over the test folds: the line `best on average`. From ImageNet the rate is 1e-4. Not trained here.

    python main.py cross_validate --recipe ast_esc50 --protocols paper --resume_checkpoint ast-audioset

Other than published: no L2 of 5e-7, and masked cells have the mean and not the log power 0.
"""

dataset_type = "esc-50"
protocol = "paper"
encoder = "ast"
encoder_options = {"mean": "-6.6268077", "deviation": "5.358466"}
clip_samples = 80000
short_clips = "pad"
loss_type = "clip_ce"

max_epoch = 25
batch_size = 48
save_top_k = 25
precision = "16-mixed"

learning_rate = 1e-5
lr_schedule = "milestones"
warm_up = 0
lr_milestones = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25]
lr_factor = 0.85
adam_beta1 = 0.95
weight_decay = 0.0
gradient_clip = 0.0

mixup_alpha = 0.0
wavmix = 0.0
wavmix_alpha = 10.0
spec_augment = True
spec_masks = 1
spec_mask_frames = 96
spec_mask_bands = 24
