"""AST on Speech Commands V2, from ImageNet (Gong, Chung, Glass, Interspeech 2021, arXiv 2104.01778).

Published accuracy in percent of the test clips: 98.12, of the best epoch on the validation clips (98.02). Not trained
here.

    python main.py train --recipe ast_scv2 --resume_checkpoint deit_base_distilled_patch16_384.pth
    python main.py test --resume_checkpoint workspace/runs/htsat_scv2/checkpoints/best.ckpt

Other than published: no L2 of 5e-7, masked cells have the mean and not the log power 0, and mixup takes its partners
from the batch. The roll by up to 10 frames is normal with the same deviation, and comes before the noise.
"""

dataset_type = "scv2"
protocol = "held_out"
encoder = "ast"
encoder_options = {"mean": "-6.845978", "deviation": "5.5654526"}
clip_samples = 16000
short_clips = "pad"
loss_type = "clip_bce"

max_epoch = 30
batch_size = 128
save_top_k = 30
precision = "16-mixed"

learning_rate = 2.5e-4
lr_schedule = "milestones"
warm_up = 0
lr_milestones = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25]
lr_factor = 0.85
adam_beta1 = 0.95
weight_decay = 0.0
gradient_clip = 0.0

mixup_alpha = 0.0
wavmix = 0.6
wavmix_alpha = 10.0
spec_augment = True
spec_masks = 1
spec_mask_frames = 48
spec_mask_bands = 48
feature_noise = 0.1
frame_shift = 0.045
